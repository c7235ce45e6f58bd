"""The examples as the program that verifies gets them: with what the model sees, or cut short."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from job import config
from job.examine.look import Models
from job.model import tokenizer, vision
from job.model.tokenizer import IGNORED


def shorten(example: dict[str, Any], positions: int) -> dict[str, Any]:
    """Return an example that ends behind so many trained positions; no later token changes their logits.

    One with images stays whole: its later tokens may stand for some of them.
    """
    trained = [place for place, label in enumerate(example["labels"]) if place and label != IGNORED]
    if example.get("seen") or len(trained) <= positions:
        return example
    end = trained[positions - 1] + 1
    return {**example, "ids": example["ids"][:end], "labels": example["labels"][:end]}


def add_pixels(
    examples: Sequence[dict[str, Any]],
    models: Models,
    settings: config.Config | config.Merging,
    scratch: Path,
) -> None:
    """Put what the model gets of an example's images into a file, whose path is added to it."""
    trusted = settings.model.trust_remote_code
    words = tokenizer.trained_with(models.adapter, models.base, trust_remote_code=trusted)
    tokenizer.pad(words, tokenizer.rows(models.base, trust_remote_code=trusted))
    pixels = settings.data.max_pixels if isinstance(settings, config.Config) else None
    seeing = vision.Vision(models.base, words, pixels)
    for number, each in enumerate(examples):
        if "seen" in each:  # it is read and asked
            continue
        made = seeing.batch([each["text"]], [[base64.b64decode(image) for image in each["images"]]])
        ids, count = made.pop("input_ids"), len(each["ids"])
        made.pop("attention_mask")
        held = {}
        for name, value in made.items():
            of_tokens = value.shape == ids.shape
            kind, cut = ("token", value[:, :count]) if of_tokens else ("image", value)
            held[f"{kind}.{name}"] = cut.contiguous()
        each["seen"] = str(scratch / f"seen-{number}.safetensors")
        save_file(held, each["seen"])
