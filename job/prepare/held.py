"""The examples that are kept to look at the result with: from all over a split, and none with images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job import paths
from job.model.tokenizer import IGNORED
from job.prepare import select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANY, _LONGEST = 32, 2048  # examples, and tokens of each


def out(folder: Path, split: str, count: int, words: "PreTrainedTokenizerBase") -> None:
    """Write some of the `count` examples of `split` into a file of their own in the `folder`, as tokens and as text."""
    made, which = [], np.zeros(count, dtype=bool)
    which[np.linspace(0, count - 1, min(count, _MANY)).astype(int)] = True
    for row in select.rows(folder / f"{split}.arrow", which, _MANY):
        ids, labels = list(row.input_ids[:_LONGEST]), list(row.labels[:_LONGEST])
        learned = [place for place, label in enumerate(labels) if label != IGNORED and place]
        if learned:
            answer = [ids[place] for place in learned]
            shown = {"prompt": words.decode(ids[: learned[0]]), "answer": words.decode(answer)}
            made.append({"ids": ids, "labels": labels, "asked": learned[0], **shown})
    (folder / paths.HELD_OUT).write_text(
        json.dumps({"split": split, "examples": made}, ensure_ascii=False), encoding="utf-8"
    )
