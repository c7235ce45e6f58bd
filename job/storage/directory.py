"""When is a directory in a store complete? When its manifest is there and every file has its size."""

import uuid

from job import errors, log, manifest
from job.manifest import Manifest
from job.storage import checksum, patience
from job.storage.store import Entry, Source, Store

_VOID = b'{"being replaced'


def void() -> bytes:
    """What stands in place of a manifest while the directory is replaced; never the same twice."""
    return _VOID + f' by": "{uuid.uuid4().hex}"}}'.encode()


def sealed(store: Store, prefix: str) -> Manifest | None:
    """The manifest of the directory at `prefix` if it is there and every file has its size; None otherwise."""
    blob = store.read(prefix + manifest.NAME)
    if blob is None or blob.data.startswith(_VOID):
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
    """The bytes of `entry` from `start` to before `stop`; for small pieces of it."""
    return patience.USUAL.keep_trying(
        lambda: b"".join(store.stream(entry, start, stop)),
        lambda error, tried: log.warn("store.retry", f"{error}; trying again", tried=tried),
    )


def read_file(store: Source, entry: Entry) -> bytes:
    """Return the bytes of a small file, compared with the store's own checksum if it keeps one."""
    wanted = store.checksum(entry)

    def read_once() -> bytes:
        data = b"".join(store.stream(entry, 0, entry.size))
        running = checksum.Running(wanted)
        running.update(data)
        if wrong := running.mismatch():
            raise errors.DamagedError(f"{store.url}/{entry.key} arrived damaged: {wrong}")
        return data

    return patience.USUAL.keep_trying(
        read_once,
        lambda error, tried: log.warn("store.retry", f"{error}; trying again", tried=tried),
    )


def remove(store: Store, prefix: str) -> None:
    """Delete everything at `prefix`, the manifest first, so that a kill leaves nothing that looks complete."""
    store.delete(prefix + manifest.NAME)
    for entry in store.list(prefix):
        store.delete(entry.key)
    store.sweep(prefix)
