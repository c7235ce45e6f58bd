"""Batches for a base that sees images: what its processor makes of texts and images, with the labels that we prepared.

The images are kept as they came, and become numbers when a batch is made: those are many times as large.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from job import errors
from job.model import vision
from job.model.tokenizer import IGNORED
from job.model.vision import Vision
from job.train.trainer import Trainer

COLUMN = "pictures"  # TRL takes `images` as its own to prepare


@dataclass
class Collator:
    """Makes a batch of rows; raises `errors.DataError` if the tokens are not those that were prepared."""

    vision: Vision
    blank: str
    """A text for rows that only fill a batch up."""
    always: bool
    """Give the model an image in every batch: processes that share it, or its optimizer, wait for each other in it."""

    def __post_init__(self) -> None:
        self._image = vision.blank()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts, images = [row["text"] or self.blank for row in rows], [row[COLUMN] for row in rows]
        added = self.always and not any(images)
        if added:  # behind what is looked at, where it changes nothing
            shortest = min(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
            texts[shortest] += self.vision.placeholder
            images[shortest] = [self._image]
        made = self.vision.batch(texts, images, split=not added)
        ids, mask = made["input_ids"], made["attention_mask"]
        labels = torch.full_like(ids, IGNORED)
        for number, row in enumerate(rows):
            if not row["text"]:
                continue
            length = len(row["input_ids"])
            if ids[number, :length].tolist() != row["input_ids"]:
                raise errors.DataError(
                    f"the base's processor makes other tokens of {row['text'][:80]!r} than when the data were prepared"
                )
            labels[number, :length] = torch.tensor(row["labels"])
            mask[number, length:] = 0
        longest = ids.shape[1] if added else int(mask.sum(1).max())
        cut = {name: value[:, :longest] if value.shape == ids.shape else value for name, value in made.items()}
        return {**cut, "labels": labels[:, :longest]}


class SeeingTrainer(Trainer):
    """The trainer for texts with images."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "text", COLUMN]
