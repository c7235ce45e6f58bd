"""What a base that sees images makes of them: the tokens that stand for an image in a text, and what the model gets.

It is the base's own processor, as transformers loads it, but for videos, which the job does not read.
"""

import inspect
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import errors

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

_PARTS = "vision_config"  # of the config.json of a model that sees images
_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")


def sees(described: Mapping[str, Any]) -> bool:
    """Whether the base with the config.json `described` takes images."""
    return isinstance(described.get(_PARTS), dict)


def copy(base: Path, target: Path) -> None:
    """Put what tells how `base` sees images into the folder `target`, where a model that was made of it lies."""
    for name in _FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)


@dataclass(frozen=True)
class Read:
    """A text as the model reads it: token ids, and for each where it stands in the text, the images' in their place."""

    ids: list[int]
    places: list[tuple[int, int]]
    images: list[tuple[int, int, int]]
    """For each image: where its placeholder began and ended in the text, and how much longer the image's text is."""


class Vision:
    """The processor of the base in a folder, with the tokenizer that is given."""

    def __init__(self, base: Path, words: "PreTrainedTokenizerBase", max_pixels: int | None) -> None:
        self._max_pixels, self._words = max_pixels, words
        try:
            self._processor = _load(base, words)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as e:
            raise errors.ModelError(f"model.base: the image processor in {base} cannot be loaded: {e}") from e

    @property
    def placeholder(self) -> str:
        """What stands for an image in a text."""
        return str(self._processor.image_token)

    def read(self, text: str, images: Sequence[bytes]) -> Read:
        """The tokens of `text`, in which the `images` stand in their order.

        Raises `ValueError` if an image cannot be read, or there are more or fewer of them than places for them.
        """
        made = self._processor(
            text=[text], images=[[self._opened(image) for image in images]] if images else None,
            add_special_tokens=False, return_offsets_mapping=True, return_text_replacement_offsets=True,
        )  # fmt: skip
        replaced = (made.get("text_replacement_offsets") or [[]])[0]
        if len(replaced) != len(images):
            raise errors.ModelError(
                f"model.base: {type(self._processor).__mro__[1].__name__} does not tell where images are in a text, "
                "which is needed to find the trained tokens: train this base on text only, or use another one"
            )
        shifts, before = [], 0
        for each in replaced:
            gained = each["new_span"][1] - each["span"][1]
            shifts.append((*each["span"], gained - before))
            before = gained
        places = [(int(start), int(stop)) for start, stop in made["offset_mapping"][0]]
        return Read(list(made["input_ids"][0]), places, shifts)

    def batch(self, texts: Sequence[str], images: Sequence[Sequence[bytes]]) -> dict[str, "torch.Tensor"]:
        """What the model gets of several texts, filled up on the right to the longest."""
        if self._words.pad_token is None:
            self._words.pad_token = self._words.eos_token
        opened = [[self._opened(image) for image in each] for each in images]
        made = self._processor(
            text=list(texts), images=opened if any(opened) else None, add_special_tokens=False, padding=True,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        return dict(made)

    def _opened(self, image: bytes) -> "Image.Image":
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            opened = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"an image cannot be read: {e}") from e
        width, height = opened.size
        if self._max_pixels and width * height > self._max_pixels:
            scale = (self._max_pixels / (width * height)) ** 0.5
            opened = opened.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
        return opened


def _load(base: Path, words: "PreTrainedTokenizerBase") -> Any:  # noqa: ANN401 - each family has a class of its own
    """The processor, which takes no part for videos: those need torchvision, and nothing here is a video."""
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    described = AutoConfig.from_pretrained(base, local_files_only=True)
    known: Any = PROCESSOR_MAPPING.get(type(described), None)
    if known is None:
        raise ValueError(f"transformers has no processor for {described.model_type}")
    config = base / "processor_config.json"
    told: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}

    class Seeing(known):  # type: ignore[misc]  # a class that is known by now only
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> Any:  # noqa: ANN401
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    parts: dict[str, Any] = dict.fromkeys(known.get_attributes())
    parts |= {
        "tokenizer": words,
        "image_processor": AutoImageProcessor.from_pretrained(base, backend="pil", local_files_only=True),  # type: ignore[no-untyped-call]
    }
    further = inspect.signature(known.__init__).parameters.keys() - parts.keys() - {"chat_template"}
    return Seeing(**parts, **{key: told[key] for key in further & told.keys()})
