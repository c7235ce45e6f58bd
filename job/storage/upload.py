"""Whole directories into a store: files first, the manifest last, and nothing sent that is there already."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from job import errors, manifest
from job.manifest import File, Manifest
from job.storage import checksum, crew
from job.storage import directory as directories
from job.storage.directory import sealed, sizes
from job.storage.outgoing import Outgoing
from job.storage.store import Entry, Store

_FRESH_SECONDS = 1.5  # no lease is shorter than 2 s, and nobody is replaced before it is over
_LOOKS = 2  # at a listing, which has no checksum: it may be damaged on the way


def push(store: Store, directory: Path, prefix: str, confirm: Callable[[], None] = lambda: None) -> Manifest:
    """Make `prefix` in the store hold exactly what the local `directory` holds, manifest last.

    What is there already with the same content is not sent again: by the manifest if there is one, else (an earlier
    push was killed) by the checksum that the store keeps, and the parts of an unfinished upload by theirs.

    `confirm` is called before the old content is given up, every now and then while files are sent, and before the new
    content is sealed; what it raises stops the push.

    Raises `errors.StoreError` if the store failed for longer than patience lasts or does not hold what was sent, and
    `errors.ConflictError` if somebody else sealed something there meanwhile.
    """
    paths = manifest.files(directory)
    theirs, there = sealed(store, prefix), {e.key.removeprefix(prefix): e for e in store.list(prefix)}
    same = _same(store, paths, there, theirs)
    if theirs and same == theirs.files and same.keys() == paths.keys():
        return theirs
    confirm()
    try:
        void = _void(store, prefix + manifest.NAME)  # from here on the old content is no longer whole, nor part of it
        whole = Manifest({**same, **_send(store, prefix, _changed(paths, there, same), confirm)})
        _clear(store, prefix, whole, confirm)
        confirm()
        _seal(store, prefix + manifest.NAME, void, whole)  # last: its presence means complete
    except (errors.ConflictError, errors.ChangedError):
        confirm()  # who lost because the place is another's now, hears that instead
        raise
    return whole


def _void(store: Store, key: str) -> bytes | None:
    """Put something that is no manifest in place of the one there; None if there is none.

    Deleting it could not be made conditional everywhere: a late delete would undo what another owner sealed since.
    """
    there = store.read(key)
    if there is None:
        return None
    void = directories.void()
    store.replace(key, void, there.version)
    return void


def _seal(store: Store, key: str, void: bytes | None, whole: Manifest) -> None:
    if void is None:
        store.create(key, whole.to_json())
        return
    there = store.read(key)
    if there is None or there.data != void:
        raise errors.ConflictError(f"{store.url}/{key} was changed by somebody else")
    store.replace(key, whole.to_json(), there.version)


def _changed(
    paths: Mapping[str, Path], there: Mapping[str, Entry], same: Mapping[str, File]
) -> dict[str, tuple[Path, str | None]]:
    """What is to be sent, with the version that it may replace: a file that somebody else wrote since then stays."""
    return {
        name: (path, there[name].version if name in there else None) for name, path in paths.items() if name not in same
    }


def _same(
    store: Store, paths: Mapping[str, Path], there: Mapping[str, Entry], theirs: Manifest | None
) -> dict[str, File]:
    """Those local files that the store holds with the same content."""
    found: dict[str, File] = {}

    def compare(name: str) -> None:
        promised = theirs.files.get(name) if theirs else None
        wanted = None if promised else store.checksum(there[name])
        if promised or wanted:
            mine = checksum.of_file(paths[name], wanted)
            file = File(there[name].size, mine.sha256)
            if file == promised or (wanted and not mine.mismatch()):
                found[name] = file

    candidates = [n for n, path in paths.items() if n in there and there[n].size == path.stat().st_size]
    with crew.crew("push.compare", f"compare {store.url}", 0) as hands:
        hands.work(partial(hands.keep_trying, partial(compare, name)) for name in candidates)
    return found


def _send(
    store: Store, prefix: str, changed: Mapping[str, tuple[Path, str | None]], confirm: Callable[[], None]
) -> dict[str, File]:
    granted = _Recently(confirm)
    files = {name: Outgoing(store, path, prefix + name, over, granted) for name, (path, over) in changed.items()}
    largest_first = sorted(files.values(), key=lambda file: -file.size)
    with (
        _concluded(store, prefix, largest_first, confirm),
        crew.crew("push.transfer", f"push {store.url}/{prefix}", sum(file.size for file in largest_first)) as hands,
    ):
        hands.work(partial(file.send_next, hands) for file in largest_first for _ in range(file.parts))
    return {name: file.file for name, file in files.items() if file.file}


class _Recently:
    """Confirms again what was confirmed some time ago: the machine may have been paused, and replaced, since then."""

    def __init__(self, confirm: Callable[[], None]) -> None:
        self._confirm, self._lock = confirm, threading.Lock()
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Return when it is certain; raise what `confirm` does."""
        with self._lock:
            if time.monotonic() - self._last > _FRESH_SECONDS:
                self._confirm()
                self._last = time.monotonic()


@contextlib.contextmanager
def _concluded(store: Store, prefix: str, files: Sequence[Outgoing], confirm: Callable[[], None]) -> Iterator[None]:
    """Leave nothing unfinished after a failure; after a request to stop, what a later start can go on with.

    Where we may not write any more, what is unfinished may be somebody else's.
    """
    try:
        yield
    except BaseException as e:
        if isinstance(e, Exception) and _still_ours(confirm):
            for file in files:
                file.abort()
            store.sweep(prefix)
        for file in files:
            file.leave()
        raise


def _still_ours(confirm: Callable[[], None]) -> bool:
    try:
        confirm()
    except (errors.JobError, OSError):
        return False
    return True


def _clear(store: Store, prefix: str, whole: Manifest, confirm: Callable[[], None]) -> None:
    """Remove what does not belong there, and make sure that what does is there."""
    there = store.list(prefix)
    confirm()  # after looking: what an owner after us puts there is not listed
    for entry in there:
        if entry.key.removeprefix(prefix) not in {*whole.files, manifest.NAME}:
            store.delete(entry.key)
    store.sweep(prefix)
    if not any(sizes(store, prefix, whole) for _ in range(_LOOKS)):
        raise errors.DamagedError(f"{store.url}/{prefix} does not hold what was just written there; start again")
