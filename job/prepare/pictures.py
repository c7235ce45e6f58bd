"""The images that records name, as bytes: found in the folder that they lie in, and nowhere else."""

import base64
import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from job.inputs import DataFile, is_image
from job.prepare.formats import Example
from job.prepare.turns import INLINE, WORD, BadRecordError

_OTHERS = ("video", "videos", "audio", "audios")
_ABSENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_SHOWN = 100  # characters
_NAME = 1024  # characters: what is longer is no name, but an image as base64


def check(record: Mapping[str, Any], example: Example) -> None:
    """Raise `BadRecordError` if a record has something to see or hear that `example`, which was made of it, lacks."""
    other = [key for key in _OTHERS if record.get(key)]
    if other:
        raise BadRecordError(f"has {other[0]}, and of what is no text only images can be used")
    if not example.images and any(WORD in each["content"] for each in example.messages if each["role"] == "user"):
        raise BadRecordError(f"has {WORD} in a question, and names no image (in image or images)")


def opened(example: Example, file: DataFile) -> Example:
    """`example` with what its images are instead of where they lie; raises `BadRecordError` if one is not there."""
    if not example.images:
        return example
    return replace(example, images=tuple(_read(image, file) for image in example.images))


def _read(image: str | bytes, file: DataFile) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.startswith(INLINE) or len(image) > _NAME:
        try:
            return base64.b64decode("".join(image.rpartition(",")[2].split()), validate=True)
        except ValueError as e:
            raise BadRecordError(f"an image in the record itself ({_short(image)}) is not base64: {e}") from e
    if file.images is None:
        raise BadRecordError(
            f"names the image {_short(image)}, and there are no images beside the file: set data.images to the folder "
            "in which they lie"
        )
    name = _inner(image, file.images.url)
    if not is_image(name):
        raise BadRecordError(
            f"the image {_short(image)} is not called as images are (.jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, "
            ".tiff, and nowhere a name that begins with . or _)"
        )
    try:
        return (file.images.path / name).read_bytes()
    except (OSError, ValueError) as e:  # the latter of names that no file can have
        if isinstance(e, OSError) and e.errno not in _ABSENT:
            raise
        raise BadRecordError(f"the image {_short(image)} is not in {file.images.url}") from None


def _inner(image: str, url: str) -> str:
    """The path of an image in the folder at `url`."""
    inner = image
    if "://" in image:
        if not image.startswith(f"{url}/"):
            raise BadRecordError(
                f"the image {_short(image)} is not below {url}: put it there, or set data.images to the folder that "
                "holds all of them"
            )
        inner = image.removeprefix(f"{url}/")
        inner = unquote(inner) if url.startswith("file://") else inner
    if Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise BadRecordError(f"the image {_short(image)} leads out of {url}: name it by its path below that")
    return Path(inner).as_posix()


def _short(image: str) -> str:
    return image if len(image) <= _SHOWN else f"{image[:_SHOWN]}…"
