"""A safetensors file by its parts: what it holds, any rows of a tensor, and a new one written from its beginning.

The format's own library maps whole files, which counts as memory where that is limited, and writes only what is in
memory whole. The format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job import errors

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH = 8  # bytes before the header that tell how long it is
_ALIGNED = 8  # bytes: the header is filled up, so that tensors lie where processors like them
_MOST = 100_000_000  # bytes of a header, by the format


@dataclass(frozen=True)
class Outline:
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many there are along the first dimension; 1 of a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def row(self) -> int:
        """Numbers in each of them."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """The file at `path`; raises `errors.ModelError` if it is no safetensors file, or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._begin, told = _header(path)
            told.pop(_METADATA, None)
            self.tensors: Mapping[str, Outline] = {
                name: Outline(_DTYPES[each["dtype"]], tuple(each["shape"])) for name, each in told.items()
            }
            self._places = {name: int(each["data_offsets"][0]) for name, each in told.items()}
            ends = {name: int(each["data_offsets"][1]) for name, each in told.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            raise errors.ModelError(f"{path} is no safetensors file ({type(e).__name__}: {e}): bring it again") from e
        odd = [name for name, each in self.tensors.items() if ends[name] - self._places[name] != each.size]
        if odd or path.stat().st_size != self._begin + max(ends.values(), default=0):
            raise errors.ModelError(
                f"{path} has {path.stat().st_size} bytes, and its header tells of others"
                f"{f' for {odd[0]}' if odd else ''}: bring it again"
            )

    def place(self, name: str) -> int:
        """Where in the file it begins: to read several in their order is faster."""
        return self._places[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor of that name."""
        return self.rows(name, 0, self.tensors[name].rows).view(self.tensors[name].shape)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Its rows from `first` to before `last`, [last - first, …]."""
        whole = self.tensors[name]
        if not 0 <= first <= last <= whole.rows:  # behind it in the file lie the numbers of another
            raise errors.ModelError(f"{name} in {self.path} has {whole.rows} rows, not those from {first} to {last}")
        width = whole.row * whole.dtype.itemsize
        held = torch.empty((last - first) * width, dtype=torch.uint8)
        begin, view = self._begin + self._places[name] + first * width, memoryview(held.numpy())  # type: ignore[arg-type]  # numpy's stubs for Python 3.11
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            while view:
                if not (count := file.readinto(view)):
                    raise errors.ModelError(f"{self.path} has become shorter while it was read: bring it again")
                view = view[count:]
        return held.view(whole.dtype).view(last - first, *whole.shape[1:])


def write(path: Path, outlines: Mapping[str, Outline], parts: Iterable[torch.Tensor]) -> str:
    """Write a file of the tensors in `outlines`, one after another, from `parts` of them in the same order.

    Returns the SHA-256 of the file, in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        size = 0
        for view in _blocks(outlines, parts):
            digest.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]  # noqa: PLW2901 - what is left of it
    if size != len(_described(outlines)) + sum(outline.size for outline in outlines.values()):
        raise AssertionError(f"{path} was given other tensors than it was told of")
    return digest.hexdigest()


def _blocks(outlines: Mapping[str, Outline], parts: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(_described(outlines))
    for part in parts:
        yield memoryview(part.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # as above


def _described(outlines: Mapping[str, Outline]) -> bytes:
    told: dict[str, object] = {_METADATA: {"format": "pt"}}
    at = 0
    for name, outline in outlines.items():
        told[name] = {
            "dtype": _NAMES[outline.dtype],
            "shape": list(outline.shape),
            "data_offsets": [at, at + outline.size],
        }
        at += outline.size
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(_LENGTH, "little") + text


def _header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors begin, and what is told of them."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 0 < length <= _MOST:
            raise ValueError(f"a header of {length} bytes")
        return _LENGTH + length, dict(json.loads(file.read(length)))
