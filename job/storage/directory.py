"""Whole directories to and from a store: nothing half-transferred ever looks complete, and nothing is fetched twice."""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import filelock

from job import errors, log, manifest
from job.manifest import File, Manifest
from job.storage.store import Advance, Entry, Seen, Source, Store

_AT_ONCE = 4  # files; the S3 client itself reads several ranges of one file at once
_TRIES = 3  # of a file that arrives damaged
_JOURNAL = ".pulled.jsonl"


class _StoppedError(Exception):
    """Another file failed, so this transfer is given up."""


def pull(
    source: Source, entries: Sequence[Entry], target: Path, *, below: str = "", expected: Manifest | None = None
) -> Manifest:
    """Make the local directory `target` hold `entries`, named relative to the key prefix `below`, and seal it.

    Files arrive under a temporary name and are renamed when verified: against `expected` if the store has a manifest
    of ours, else against the store's own checksum. A second call, also after a kill, fetches only what is missing.
    Several processes may call at once; one works, the others wait.

    Raises `errors.StoreError` if a file keeps arriving damaged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        there = manifest.sealed(target)
        if there and (expected is None or there == expected):
            return there
        partial = target.with_name(f"{target.name}.partial")
        partial.mkdir(exist_ok=True)
        journal = _Journal(partial / _JOURNAL)
        named = {manifest.safe(entry.key.removeprefix(below)): entry for entry in entries}
        missing = {name: entry for name, entry in named.items() if not journal.has(name, entry, partial)}

        def fetch(name: str, advance: Advance) -> None:
            seen = _verified(source, named[name], partial / name, expected.files[name] if expected else None, advance)
            journal.add(name, named[name], seen)

        _all(fetch, {name: entry.size for name, entry in missing.items()}, f"pull {source.url}")
        return _finish(partial, target, Manifest({name: journal.file(name) for name in named}))


def push(store: Store, directory: Path, prefix: str) -> Manifest:
    """Make `prefix` in the store hold exactly what the local `directory` holds, manifest last.

    What the store's manifest says is there already is not sent again. Raises `errors.StoreError` if the store does not
    hold what was sent.
    """
    mine, theirs = manifest.of(directory), sealed(store, prefix)
    if theirs == mine:
        return mine
    kept = {name for name, file in mine.files.items() if theirs and theirs.files.get(name) == file}
    if theirs and not theirs.files.keys() <= kept:
        store.delete(prefix + manifest.NAME)  # from here on the old content is no longer whole

    def send(name: str, advance: Advance) -> None:
        store.upload(directory / name, prefix + name, advance)

    _all(send, {name: file.size for name, file in mine.files.items() if name not in kept}, f"push {store.url}/{prefix}")
    for entry in store.list(prefix):
        if entry.key.removeprefix(prefix) not in {*mine.files, manifest.NAME}:
            store.delete(entry.key)
    if not _sizes_match(store, prefix, mine):
        raise errors.DamagedError(f"{store.url}/{prefix} does not hold what was just written there; start again")
    store.put(prefix + manifest.NAME, mine.to_json())  # manifest last: its presence means complete
    return mine


def sealed(store: Store, prefix: str) -> Manifest | None:
    """The manifest of the directory at `prefix` if it is there and every file has its size; None otherwise."""
    blob = store.read(prefix + manifest.NAME)
    if blob is None:
        return None
    try:
        found = manifest.parse(blob.data, f"{store.url}/{prefix}{manifest.NAME}")
    except errors.DamagedError as e:
        log.warn("store.manifest", str(e))
        return None
    return found if _sizes_match(store, prefix, found) else None


def fetch(store: Store, prefix: str, target: Path) -> Manifest | None:
    """Pull the sealed directory at `prefix` to `target`, every byte checked; None if it is not complete."""
    found = sealed(store, prefix)
    if found is None:
        return None
    entries = [e for e in store.list(prefix) if e.key.removeprefix(prefix) in found.files]
    return pull(store, entries, target, below=prefix, expected=found)


def remove(store: Store, prefix: str) -> None:
    """Delete everything at `prefix`, the manifest first, so that a kill leaves nothing that looks complete."""
    store.delete(prefix + manifest.NAME)
    for entry in store.list(prefix):
        store.delete(entry.key)


class _Journal:
    """Which files of a partial directory are whole: one JSON line each, written after the file's rename."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._lines: dict[str, dict[str, str | int]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a line cut by a kill: that file is fetched again
                record = json.loads(line)
                self._lines[record["name"]] = record

    def has(self, name: str, entry: Entry, directory: Path) -> bool:
        record = self._lines.get(name, {})
        path = directory / name
        return record.get("version") == entry.version and path.is_file() and path.stat().st_size == entry.size

    def add(self, name: str, entry: Entry, seen: Seen) -> None:
        record: dict[str, str | int] = {
            "name": name,
            "size": entry.size,
            "version": entry.version,
            "sha256": seen.sha256,
        }
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            self._lines[name] = record

    def file(self, name: str) -> File:
        return File(size=int(self._lines[name]["size"]), sha256=str(self._lines[name]["sha256"]))


def _verified(source: Source, entry: Entry, path: Path, expected: File | None, advance: Advance) -> Seen:
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        seen = _delivered(source, entry, temporary, expected, advance)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return seen


def _delivered(source: Source, entry: Entry, path: Path, expected: File | None, advance: Advance) -> Seen:
    """Download until what arrives is what was promised, a few times at most."""
    attempt = 1
    while True:
        try:
            seen = source.download(entry, path, advance)
            if expected is None or (seen.sha256, entry.size) == (expected.sha256, expected.size):
                return seen
            raise errors.DamagedError(
                f"{source.url}/{entry.key}: SHA-256 is {seen.sha256}, its manifest says {expected.sha256}"
            )
        except errors.StoreError as e:
            if attempt == _TRIES:
                raise
            log.warn("pull.again", f"{e}; fetching it again", key=entry.key, attempt=attempt)
            attempt += 1


def _finish(partial: Path, target: Path, whole: Manifest) -> Manifest:
    wanted = {*whole.files}
    for path in [p for p in partial.rglob("*") if p.is_file() and p.relative_to(partial).as_posix() not in wanted]:
        path.unlink()  # the journal, and files that the source no longer has
    for folder in sorted((p for p in partial.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
    (partial / manifest.NAME).write_bytes(whole.to_json())
    shutil.rmtree(target, ignore_errors=True)  # an earlier, damaged one: it was not sealed
    partial.rename(target)
    return whole


def _all(work: Callable[[str, Advance], None], sizes: Mapping[str, int], title: str) -> None:
    """Run `work` for every name, some at once; the first error, or a signal, stops the others at their next block."""
    stop, lock, done = threading.Event(), threading.Lock(), 0

    with log.progress(title, max(sum(sizes.values()), 1), sys.stderr) as show:

        def advance(count: int) -> None:
            nonlocal done
            if stop.is_set():
                raise _StoppedError
            with lock:
                done += count
                show(done, "")

        with ThreadPoolExecutor(_AT_ONCE) as pool, contextlib.ExitStack() as leaving:
            leaving.callback(pool.shutdown, wait=False, cancel_futures=True)
            leaving.callback(stop.set)
            largest_first = sorted(sizes, key=lambda name: -sizes[name])
            for future in as_completed([pool.submit(work, name, advance) for name in largest_first]):
                future.result()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.event("pull.wait", f"another process is fetching {target.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sizes_match(store: Store, prefix: str, wanted: Manifest) -> bool:
    sizes: Iterable[tuple[str, int]] = ((e.key.removeprefix(prefix), e.size) for e in store.list(prefix))
    return {n: f.size for n, f in wanted.files.items()}.items() <= dict(sizes).items()
