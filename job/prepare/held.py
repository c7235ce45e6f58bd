"""The examples that are kept to look at the result with: from all over a split."""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job import paths
from job.model.tokenizer import IGNORED
from job.prepare import select
from job.prepare.tokens import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANY, _LONGEST = 32, 2048  # examples, and tokens of each
_HEAVY = 8 * 10**6  # bytes of images, of all of them


def out(folder: Path, split: str, count: int, words: "PreTrainedTokenizerBase", placeholder: str | None = None) -> None:
    """Write some of the `count` examples of `split` into a file of their own in the `folder`, as tokens and as text.

    The `placeholder` stands for an image in a text, if the base sees any.
    """
    which = np.zeros(count, dtype=bool)
    which[np.linspace(0, count - 1, min(count, _MANY)).astype(int)] = True
    made = list(_kept(select.rows(folder / f"{split}.arrow", which, _MANY), words, placeholder))
    (folder / paths.HELD_OUT).write_text(
        json.dumps({"split": split, "examples": made}, ensure_ascii=False), encoding="utf-8"
    )


def _kept(rows: Sequence[Row], words: "PreTrainedTokenizerBase", placeholder: str | None) -> Iterator[dict[str, Any]]:
    heavy = 0
    for row in rows:
        ids, labels = list(row.input_ids[:_LONGEST]), list(row.labels[:_LONGEST])
        learned = [place for place, label in enumerate(labels) if label != IGNORED and place]
        heavy += sum(map(len, row.images))
        if not learned or (row.images and (len(row.input_ids) > _LONGEST or heavy > _HEAVY)):
            continue
        prompt, rest = words.decode(ids[: learned[0]]), words.decode(ids[learned[0] :])
        seen: dict[str, Any] = {}
        if row.images and placeholder:
            prompt = re.sub(rf"(?:{re.escape(placeholder)}){{2,}}", placeholder, str(prompt))
            seen = {"text": row.text, "images": [base64.b64encode(image).decode("ascii") for image in row.images]}
        yield {
            "ids": ids,
            "labels": labels,
            # An answer is asked for only where all that is to be seen comes before it.
            "asked": 0 if seen and placeholder and placeholder in rest else learned[0],
            "prompt": prompt,
            "answer": words.decode(ids[learned[0] : _end(labels, learned[0])]),
            **seen,
        }


def _end(labels: Sequence[int], start: int) -> int:
    """Where the answer that begins at `start` ends, in a conversation with several."""
    return next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
