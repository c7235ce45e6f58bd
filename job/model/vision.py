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
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_STAND = ("image_token_id", "video_token_id", "audio_token_id")  # in a config: tokens that the model replaces
_TILES = "do_image_splitting"  # of SmolVLM and Idefics 3, which make even a small image large, and cut it up
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


def blank() -> bytes:
    """An image on which there is nothing, as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Read:
    """A text as the model reads it: with the words that stand for images in the place of their placeholders."""

    ids: list[int]
    places: list[tuple[int, int]]
    """Of each token in the text that the model reads."""
    images: list[tuple[int, int, int]]
    """For each image: where its placeholder began and ended in the text, and how much longer the image's words are."""

    def moved(self, place: tuple[int, int]) -> tuple[int, int]:
        """Where what stood at a place of the text stands in what the model reads."""
        start, stop = (at + sum(more for _, end, more in self.images if end <= at) for at in place)
        return start, stop

    def shown(self) -> list[tuple[int, int]]:
        """Where the words that stand for images are."""
        found = []
        for start, end, more in self.images:
            began, _ = self.moved((start, start))
            found.append((began, began + end - start + more))
        return found


class Vision:
    """The processor of the base in a folder, with the tokenizer that is given."""

    def __init__(self, base: Path, words: "PreTrainedTokenizerBase", max_pixels: int | None) -> None:
        from transformers import AutoConfig

        self._max_pixels, self._words = max_pixels, words
        try:
            described = AutoConfig.from_pretrained(base, local_files_only=True)
            self._processor = _load(base, words, described)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as e:
            raise errors.ModelError(f"model.base: the image processor in {base} cannot be loaded: {e}") from e
        stand = [number for name in _STAND if isinstance(number := getattr(described, name, None), int)]
        marks = words.convert_ids_to_tokens(stand)
        self.reserved = [str(mark) for mark in marks if mark and mark != self.placeholder]
        """What stands for something that is seen or heard, and must not be in a text."""

    @property
    def placeholder(self) -> str:
        """What stands for an image in a text."""
        return str(self._processor.image_token)

    def read(self, text: str, images: Sequence[bytes]) -> Read:
        """The tokens of `text`, in which the `images` stand in their order.

        Raises `ValueError` if an image cannot be read, or stands where the processor takes none, and
        `errors.ModelError` if it does more to a text than to put words in the place of images.
        """
        made = self._made(
            text=[text], images=[[self._opened(image) for image in images]] if images else None,
            add_special_tokens=False, return_text_replacement_offsets=True,
        )  # fmt: skip
        whole, shifts, end = "", [], 0
        for each in (made.get("text_replacement_offsets") or [[]])[0]:
            start, stop = each["span"]
            whole += text[end:start] + each["replacement"]
            shifts.append((start, stop, len(each["replacement"]) - (stop - start)))
            end = stop
        read = self._words(whole + text[end:], add_special_tokens=False, return_offsets_mapping=True)
        if len(shifts) != len(images) or read["input_ids"] != list(made["input_ids"][0]):
            raise errors.ModelError(
                f"model.base: {self._name} does not tell what it does to a text with images, which is needed to find "
                "the trained tokens: use a base of another family"
            )
        return Read(read["input_ids"], read["offset_mapping"], shifts)

    def batch(
        self, texts: Sequence[str], images: Sequence[Sequence[bytes]], *, split: bool = True
    ) -> dict[str, "torch.Tensor"]:
        """What the model gets of several texts, filled up on the right to the longest.

        Images are not `split` into tiles if that is said, by the families that do so.
        """
        opened = [[self._opened(image) for image in each] for each in images]
        tiles = hasattr(self._processor.image_processor, _TILES)
        whole = {_TILES: False} if tiles and not split else {}
        made = self._made(
            text=list(texts), images=opened if any(opened) else None, add_special_tokens=False, padding=True,
            padding_side="right", return_tensors="pt", **whole,
        )  # fmt: skip
        return dict(made)

    @property
    def _name(self) -> str:
        return str(type(self._processor).__mro__[1].__name__)

    def _made(self, **given: Any) -> Any:  # noqa: ANN401 - transformers' kind of dict
        try:
            return self._processor(**given)
        except ValueError:
            raise
        except Exception as e:  # each family fails in its own way
            raise errors.ModelError(
                f"model.base: {self._name} fails ({type(e).__name__}: {e}): the files of the base do not fit together, "
                "or transformers cannot use them"
            ) from e

    def _opened(self, image: bytes) -> "Image.Image":
        from PIL import Image, ImageOps

        try:
            opened = _coloured(ImageOps.exif_transpose(Image.open(io.BytesIO(image))))
        except Exception as e:  # Pillow lets through what it meets in a broken file, struct.error and TypeError too
            raise ValueError(f"an image cannot be read: {e}") from e
        width, height = opened.size
        if self._max_pixels and width * height > self._max_pixels:
            scale = (self._max_pixels / (width * height)) ** 0.5
            opened = opened.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
        return opened


def _coloured(image: "Image.Image") -> "Image.Image":
    """In red, green and blue of 8 bits; what is transparent shows white, as in vLLM, whatever lies below."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, and what is black or white in it is not told: save it with 8")
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def _load(base: Path, words: "PreTrainedTokenizerBase", described: "PretrainedConfig") -> Any:  # noqa: ANN401 - each family has a class of its own
    """The processor, which takes no part for videos: those need torchvision, and nothing here is a video."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

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
