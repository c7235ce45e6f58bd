"""What a store can do: the small interface behind which S3, a folder and the Hugging Face Hub look alike.

Another store is one file that does this much; parts, retries, hashing and manifests are not its business.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from job.storage.checksum import Expected

Check = Callable[[], None]  # called often during a transfer; raises to stop it
Block = bytes | memoryview
ANY = "*"  # in place of a version: whatever is there


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


class Source(Protocol):
    """A store that can be read."""

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Every file whose key starts with `prefix`, sorted by key."""

    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Block]:
        """The bytes from `start` to before `stop` as they arrive, in one try.

        Raises `errors.StoreError` when another try may succeed, and `errors.ChangedError` when the content is no longer
        the one that `entry` describes, or gone: two versions are never mixed. May end early.
        """

    def checksum(self, entry: Entry) -> Expected | None:
        """What the store itself knows of the content of `entry`; None if it keeps no checksum."""


class Upload(Protocol):
    """A file on its way into a store. Nothing is seen of it before `finish`, and all of it after."""

    def send(self, number: int, data: bytes, check: Check) -> None:
        """Bring part `number` (from 0; all but the last of `Store.part_size` bytes) there, in one try.

        A part that an earlier upload of the same file left there, and that is equal, is not sent again.
        """

    def finish(self) -> None:
        """Put the parts together under the key. May be called again when it failed."""

    def abort(self) -> None:
        """Give up what was sent, so that nothing of it is left in the store."""

    def leave(self) -> None:
        """Stop here; keep what was sent only if a later upload to the same key can go on with it."""


class Store(Source, Protocol):
    """A store that can be written too. Every write is seen whole or not at all."""

    def read(self, key: str) -> Blob | None:
        """A small object, or None if there is none."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever was there."""

    def create(self, key: str, data: bytes) -> None:
        """Write a small object that must not exist yet; `errors.ConflictError` if it does. One caller wins."""

    def replace(self, key: str, data: bytes, version: str) -> None:
        """Write a small object if it is still at `version`; `errors.ConflictError` if somebody was faster."""

    def part_size(self, size: int) -> int:
        """Bytes of each part of a file of `size` bytes but the last."""

    def upload(self, key: str, size: int, over: str | None) -> Upload:
        """Begin, or go on with, the upload of a file of `size` bytes to `key`.

        It becomes the file only if the version there is `over` (`Entry.version`; None if there must be none), and else
        ends with `errors.ConflictError`.
        """

    def sweep(self, prefix: str) -> None:
        """Give up every unfinished upload to keys that start with `prefix`."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if it is not there."""
