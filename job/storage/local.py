"""Directories on the local disk that several jobs share: who works on one, who uses one, and is it still whole.

Relies on ``flock``, which the kernel releases when its holder is killed. On network file systems it must be enabled
(NFS: the default since Linux 2.6.12; Lustre: the mount option ``flock``).
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from job import log, manifest
from job.manifest import Manifest

_POLL_SECONDS = 0.2
_SAY_SECONDS = 60.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_CHECKED = "read back after a restart"


class Place:
    """The directory `path`, locked; nobody else changes it."""

    def __init__(self, path: Path, mark: Path) -> None:
        self.path, self._mark = path, mark

    def sealed(self) -> Manifest | None:
        """The manifest of the directory if all of it is there; None otherwise.

        Sizes say so as long as the machine runs that wrote it. Nothing is flushed when a directory is made, because a
        disk can be much slower than the network; so after a restart of the machine, which may have lost what was in
        its memory only, every byte is hashed once.
        """
        there = manifest.sealed(self.path)
        if there is None or self._mark.read_text(encoding="utf-8") in (boot_id(), _CHECKED):
            return there
        log.event("cache.check", f"{self.path} was written before this machine was started: reading it back once")
        if manifest.of(self.path) != there:
            log.warn("cache.lost", f"{self.path} is not what it was: making it again")
            return None
        self._mark.write_text(_CHECKED, encoding="utf-8")
        return there

    def fill(self, made: Path) -> None:
        """Make the sealed directory `made` the content, by rename."""
        shutil.rmtree(self.path, ignore_errors=True)  # an earlier, damaged one, gone before the mark vouches for it
        self._mark.write_text(boot_id(), encoding="utf-8")
        made.rename(self.path)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[Place]:
    """Be the only one to change `directory`; others wait."""
    mark = directory.with_name(f"{directory.name}.lock")
    with _opened(mark) as handle:
        _wait(handle, fcntl.LOCK_EX, directory)
        yield Place(directory, mark)


@contextlib.contextmanager
def used(directory: Path) -> Iterator[None]:
    """Keep `directory`, and what becomes of it, from being evicted; any number of processes may."""
    path = _use(directory)
    with _opened(path) as handle:
        _wait(handle, fcntl.LOCK_SH, directory)
        os.utime(path)  # last used now
        yield


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[bool]:
    """True if nobody uses `directory`, nor can begin to until the block ends."""
    with _opened(_use(directory)) as handle:
        yield _got(handle, fcntl.LOCK_EX)


def last_used(directory: Path) -> float:
    """When somebody last began to use `directory`, in seconds since the epoch; 0 if nobody is known to have."""
    path = _use(directory)
    return path.stat().st_mtime if path.exists() else 0.0


def _use(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.use")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def _wait(handle: int, kind: int, directory: Path) -> None:
    """Take the lock, however long another process works; polling, so that a signal is heard."""
    said = -_SAY_SECONDS
    while not _got(handle, kind):
        if time.monotonic() - said >= _SAY_SECONDS:
            said = time.monotonic()
            log.event("cache.wait", f"another process is at work on {directory}; waiting for it")
        time.sleep(_POLL_SECONDS)


def _got(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def boot_id() -> str:
    """What names this start of the machine."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else "no boot id on this system"
