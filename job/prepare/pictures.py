"""The images that records name, as bytes: found in the folder that they lie in, and nowhere else."""

import base64
import binascii
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from job.inputs import DataFile
from job.prepare.formats import Example
from job.prepare.turns import BadRecordError

_INLINE = "data:image/"
_SHOWN = 100  # characters


def opened(example: Example, file: DataFile) -> Example:
    """`example` with what its images are instead of where they lie; raises `BadRecordError` if one is not there."""
    if not example.images:
        return example
    return replace(example, images=tuple(_read(image, file) for image in example.images))


def _read(image: str | bytes, file: DataFile) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.startswith(_INLINE):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except binascii.Error as e:
            raise BadRecordError(f"an image in the record itself is not base64: {e}") from e
    if file.images is None:
        raise BadRecordError(
            f"names the image {_short(image)}, and there are no images beside the file: set data.images to the folder "
            "in which they lie"
        )
    path = _path(image, file.images.url, file.images.path)
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadRecordError(f"the image {_short(image)} is not in {file.images.url}") from None


def _path(image: str, url: str, folder: Path) -> Path:
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
    return folder / inner


def _short(image: str) -> str:
    return image if len(image) <= _SHOWN else f"{image[:_SHOWN]}…"
