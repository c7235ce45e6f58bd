"""A folder as a store: the default for one machine, and for clusters that share a file system.

Relies on ``rename`` and ``link`` being atomic (POSIX: local file systems, NFS, Lustre, GPFS), and for `replace` on
``flock`` being seen by every machine (NFS: since Linux 2.6.12; Lustre: mounted with ``flock``) and on files being
looked up anew when opened (close-to-open consistency: not mounted with ``nocto``).
"""

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from job import errors, manifest
from job.storage.store import ANY, Blob, Block, Check, Entry, Upload

_PRIVATE = ".store"  # temporary files and the lock, below the root
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 18
_PART = 16 << 20
_TRIES = 100  # to put a file into a folder that others remove


class Folder:
    """The store at ``file:///root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def list(self, prefix: str = "") -> list[Entry]:
        entries = []
        above, _, begin = prefix.rpartition("/")
        top = self.root / above
        for folder, below, names in os.walk(top, onerror=_unless_gone):
            if folder == str(top):  # what does not begin so may be a whole home directory, or closed to us
                below[:] = [name for name in below if name.startswith(begin)]
            for path in (Path(folder) / name for name in names):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not key.startswith(f"{_PRIVATE}/") and path.is_file():
                    with contextlib.suppress(FileNotFoundError):  # somebody deleted it just now
                        entries.append(self._entry(path, key))
        return sorted(entries, key=lambda e: e.key)

    def path(self, entry: Entry) -> Path:
        """Where `entry` lies, for readers that need no copy."""
        return self.root / entry.key

    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Block]:
        with self._open_entry(entry) as file:
            self._check_version(file, entry)
            file.seek(start)
            while start < stop and (block := file.read(min(_BLOCK, stop - start))):
                yield block
                start += len(block)
            self._check_version(file, entry)  # a file that is written in place is a mixture

    def checksum(self, entry: Entry) -> None:
        """A file system keeps none."""

    def read(self, key: str) -> Blob | None:
        try:
            data = (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Blob(data, manifest.sha256_of(data))

    def put(self, key: str, data: bytes) -> None:
        with self._temporary() as temporary:
            _write(temporary, data)
            _into_place(temporary, self.root / key, temporary.rename)

    def create(self, key: str, data: bytes) -> None:
        with self._temporary() as temporary:
            _write(temporary, data)
            try:  # unlike rename, link refuses an existing name
                _into_place(temporary, self.root / key, lambda target: os.link(temporary, target))
            except FileExistsError as e:
                # Over NFS a link whose reply was lost is tried again and finds itself: link(2), open(2).
                if not temporary.samefile(self.root / key):
                    raise errors.ConflictError(f"{self.url}/{key} exists already") from e
            except OSError as e:
                raise _unable(e, self.root, "hard links") from e

    def replace(self, key: str, data: bytes, version: str) -> None:
        with self._temporary() as temporary, self._locked():
            there = self.read(key)
            if there is None or there.version != version:
                raise errors.ConflictError(f"{self.url}/{key} was changed by somebody else")
            _write(temporary, data)
            _into_place(temporary, self.root / key, temporary.rename)

    def part_size(self, _size: int) -> int:
        return _PART

    def upload(self, key: str, size: int, over: str | None) -> Upload:
        temporary = self._part()

        def become() -> None:
            with self._locked():
                there = self._version(key)
                if over not in (ANY, there):
                    raise errors.ConflictError(f"{self.url}/{key} was changed by somebody else")
                _into_place(temporary, self.root / key, temporary.rename)

        return _FolderUpload(temporary, size, become)

    def sweep(self, prefix: str) -> None:
        """Nothing is known of unfinished uploads but their age: what killed writers left is swept after a day."""

    def delete(self, key: str) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the parent is not empty, or is gone already
            while path.parent != self.root:
                path = path.parent
                path.rmdir()

    def _open_entry(self, entry: Entry) -> BinaryIO:
        try:
            return self.path(entry).open("rb")
        except (FileNotFoundError, NotADirectoryError) as e:
            what = f"{self.url}/{entry.key} was removed since it was listed"
            raise errors.ChangedError(f"{what}; start again") from e

    def _check_version(self, file: BinaryIO, entry: Entry) -> None:
        """Raise `errors.ChangedError` if the open `file` is not what `entry` describes."""
        if _describe_file(os.fstat(file.fileno()), entry.key) != entry:
            what = f"{self.url}/{entry.key} changed since it was listed"
            raise errors.ChangedError(f"{what}; start again")

    @staticmethod
    def _entry(path: Path, key: str) -> Entry:
        return _describe_file(path.stat(), key)

    def _version(self, key: str) -> str | None:
        try:
            return self._entry(self.root / key, key).version
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / _PRIVATE / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as e:
                raise _unable(e, self.root, "file locks") from e
            yield

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        temporary = self._part()
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _part(self) -> Path:
        """A name on the same file system; what killed writers left there is swept after a day."""
        private = self.root / _PRIVATE
        private.mkdir(parents=True, exist_ok=True)
        for left in private.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()
        return private / f"{uuid.uuid4().hex}.part"


class _FolderUpload:
    """A file that is written beside the store's files, to `become` one of them when it is whole."""

    def __init__(self, temporary: Path, size: int, become: Callable[[], None]) -> None:
        self._temporary, self._size, self._become = temporary, size, become
        self._temporary.touch()

    def send(self, number: int, data: bytes, check: Check) -> None:
        check()
        with self._temporary.open("r+b") as file:
            file.seek(number * _PART)
            file.write(data)

    def finish(self) -> None:
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._become()

    def abort(self) -> None:
        self._temporary.unlink(missing_ok=True)

    leave = abort


def _describe_file(seen: os.stat_result, key: str) -> Entry:
    return Entry(key, seen.st_size, f"{seen.st_mtime_ns}-{seen.st_ino}")


def _into_place(temporary: Path, target: Path, move: Callable[[Path], object]) -> None:
    """Give `temporary` its name by `move`, in a folder that somebody's `delete` may just have removed as empty."""
    for left in reversed(range(_TRIES)):
        try:
            with contextlib.suppress(FileExistsError):  # so says mkdir also when the folder goes while it looks
                target.parent.mkdir(parents=True, exist_ok=True)
            move(target)
        except FileNotFoundError:
            if not left or not temporary.exists():
                raise
        else:
            return


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _unable(error: OSError, root: Path, what: str) -> errors.JobError | OSError:
    """A file system without what the folder store relies on, such as a bucket that is mounted as a folder."""
    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EMLINK):
        return error
    return errors.UnsupportedError(
        f"{root}: the file system has no {what} ({error.strerror}); use a directory on another one, or an s3:// URL"
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
