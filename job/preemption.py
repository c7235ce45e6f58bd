"""Has the cluster asked us to stop? Signals are turned into one notice that every step can see."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from job import errors, log

_FAILED = signal.SIGRTMIN  # by which a thread of ours wakes the main one; nobody else sends it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Notice:
    """The request to stop.

    Outside training it interrupts at once: everything there is safe to repeat. Inside ``deferred()`` it is
    only remembered, so that the training loop can save at the next step boundary.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deferred = False
        self._failure: BaseException | None = None

    def listen(self) -> None:
        """Take over the signals by which schedulers announce that they will take the machine away."""
        for number in SIGNALS:
            signal.signal(number, self._heard)
        signal.signal(_FAILED, self._failed)

    def check(self) -> None:
        """Raise `errors.Preempted` if the request has come."""
        if self.reason:
            raise errors.Preempted(f"stopped by {self.reason}; start the same command again to go on")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember the request until the block ends, then honour it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def interrupt(self, failure: BaseException) -> None:
        """Raise `failure` in the main thread, at once and whatever it does; for other threads."""
        self._failure = failure
        signal.pthread_kill(threading.main_thread().ident or 0, _FAILED)

    def conclude(self) -> None:
        """From now on hear nothing: the outcome is certain, and what is left to do takes a moment."""
        for number in (*SIGNALS, _FAILED):
            signal.signal(number, signal.SIG_IGN)

    def _failed(self, _number: int, _frame: FrameType | None) -> None:
        if self._failure:
            raise self._failure

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        again = self.reason is not None
        self.reason = signal.Signals(number).name
        if not again:
            log.warn("preemption.notice", f"asked to stop ({self.reason})", signal=self.reason)
        if not self._deferred and not again:
            self.check()
