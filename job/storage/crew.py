"""A few threads side by side: the first error, or a signal, stops them all; what they do is counted and shown."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from job import errors, log
from job.storage import patience

_LEAVE_SECONDS = 2.0  # how long a stopped crew is waited for: its threads notice at their next block
_SAID = 3  # retries that get a line of their own; the rest are counted

Outcome = TypeVar("Outcome")
Task = Callable[[], object]


class _StoppedError(Exception):
    """Somebody else failed, or the job was asked to stop, so this transfer is given up."""


class Crew:
    """What the threads of one transfer share."""

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show, self._stop, self._lock = show, threading.Event(), threading.Lock()
        self.done, self.retries = 0, 0

    def check(self) -> None:
        """Raise if the transfer was given up."""
        if self._stop.is_set():
            raise _StoppedError

    def advance(self, count: int) -> None:
        """Tell that `count` more bytes are there."""
        with self._lock:
            self.done += count
            self._show(self.done, self._note())

    def keep_trying(self, attempt: Callable[[], Outcome]) -> Outcome:
        """Call `attempt` with the usual patience, unless the transfer is given up meanwhile."""

        def wait(seconds: float) -> None:
            self._stop.wait(seconds)
            self.check()

        return patience.USUAL.keep_trying(attempt, self.retried, wait)

    def work(self, tasks: Iterable[Task]) -> None:
        """Do all `tasks`, several at once; raises the first error, when the others have stopped."""
        todo, ended = _Shared(tasks), queue.SimpleQueue[BaseException | None]()
        # Daemons: a thread that waits for a silent server must not keep a process that was told to stop.
        threads = [threading.Thread(target=self._labour, args=(todo, ended), daemon=True) for _ in range(_hands())]
        try:
            for thread in threads:
                thread.start()
            failed = next((error for _ in threads if (error := ended.get())), None)
        except BaseException:
            self._dismiss(threads)
            raise
        if failed:
            self._dismiss(threads)
            raise failed

    def _dismiss(self, threads: Sequence[threading.Thread]) -> None:
        self._stop.set()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in threads:
            if thread.is_alive():  # the request to stop may have come before all of them were started
                thread.join(max(0.0, deadline - time.monotonic()))

    def _labour(self, todo: "_Shared", ended: "queue.SimpleQueue[BaseException | None]") -> None:
        try:
            while not self._stop.is_set() and (task := todo.next()):
                task()
        except _StoppedError:
            ended.put(None)
        except BaseException as e:  # noqa: BLE001 - it is raised again in the thread that waits
            ended.put(e)
        else:
            ended.put(None)

    def retried(self, error: errors.StoreError, tried: int) -> None:
        """Count and say that something is tried again."""
        self.check()
        with self._lock:
            self.retries += 1
            said = self.retries
        if said <= _SAID:
            more = "" if said < _SAID else "; further ones are only counted"
            log.warn("store.retry", f"{error}; trying again{more}", tried=tried, retries=said)

    def _note(self) -> str:
        return f"({self.retries} requests tried again)" if self.retries else ""


def _hands() -> int:
    """Connections at once. S3 gives each about 85 MB/s (its performance guide), so a fast network needs many.

    A machine with few cores is slower with more of them.
    """
    return max(4, min(32, 3 * (os.cpu_count() or 1)))


class _Shared:
    """Tasks that several threads take from, each its next."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()

    def next(self) -> Task | None:
        with self._lock:
            return next(self._tasks, None)


@contextlib.contextmanager
def crew(name: str, title: str, size: int) -> Iterator[Crew]:
    """A crew that transfers `size` bytes; in the end it is said how long that took, and what had to be repeated."""
    begun = time.monotonic()
    with log.progress(title, max(size, 1), sys.stderr) as show:
        hands = Crew(show)
        yield hands
    seconds = time.monotonic() - begun
    if hands.done:
        log.event(
            name,
            f"{title}: {log.size(hands.done)} in {seconds:.1f} s ({log.size(hands.done / seconds)}/s)"
            + (f", {hands.retries} requests tried again" if hands.retries else ""),
            bytes=hands.done,
            seconds=round(seconds, 3),
            retries=hands.retries,
        )
