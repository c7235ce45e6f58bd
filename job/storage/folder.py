"""A folder as a store: the default for one machine, and for clusters that share a file system.

Relies on POSIX ``rename`` and ``link`` being atomic (local file systems, NFS, Lustre), and for `replace` on ``flock``.
"""

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from job import errors, manifest
from job.storage.store import Advance, Blob, Entry, Seen

_PRIVATE = ".store"  # temporary files and the lock, below the root
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20


class Folder:
    """The store at ``file:///root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def list(self, prefix: str = "") -> list[Entry]:
        base = self.root / prefix.rpartition("/")[0]
        found = ((p, p.relative_to(self.root).as_posix()) for p in base.rglob("*") if p.is_file())
        entries = (
            self._entry(p, key) for p, key in found if key.startswith(prefix) and not key.startswith(f"{_PRIVATE}/")
        )
        return sorted(entries, key=lambda e: e.key)

    def path(self, entry: Entry) -> Path:
        """Where `entry` lies, for readers that need no copy."""
        return self.root / entry.key

    def download(self, entry: Entry, target: Path, advance: Advance) -> Seen:
        with self.path(entry).open("rb") as source, target.open("wb") as copy:
            digest = hashlib.sha256()
            while block := source.read(_BLOCK):
                digest.update(block)
                copy.write(block)
                advance(len(block))
            copied = copy.tell()
        if copied != entry.size:
            raise errors.DamagedError(
                f"{self.url}/{entry.key} had {entry.size} bytes when listed and {copied} when read: it "
                "changed meanwhile"
            )
        return Seen(digest.hexdigest(), "size")

    def read(self, key: str) -> Blob | None:
        try:
            data = (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Blob(data, manifest.sha256_of(data))

    def put(self, key: str, data: bytes) -> None:
        with self._temporary(key) as temporary:
            _write(temporary, data)
            temporary.rename(self.root / key)

    def create(self, key: str, data: bytes) -> None:
        with self._temporary(key) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, self.root / key)  # unlike rename, link refuses an existing name
            except FileExistsError as e:
                there = self.read(key)
                if there is None or there.data != data:
                    raise errors.ConflictError(f"{self.url}/{key} exists already") from e

    def replace(self, key: str, data: bytes, version: str) -> None:
        with self._temporary(key) as temporary, (self.root / _PRIVATE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = self.read(key)
            if there is None or there.version != version:
                raise errors.ConflictError(f"{self.url}/{key} was changed by somebody else")
            _write(temporary, data)
            temporary.rename(self.root / key)

    def upload(self, path: Path, key: str, advance: Advance) -> None:
        with self._temporary(key) as temporary:
            with path.open("rb") as source, temporary.open("wb") as copy:
                while block := source.read(_BLOCK):
                    copy.write(block)
                    advance(len(block))
                copy.flush()
                os.fsync(copy.fileno())
            temporary.rename(self.root / key)

    def delete(self, key: str) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the parent is not empty, or is gone already
            while path.parent != self.root:
                path = path.parent
                path.rmdir()

    @staticmethod
    def _entry(path: Path, key: str) -> Entry:
        seen = path.stat()
        return Entry(key, seen.st_size, f"{seen.st_mtime_ns}-{seen.st_ino}")

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """A name on the same file system; what killed writers left there is swept after a day."""
        private = self.root / _PRIVATE
        private.mkdir(parents=True, exist_ok=True)
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        for left in private.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()
        temporary = private / f"{uuid.uuid4().hex}.part"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
