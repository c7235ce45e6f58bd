"""What a store can do: the small interface behind which S3, a folder and the Hugging Face Hub look alike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Advance = Callable[[int], None]  # told of every few bytes transferred; may raise to stop the transfer


@dataclass(frozen=True)
class Entry:
    """A file in a store: its key below the store's URL, its size in bytes, and what changes when its content does."""

    key: str
    size: int
    version: str


@dataclass(frozen=True)
class Blob:
    """A small object's bytes and the version that a conditional write must name."""

    data: bytes
    version: str


@dataclass(frozen=True)
class Seen:
    """What was downloaded: SHA-256 in hexadecimal, and by what of the store's own it was verified."""

    sha256: str
    verified_by: str


class Source(Protocol):
    """A store that can be read."""

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Every file whose key starts with `prefix`, sorted by key."""

    def download(self, entry: Entry, target: Path, advance: Advance) -> Seen:
        """Write the content of `entry` to `target` and check it against the store's own checksum.

        Raises `errors.StoreError` when what arrived is not what `entry` describes.
        """


class Store(Source, Protocol):
    """A store that can be written too. Every write is seen whole or not at all."""

    def read(self, key: str) -> Blob | None:
        """A small object, or None if there is none."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever was there."""

    def create(self, key: str, data: bytes) -> None:
        """Write a small object that must not exist yet; `errors.ConflictError` if it does with other content."""

    def replace(self, key: str, data: bytes, version: str) -> None:
        """Write a small object if it is still at `version`; `errors.ConflictError` if somebody was faster."""

    def upload(self, path: Path, key: str, advance: Advance) -> None:
        """Copy the local file at `path`, of any size, to `key`."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
