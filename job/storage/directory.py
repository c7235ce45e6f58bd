"""When is a directory in a store complete? When its manifest is there and every file has its size."""

import time
import uuid
from collections.abc import Callable

from job import errors, log, manifest
from job.manifest import Manifest
from job.storage import checksum, patience
from job.storage.store import Entry, Source, Store

_VOID = b'{"being replaced'


def void() -> bytes:
    """What stands in place of a manifest while the directory is replaced; never the same twice."""
    return _VOID + f' by": "{uuid.uuid4().hex}"}}'.encode()


def is_void(data: bytes) -> bool:
    """Return True if `data` stands in place of a manifest while the directory is replaced."""
    return data.startswith(_VOID)


def sealed(store: Store, prefix: str) -> Manifest | None:
    """The manifest of the directory at `prefix` if it is there and every file has its size; None otherwise."""
    blob = store.read(prefix + manifest.NAME)
    if blob is None or is_void(blob.data):
        return None
    try:
        found = manifest.parse(blob.data, f"{store.url}/{prefix}{manifest.NAME}")
    except errors.DamagedError as e:
        log.warn("store.manifest", str(e))
        return None
    return found if sizes(store, prefix, found) else None


def sizes(store: Store, prefix: str, wanted: Manifest) -> bool:
    """True if the store holds every file of `wanted` with its size."""
    there = {entry.key.removeprefix(prefix): entry.size for entry in store.list(prefix)}
    return {name: file.size for name, file in wanted.files.items()}.items() <= there.items()


def read_range(store: Source, entry: Entry, start: int, stop: int) -> bytes:
    """Return the bytes of `entry` from `start` to before `stop`; for small pieces of it.

    Raises `errors.DamagedError` if fewer or more arrive each time, and `errors.StoreError` if the
    store fails, or trickles, for longer than patience lasts.
    """
    return _retry_read(lambda: _receive_range(store, entry, start, stop))


def read_file(store: Source, entry: Entry) -> bytes:
    """Return the bytes of a small file, compared with the store's own checksum if it keeps one.

    Raises what `read_range` does, and `errors.DamagedError` if the checksum differs each time.
    """
    if not entry.size:
        return b""

    def receive_file() -> bytes:
        running = checksum.Running(store.checksum(entry))
        data = _receive_range(store, entry, 0, entry.size)
        running.update(data)
        if wrong := running.mismatch():
            raise errors.DamagedError(f"{store.url}/{entry.key} arrived damaged: {wrong}")
        return data

    return _retry_read(receive_file)


def _retry_read(attempt: Callable[[], bytes]) -> bytes:
    return patience.USUAL.keep_trying(
        attempt,
        lambda error, tried: log.warn("store.retry", f"{error}; trying again", tried=tried),
    )


def _receive_range(store: Source, entry: Entry, start: int, stop: int) -> bytes:
    """Return exactly the bytes from `start` to before `stop`, received in one try.

    A short answer may end in order, and a proxy that ignores ranges sends the whole file: so the
    bytes are counted while they arrive. Each of them can be soon enough and the last one never
    come, so the try has a deadline.
    """
    size, where = stop - start, f"{store.url}/{entry.key}"
    if not size:
        return b""  # HTTP has no range without a byte
    deadline = time.monotonic() + patience.PART_SECONDS
    data = bytearray()
    for block in store.stream(entry, start, stop):
        data += block
        if len(data) > size:
            raise errors.DamagedError(f"{where}: more bytes arrived than the {size} requested")
        if len(data) < size and time.monotonic() > deadline:
            passed = f"{patience.PART_SECONDS:.0f} s"
            raise errors.StoreError(f"{where}: {len(data)} of {size} bytes arrived in {passed}")
    if len(data) < size:
        raise errors.DamagedError(f"{where} broke off after {len(data)} of {size} bytes")
    return bytes(data)


def remove(store: Store, prefix: str) -> None:
    """Delete everything at `prefix`, the manifest first, so that a kill leaves nothing that looks complete."""
    store.delete(prefix + manifest.NAME)
    for entry in store.list(prefix):
        store.delete(entry.key)
    store.sweep(prefix)
