"""Is what arrived what the store holds? Checks a file against the checksum that S3 itself keeps for it.

AWS documentation, "Checking object integrity": an ETag is the MD5 of the object, or for a multipart upload the MD5 of
its parts' MD5s, unless the object is encrypted with a key of the customer's; newer uploads carry CRCs or SHA sums.
"""

import base64
import hashlib
import mmap
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from awscrt import checksums

_BLOCK = 1 << 18  # larger ones leave the processor's cache and are paid for twice
Buffer = bytes | memoryview | mmap.mmap
_MD5 = re.compile(r"^[0-9a-f]{32}$")
_MULTIPART = re.compile(r"^([0-9a-f]{32})-([1-9][0-9]*)$")


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Expected:
    """The store's own checksum: which, its value in hexadecimal, and how to compute it."""

    name: str
    value: str
    start: Callable[[], Digest]


class _Crc:
    def __init__(self, step: Callable[[Buffer, int], int], width: int) -> None:
        self._step, self._width, self._value = step, width, 0

    def update(self, data: Buffer, /) -> None:
        self._value = self._step(data, self._value)

    def hexdigest(self) -> str:
        return self._value.to_bytes(self._width, "big").hex()


class _MultipartMd5:
    """MD5 of the MD5s of parts of equal size, the last one shorter."""

    def __init__(self, part_size: int) -> None:
        self._size, self._left = part_size, part_size
        self._part, self._all = hashlib.md5(usedforsecurity=False), hashlib.md5(usedforsecurity=False)

    def update(self, data: Buffer, /) -> None:
        while data:
            now, data = data[: self._left], data[self._left :]
            self._part.update(now)
            self._left -= len(now)
            if not self._left:
                self._close()

    def hexdigest(self) -> str:
        if self._left != self._size:
            self._close()
        return self._all.hexdigest()

    def _close(self) -> None:
        self._all.update(self._part.digest())
        self._part, self._left = hashlib.md5(usedforsecurity=False), self._size


_KEPT: dict[str, Callable[[], Digest]] = {
    "SHA256": hashlib.sha256,
    "CRC64NVME": lambda: _Crc(checksums.crc64nvme, 8),
    "CRC32C": lambda: _Crc(checksums.crc32c, 4),
    "CRC32": lambda: _Crc(zlib.crc32, 4),
    "SHA1": lambda: hashlib.sha1(usedforsecurity=False),
}


def expected(head: Mapping[str, Any], part_size: int | None) -> Expected | None:
    """The strongest checksum of the whole object in the reply to HeadObject; None if the store keeps none.

    `part_size` is the size in bytes of a multipart object's first part, if known.
    """
    if head.get("ChecksumType") != "COMPOSITE":
        for name, start in _KEPT.items():
            value = str(head.get(f"Checksum{name}") or "")
            if value and "-" not in value:  # with a number of parts it is one of their checksums
                return Expected(name, base64.b64decode(value).hex(), start)
    if str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or head.get("SSECustomerAlgorithm"):
        return None
    etag = str(head.get("ETag", "")).strip('"')
    if _MD5.match(etag):
        return Expected("MD5", etag, lambda: hashlib.md5(usedforsecurity=False))
    multipart = _MULTIPART.match(etag)
    if multipart and part_size and -(-int(head["ContentLength"]) // part_size) == int(multipart[2]):
        return Expected("MD5 of parts", multipart[1], lambda: _MultipartMd5(part_size))
    return None


class Running:
    """SHA-256 of what passes by, and the store's own checksum if it keeps one."""

    def __init__(self, wanted: Expected | None) -> None:
        self._wanted, self._sha256 = wanted, hashlib.sha256()
        self._theirs = wanted.start() if wanted else None

    def update(self, data: Buffer, /) -> None:
        self._sha256.update(data)
        if self._theirs:
            self._theirs.update(data)

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def verified_by(self) -> str:
        """By which checksum of the store's own; ``size`` if it keeps none."""
        return self._wanted.name if self._wanted else "size"

    def mismatch(self) -> str | None:
        """How the content differs from what the store says; None if it does not."""
        if self._wanted is None or self._theirs is None or self._theirs.hexdigest() == self._wanted.value:
            return None
        return f"{self._wanted.name} is {self._theirs.hexdigest()}, the store says {self._wanted.value}"


def of_file(path: Path, wanted: Expected | None) -> Running:
    """What `Running` says of the whole file at `path`."""
    running = Running(wanted)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            running.update(block)
    return running


def crc(data: Buffer, before: int = 0) -> int:
    """CRC-64/NVME of `data`, going on from `before`."""
    return int(checksums.crc64nvme(data, before))


def crc_text(value: int) -> str:
    """The form in which S3 exchanges a CRC-64/NVME."""
    return base64.b64encode(value.to_bytes(8, "big")).decode()
