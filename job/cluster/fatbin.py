"""Which GPUs a CUDA library has code for, read from the file itself.

Loading it would take seconds and a driver that works.

nvcc puts its output into the section `.nv_fatbin` of a library: one "fat binary" after another,
each with an image for every architecture. Layout of the headers:
github.com/n-eiling/cuda-fatbin-decompression, checked against torch 2.13.0+cu130 and bitsandbytes
0.50.2.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = 0xBA55ED50
_BINARY = struct.Struct("<IHHQ")  # magic, version, bytes of this header, of the images after it
# kind, version, bytes of this header, of the image, four fields more, architecture
_IMAGE = struct.Struct("<HHIQIIHHI")
_PTX, _CUBIN = 1, 2  # kinds of images: text for any newer GPU, and code for one architecture

Capability = tuple[int, int]


@dataclass(frozen=True)
class Code:
    """Compute capabilities that a library has code for, and PTX, which newer GPUs compile."""

    binary: frozenset[Capability]
    ptx: frozenset[Capability]

    def runs_on(self, gpu: Capability) -> bool:
        """Return whether such a GPU can run the library; true if nothing is known of the library.

        Code runs on its own and higher minor versions of the same major version, PTX on every newer
        version (CUDA C++ Programming Guide, sections "Binary Compatibility" and "PTX
        Compatibility").
        """
        if not self.binary and not self.ptx:
            return True
        major, minor = gpu
        return any(major == code[0] and minor >= code[1] for code in self.binary) or any(
            gpu >= code for code in self.ptx
        )

    def __str__(self) -> str:
        binary = [f"{major}.{minor}" for major, minor in sorted(self.binary)]
        ptx = [f"{major}.{minor} and newer" for major, minor in sorted(self.ptx)]
        return ", ".join([*binary, *ptx])


def read_code(library: Path) -> Code:
    """Return which GPUs the library has code for; nothing if its layout is not the known one.

    An architecture that fewer than half of the fat binaries have does not count: a library may have
    a few kernels for features of a single GPU.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        binaries = [Counter(set(images)) for images in _fat_binaries(data)]
    total: Counter[tuple[int, int]] = sum(binaries, Counter())
    common = [image for image, count in total.items() if 2 * count >= len(binaries)]
    return Code(
        frozenset(divmod(architecture, 10) for kind, architecture in common if kind == _CUBIN),
        frozenset(divmod(architecture, 10) for kind, architecture in common if kind == _PTX),
    )


def _fat_binaries(data: mmap.mmap) -> Iterator[list[tuple[int, int]]]:
    """Yield the kinds and architectures of the images in each fat binary."""
    for start, size in _sections(data, b".nv_fatbin"):
        place = start
        while place + _BINARY.size <= start + size:
            magic, _, header, length = _BINARY.unpack_from(data, place)
            if magic != _MAGIC:
                place = data.find(_MAGIC.to_bytes(4, "little"), place + 1, start + size)
                if place < 0:
                    return
                continue
            end = min(place + header + length, len(data))
            yield list(_images(data, place + header, end))
            place = end


def _images(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int]]:
    while place + _IMAGE.size <= end:
        kind, _, header, length, *_, architecture = _IMAGE.unpack_from(data, place)
        if not header + length:
            return
        yield kind, architecture
        place += header + length


def _sections(data: mmap.mmap, name: bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the sections called `name` in a 64-bit ELF file (System V ABI, 4)."""
    if data[:5] != b"\x7fELF\x02":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    (strings,) = struct.unpack_from("<Q", data, table + names * entry + 0x18)
    for number in range(count):
        header = table + number * entry
        (called,) = struct.unpack_from("<I", data, header)
        start = strings + called
        if data[start : start + len(name) + 1] == name + b"\0":
            offset, size = struct.unpack_from("<QQ", data, header + 0x18)
            yield offset, size
