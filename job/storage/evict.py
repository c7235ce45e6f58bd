"""Room in the local cache: what was used longest ago goes first, what a running job uses never."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from job import errors, log, manifest
from job.storage import local

_SPARE = 1 << 30  # bytes that must stay free on the cache's disk
_COMPANIONS = (".partial", ".journal", ".json")  # what is not whole yet, and records of files used in place


def make_room(shelves: Sequence[Path], needed: int, limit: int | None) -> None:
    """Evict directories from `shelves` until `needed` more bytes fit on the disk and, if there is one, in the `limit`.

    Raises `errors.DiskFullError` if what may go is not enough.
    """
    root = shelves[0].parent
    root.mkdir(parents=True, exist_ok=True)
    sizes = {place: on_disk(place) for place in _places(shelves)}
    total = sum(sizes.values())
    for place in sorted(sizes, key=local.last_used):
        if _short(root, needed, total, limit) is None:
            return
        with local.unused(place) as nobody:
            if nobody:
                _remove(place)
                total -= sizes[place]
                log.event(
                    "cache.evict", f"evicted {place} ({log.size(sizes[place])}) from the cache", bytes=sizes[place]
                )
    if short := _short(root, needed, total, limit):
        raise errors.DiskFullError(short)


def _short(root: Path, needed: int, total: int, limit: int | None) -> str | None:
    """What is in the way of `needed` more bytes; None if nothing is."""
    free = shutil.disk_usage(root).free
    if needed + _SPARE > free:
        return (
            f"{root}: {log.size(free)} are free, the run needs {log.size(needed + _SPARE)}; free space, "
            "or set run.cache to a larger disk"
        )
    if limit is not None and total + needed > limit:
        return (
            f"{root}: run.cache_limit is {log.size(limit)}, running jobs use {log.size(total)} of it, and the run "
            f"needs {log.size(needed)} more; raise the limit"
        )
    return None


def _places(shelves: Sequence[Path]) -> Iterator[Path]:
    """Every directory of the shelves, also those of which only a part is there."""
    for shelf in shelves:
        names = {path.name.removesuffix(".partial") for path in shelf.glob("*") if path.is_dir()}
        yield from (shelf / name for name in sorted(names))


def _all(place: Path) -> list[Path]:
    return [place, *(place.with_name(place.name + end) for end in _COMPANIONS)]


def on_disk(place: Path) -> int:
    """Bytes that `place` takes, whole or not; the holes of a file that is still arriving take none."""
    files = (p for root in _all(place) for p in (root, *root.rglob("*")) if p.is_file())
    return sum(path.stat().st_blocks * 512 for path in files)


def _remove(place: Path) -> None:
    (place / manifest.NAME).unlink(missing_ok=True)  # first, so that a kill leaves nothing that looks complete
    for path in _all(place):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
