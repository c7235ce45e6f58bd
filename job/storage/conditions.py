"""Does a store keep its word on conditional writes? Some S3 servers accept the conditions and ignore them."""

import uuid
from collections.abc import Callable, Iterator

from job import errors, log
from job.storage.checksum import Expected
from job.storage.store import ANY, Blob, Block, Entry, Store, Upload

_PROBES = 2  # the end of another start removes probes, which may look as if a condition was ignored


def checked(store: Store, place: str, *, required: bool) -> Store:
    """Return `store` if it honours conditional writes, tried with an object of its own below `place`.

    Where it does not: raises `errors.UnsupportedError` if they are `required`, else returns a store that looks before
    it writes, which is as good as long as nobody else writes.
    """
    for _ in range(_PROBES):
        lacking = _lacking(store, f"{place}{uuid.uuid4().hex}")
        if lacking is None:
            return store
    seen = f"{store.url}: the store {lacking}, so two starts of one run could overwrite each other's work"
    if required:
        raise errors.UnsupportedError(
            f"{seen}. Use a store with conditional writes; or, if you make sure that this run is never started twice "
            "at the same time, set run.conditional_writes to emulated"
        )
    log.warn(
        "store.emulated",
        f"{seen}. run.conditional_writes is emulated: NOTHING protects this run from a second start at the same time",
        lacking=lacking,
    )
    return _Emulated(store)


def _lacking(store: Store, key: str) -> str | None:
    """What the store lacks; None if a write succeeds when, and only when, its condition holds."""
    try:
        store.create(key, b"one")
    except errors.UnsupportedError as e:
        return f"has no conditional writes ({e})"
    try:
        lacking = "ignores If-None-Match" if _wins(lambda: store.create(key, b"two")) else _lacking_replace(store, key)
    except errors.UnsupportedError as e:
        lacking = f"has not all conditional writes ({e})"
    store.delete(key)  # what a kill or another error leaves is removed when the run is done
    return lacking


def _lacking_replace(store: Store, key: str) -> str | None:
    there = store.read(key)
    if there is None:
        return "does not show what was just written"
    if not _wins(lambda: store.replace(key, b"three", there.version)):
        return "refuses If-Match even where the version is right"
    if _wins(lambda: store.replace(key, b"four", there.version)):
        return "ignores If-Match"
    return None


def _wins(write: Callable[[], None]) -> bool:
    try:
        write()
    except errors.ConflictError:
        return False
    return True


class _Emulated:
    """A store that looks whether a condition holds and then writes: not safe if somebody writes in between."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    def list(self, prefix: str = "") -> list[Entry]:
        return self._store.list(prefix)

    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Block]:
        return self._store.stream(entry, start, stop)

    def checksum(self, entry: Entry) -> Expected | None:
        return self._store.checksum(entry)

    def read(self, key: str) -> Blob | None:
        return self._store.read(key)

    def put(self, key: str, data: bytes) -> None:
        self._store.put(key, data)

    def create(self, key: str, data: bytes) -> None:
        if self.read(key):
            raise errors.ConflictError(f"{self.url}/{key} exists already")
        self.put(key, data)

    def replace(self, key: str, data: bytes, version: str) -> None:
        there = self.read(key)
        if there is None or there.version != version:
            raise errors.ConflictError(f"{self.url}/{key} was changed by somebody else")
        self.put(key, data)

    def part_size(self, size: int) -> int:
        return self._store.part_size(size)

    def upload(self, key: str, size: int, _over: str | None) -> Upload:
        return self._store.upload(key, size, ANY)

    def sweep(self, prefix: str) -> None:
        self._store.sweep(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)
