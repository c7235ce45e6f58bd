"""What the starts of this run did: a log of each in the store, and whether they get anywhere."""

import itertools
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from job import errors, goodput, log, paths, storage
from job.storage import Entry, Store

_WITNESS_SECONDS = 5.0
_KEPT_SECONDS = 60.0  # between two times that the log of a living attempt is kept
_END_BYTES = 1 << 16  # of a log, that hold its first and its last words
_REMEMBERED = 20  # attempts
_GUESS_SECONDS = 4 * 3600.0  # counts like one preemption after so long
_LIMIT_SECONDS = 300.0  # before its time limit an attempt is asked to stop because of it (Slurm: up to 60 s early)
_ENDS = ("run.end", "run.done")

Progress = tuple[int, ...]  # grows with what is safe in the store: published directories, then steps


@dataclass(frozen=True)
class Attempt:
    """A start of the run. Times are seconds by its own clock; `ending` is why it ended, as far as it could say."""

    number: int
    host: str
    progress: Progress
    seconds: float
    ending: str
    asked: bool  # to stop, by the cluster or because another start owns the run; but not at its own time limit
    taken: bool  # by the cluster: it was asked to, ended without a word, or lost another of its machines


def begin(store: Store, log_file: Path, number: int, progress: Progress, limit: int, ends: float | None = None) -> None:
    """Keep that attempt `number` was started when the run was as far as `progress` says, with a time limit at `ends`.

    Raises `errors.PermanentError` if `limit` attempts before it, of those that nobody asked to stop, began there too,
    with the reasons of each: so would this one. One that its time limit ended is among them: the next has no more time.
    """
    here = itertools.takewhile(lambda attempt: attempt.progress == progress, _before(store, number))
    stuck = list(itertools.islice((attempt for attempt in here if not attempt.asked), limit))
    if len(stuck) >= limit:
        told = "\n".join(f"  attempt {a.number} on {a.host}, {a.seconds:.0f} s: {a.ending}" for a in reversed(stuck))
        raise errors.PermanentError(
            f"{store.url}: {len(stuck)} attempts in a row made no progress:\n{told}\nWhen the reason is gone, start "
            f"again with a larger run.give_up_after (it is {limit})"
        )
    log.event(
        goodput.BEGIN,
        f"attempt {number} of {store.url}",
        attempt=number,
        host=platform.node(),
        progress=progress,
        ends=ends,
        started=psutil.Process().create_time(),
    )
    store.create(paths.attempt(number), log_file.read_bytes())


class Witness:
    """Keeps the log of an attempt in the store now and then, so that something is known of one that is killed."""

    def __init__(self, store: Store, log_file: Path, number: int) -> None:
        self._store, self._log_file, self._number = store, log_file, number
        self._kept = time.monotonic()

    def __call__(self) -> None:
        """Keep it if that was long ago."""
        if time.monotonic() - self._kept >= _KEPT_SECONDS:
            self._kept = time.monotonic()
            self._store.put(paths.attempt(self._number), self._log_file.read_bytes())


def keep(store: Store, log_file: Path, place: str, confirm: Callable[[], None]) -> None:
    """Keep what this machine has logged of its attempt at `place`.

    A witness, not a result: a failure here is said, and no more.

    It is not waited for longer than a few seconds either: a silent store must not use up the time of grace.
    """

    def write() -> None:
        try:
            confirm()
            store.put(place, log_file.read_bytes())
        except (errors.JobError, OSError) as e:
            log.warn("attempt.log", f"the log of this attempt could not be kept: {e}")

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(_WITNESS_SECONDS)
    if writing.is_alive():
        log.warn("attempt.log", f"the log of this attempt was not kept: {store.url} does not answer")


def between(store: Store, number: int) -> float:
    """Mean seconds between preemptions, as the last attempts before `number` saw it; at first a guess of some hours."""
    seen = list(itertools.islice(_before(store, number), _REMEMBERED))
    lasted = sum(attempt.seconds for attempt in seen)
    return (lasted + _GUESS_SECONDS) / (sum(attempt.taken for attempt in seen) + 1)


def spent(store: Store, log_file: Path, number: int, began: int) -> goodput.Spent:
    """Where the seconds of all attempts of this run went, up to now in attempt `number`, which logs to `log_file`."""
    first = max(1, began)
    logs = (store.read(paths.attempt(earlier)) for earlier in range(first, number))
    texts = [*(blob.data for blob in logs if blob), log_file.read_bytes()]
    return goodput.spent([goodput.account(goodput.parse(text)) for text in texts])


def _before(store: Store, number: int) -> Iterator[Attempt]:
    """The attempts before attempt `number`, the last one first; those without a log are left out."""
    logs = {entry.key: entry for entry in store.list(paths.ATTEMPTS)}
    for earlier in range(number - 1, 0, -1):
        if entry := logs.get(paths.attempt(earlier)):
            yield _read(store, entry, earlier)


def _read(store: Store, entry: Entry, number: int) -> Attempt:
    first, last = _lines(store, entry, 0), _lines(store, entry, entry.size - _END_BYTES)
    began = next((line for line in first if line["event"] == goodput.BEGIN), {})
    ending = next((line for line in reversed(last) if line["event"] in _ENDS), None)
    times = [line["time"] for line in (*first, *last)]
    stopped = ending is not None and ending.get("status") == errors.AGAIN and not ending.get("lost")
    limited = bool(ending and began.get("ends") and ending["time"] > began["ends"] - _LIMIT_SECONDS)
    said = f"; its last words: {last[-1]['message']}" if last else ""
    return Attempt(
        number,
        str(began.get("host", "?")),
        tuple(began.get("progress", ())),
        max(times) - min(times) if times else 0.0,
        ending["message"] if ending else f"killed, or its machine was lost{said}",
        asked=stopped and not limited,
        taken=stopped or ending is None or bool(ending.get("lost")),
    )


def _lines(store: Store, entry: Entry, start: int) -> Sequence[dict[str, Any]]:
    """The whole lines among some bytes of a log."""
    start = max(0, start)
    if not entry.size:
        return []
    return goodput.parse(storage.read_range(store, entry, start, min(entry.size, start + _END_BYTES)))
