"""The request to stop, and who hears it when."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from job import errors, log

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_WAKE = signal.SIGRTMIN  # by which a thread of ours makes the main one look; nobody else sends it
STOP = signal.SIGPWR  # by which the job hands the request on to those that train; nobody else sends it


class Notice:
    """The request to stop, or another thread's failure.

    Outside training it interrupts at once: everything there is safe to repeat. Inside ``deferred()`` it is
    only remembered, so that the training loop can save at the next step boundary.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.since = 0.0  # when the request came, by time.monotonic()
        self.grace: float | None = None  # seconds from then to the end of the machine, if the cluster said so
        self.at_risk: str | None = None  # why the request may come soon
        self.failure: errors.JobError | None = None  # of another thread, not raised yet
        self.interruption: BaseException | None = None  # what `check` raised last
        self._hurried: float | None = None  # when a signal came after the first request, by time.monotonic()
        self._failed = threading.Event()
        self._deferred, self._concluded = False, False

    def listen(self) -> None:
        """Take over the signals by which schedulers announce that they will take the machine away.

        Raises `errors.Preempted` if one came before, while they were blocked.
        """
        for number in (*SIGNALS, STOP):
            signal.signal(number, self._heard)
        signal.signal(_WAKE, self._woken)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [*SIGNALS, STOP])

    def check(self) -> None:
        """Raise the failure of another thread, once, or `errors.Preempted` if the request has come."""
        self.interruption = self.take()
        if self.interruption is None and self.reason:
            self.interruption = errors.Preempted(f"stopped by {self.reason}; start the same command again to go on")
        if self.interruption is not None:
            raise self.interruption

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember what comes until the block ends, then honour it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def request(self, reason: str, grace: float) -> None:
        """Ask to stop, like a signal, `grace` seconds before the machine is gone; for other threads."""
        self.grace = grace if self.reason is None else self.grace
        if self._note(reason):
            _wake()

    def allowed(self, usual: float) -> float:
        """Seconds from `since` to the end of the machine, where a signal leaves `usual` ones.

        A signal that follows a cloud's notice may leave less than the notice said: a node that is drained because it
        will be taken away gives its pods less than the cloud gives the node.
        """
        told = usual if self.grace is None else self.grace
        return told if self._hurried is None else min(told, self._hurried - self.since + usual)

    def warn(self, reason: str) -> None:
        """Say that the request may come soon, so that a checkpoint is worth its time now."""
        if self.at_risk is None:
            self.at_risk = reason
            log.warn("preemption.risk", f"the machine may be taken away soon ({reason})")

    def interrupt(self, failure: errors.JobError) -> None:
        """Raise `failure` in the main thread, like a request; for other threads. The first one counts, which is why.

        That another start owns the run counts more.
        """
        if self.failure is None or isinstance(failure, errors.FencedError):
            self.failure = failure
        self._failed.set()
        _wake()

    def wait(self, seconds: float) -> None:
        """Pause for some seconds, or until there is a failure."""
        self._failed.wait(seconds)
        self._failed.clear()

    def take(self) -> errors.JobError | None:
        """The failure of another thread, which is not raised any more."""
        failure, self.failure = self.failure, None
        return failure

    def conclude(self) -> None:
        """From now on hear nothing: the outcome is certain, and what is left to do takes a moment."""
        self._concluded = True  # before anything else: a signal may come between any two lines
        for number in (*SIGNALS, STOP, _WAKE):
            signal.signal(number, signal.SIG_IGN)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if self.reason and self._hurried is None:
            self._hurried = time.monotonic()
        if not self._concluded and self._note(signal.Signals(number).name) and not self._deferred:
            self.check()

    def _woken(self, _number: int, _frame: FrameType | None) -> None:
        if not self._concluded and not self._deferred:
            self.check()

    def _note(self, reason: str) -> bool:
        """Remember the first request; False if there was one already."""
        if self.reason:
            return False
        self.reason, self.since = reason, time.monotonic()
        log.warn("preemption.notice", f"asked to stop ({reason})", reason=reason)
        return True


def _wake() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
