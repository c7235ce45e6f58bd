"""Whole directories from a store: nothing half-pulled ever looks complete, and nothing is fetched twice."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from job import errors, log, manifest
from job.manifest import Manifest
from job.storage import crew, local
from job.storage.directory import sealed
from job.storage.incoming import Incoming
from job.storage.journal import Journal
from job.storage.store import Entry, Source, Store

_TRIES = 3  # of a file that arrives damaged


def pull(
    source: Source, entries: Sequence[Entry], target: Path, *, below: str = "", expected: Manifest | None = None
) -> Manifest:
    """Make the local directory `target` hold `entries`, named relative to the key prefix `below`, and seal it.

    Every file is verified while it arrives: against `expected` if the store has a manifest of ours, else against the
    store's own checksum. A second call, also after a kill, fetches only the parts that are missing. Several processes
    may call at once; one works, the others wait.

    Raises `errors.StoreError` when the store fails for longer than patience lasts, `errors.DamagedError` if a file
    keeps arriving damaged, and `errors.ChangedError` if an entry was overwritten meanwhile.
    """
    with local.alone(target) as place:
        there = place.sealed()
        arriving, journal = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.journal")
        if there and (expected is None or there == expected):
            journal.unlink(missing_ok=True)  # left by a kill in the last moment
            return there
        arriving.mkdir(exist_ok=True)
        named = {manifest.safe(entry.key.removeprefix(below)): entry for entry in entries}
        title = f"pull {source.url}/{below}".rstrip("/")
        whole = _arrive(source, named, Journal(arriving, journal, local.boot_id()), title, expected)
        _seal(arriving, whole)
        place.fill(arriving)
        journal.unlink(missing_ok=True)  # not before the rename: a kill between the two loses nothing
        return whole


def fetch(store: Store, prefix: str, target: Path) -> Manifest | None:
    """Pull the sealed directory at `prefix` to `target`, every byte checked; None if it is not complete."""
    found = sealed(store, prefix)
    if found is None:
        return None
    entries = [e for e in store.list(prefix) if e.key.removeprefix(prefix) in found.files]
    return pull(store, entries, target, below=prefix, expected=found)


def here(target: Path) -> Manifest | None:
    """What an earlier pull to `target` brought, if it is whole; None otherwise."""
    if not target.exists():
        return None
    with local.alone(target) as place:
        return place.sealed()


def _arrive(
    source: Source, named: Mapping[str, Entry], noted: Journal, title: str, expected: Manifest | None
) -> Manifest:
    """Bring all files to the journal's directory, those that arrive damaged again."""
    seen: set[str] = set()
    for attempt in range(1, _TRIES + 1):
        files = [
            Incoming(source, entry, name, noted, expected.files[name] if expected else None)
            for name, entry in sorted(named.items(), key=lambda item: -item[1].size)
            if not noted.whole(name, entry)
        ]
        _receive(files, title, sum(entry.size for entry in named.values()))
        damaged = [file.damage for file in files if file.damage]
        if not damaged:
            _say_unverified(source, files)
            break
        seen.add(damaged[0])
        if attempt == _TRIES:
            kind = errors.CorruptError if len(seen) == 1 else errors.DamagedError
            raise kind(f"{damaged[0]}; it arrived damaged {attempt} times")
        log.warn("pull.again", f"{damaged[0]}; fetching it again", attempt=attempt, damaged=damaged)
    whole = Manifest({name: file for name, entry in named.items() if (file := noted.whole(name, entry))})
    if whole.files.keys() != named.keys() or (expected and whole != expected):
        raise errors.ChangedError(
            f"{source.url}: what is there is not what its manifest says: was it removed meanwhile?"
        )
    return whole


def _receive(files: Sequence[Incoming], title: str, all_bytes: int) -> None:
    with crew.crew("pull.transfer", title, sum(file.entry.size for file in files)) as hands:
        hands.work(partial(file.recover, hands) for file in files)
        missing = [(file, part) for file in files for part in file.missing()]
        kept = all_bytes - sum(part.stop - part.start for _, part in missing)
        if kept:
            log.event("pull.kept", f"{title}: {log.size(kept)} are here from an earlier start", bytes=kept)
        hands.work(partial(file.receive, part, hands) for file, part in missing)


def _say_unverified(source: Source, files: Sequence[Incoming]) -> None:
    bare = [file.name for file in files if file.verified_by == "size"]
    if bare and not source.url.startswith("file:"):
        log.warn(
            "pull.unverified",
            f"{source.url}: the store keeps no checksum of {len(bare)} file(s), the first {bare[0]}: "
            "only their sizes were checked",
            files=bare,
        )


def _seal(arriving: Path, whole: Manifest) -> None:
    for name, path in manifest.files(arriving).items():
        if name not in whole.files:
            path.unlink()  # the source has it no more
    for folder in sorted((p for p in arriving.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
    (arriving / manifest.NAME).write_bytes(whole.to_json())
