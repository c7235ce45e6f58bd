"""Room in the local cache: what was used longest ago goes first, what a running job uses never."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from job import errors, log, manifest
from job.storage import local

_SPARE = 1 << 30  # bytes that must stay free on the cache's disk
_COMPANIONS = (".partial", ".journal", ".json")  # what is not whole yet, and records of files used in place


def make_room(shelves: Sequence[Path], needed: int, limit: int | None, *, look: bool = False) -> None:
    """Evict directories from `shelves` until `needed` more bytes fit on the disk and, if there is one, in the `limit`.

    With `look` nothing is removed; it is only found out whether that would be enough.

    Raises `errors.DiskFullError` if it is not, or if the run alone needs more than the limit. Beyond the limit by what
    running jobs use is said, and no reason to stop.
    """
    root = shelves[0].parent
    root.mkdir(parents=True, exist_ok=True)
    sizes = {place: on_disk(place) for place in _places(shelves)}
    total, free = sum(sizes.values()), shutil.disk_usage(root).free
    limit = limit or total + needed
    if needed > limit:
        raise errors.DiskFullError(
            f"{root}: run.cache_limit is {log.size(limit)}, and the run needs {log.size(needed)}; raise the limit"
        )
    for place in sorted(sizes, key=local.last_used):
        if total + needed <= limit and needed + _SPARE <= free:
            return
        with local.unused(place) as nobody:
            if nobody:
                if not look:
                    _remove(place)
                    log.event("cache.evict", f"evicted {place} ({log.size(sizes[place])})", bytes=sizes[place])
                total, free = total - sizes[place], free + sizes[place]
    if needed + _SPARE > free:
        raise errors.DiskFullError(
            f"{root}: {log.size(free)} are free, the run needs {log.size(needed + _SPARE)}; free space, "
            "or set run.cache to a larger disk"
        )
    if total + needed > limit:
        log.warn(
            "cache.over", f"{root} exceeds run.cache_limit: running jobs use {log.size(total)} of {log.size(limit)}"
        )


def _places(shelves: Sequence[Path]) -> Iterator[Path]:
    """Every directory of the shelves, also those of which only a part is there."""
    for shelf in shelves:
        names = {path.name.removesuffix(".partial") for path in shelf.glob("*") if path.is_dir()}
        yield from (shelf / name for name in sorted(names))


def _all(place: Path) -> list[Path]:
    return [place, *(place.with_name(place.name + end) for end in _COMPANIONS)]


def on_disk(place: Path) -> int:
    """Bytes that `place` takes, whole or not; the holes of a file that is still arriving take none."""
    total = 0
    for root in _all(place):
        for path in (root, *(Path(folder) / name for folder, _, names in os.walk(root) for name in names)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another job is at work there
                total += path.lstat().st_blocks * 512
    return total


def _remove(place: Path) -> None:
    (place / manifest.NAME).unlink(missing_ok=True)  # first, so that a kill leaves nothing that looks complete
    for path in _all(place):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
