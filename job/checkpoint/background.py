"""Checkpoints on their way to the store while training goes on."""

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from job import errors, log
from job.checkpoint.kept import Checkpoints

if TYPE_CHECKING:
    from job.checkpoint.state import State

_LOOK_SECONDS = 0.2  # how soon a waiting main thread hears a signal
_PASSING = (errors.StoreError, errors.ConflictError, errors.ChangedError)  # a late write of our own may be in the way


def most_copies(*, keep_best: bool) -> int:
    """Return how many states `Background` has in host memory at most."""
    return 3 if keep_best else 2


class Background:
    """Saves states in a thread of its own, one after another; the memory of one that is done with is in `spare`.

    Three of them are in memory at most: one that is being uploaded, the best one if it still waits, and the newest.
    Training never waits: where the network is slower than the cadence, the next state is copied into the memory of
    the newest one that still waits, which is given up. The last and the best one always arrive.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._changed = threading.Condition()
        self._waiting: list[tuple[State, int | None]] = []
        self._done: list[State] = []
        self._busy, self._closing = False, False
        self._failure: Exception | None = None
        self.upload = 0.0  # seconds that it took to be safe, from when its turn came
        threading.Thread(target=self._work, daemon=True, name="checkpoints").start()

    def submit(self, state: "State", best_step: int | None) -> None:
        """Save `state` soon; `best_step` is the step of the best one so far. Raises what `check` does."""
        self.check()
        with self._changed:
            for dropped, _ in (waiting for waiting in self._waiting if waiting[0].step != best_step):
                self._done.append(dropped)
                self._tell_given_up(dropped.step)
            self._waiting = [
                *(waiting for waiting in self._waiting if waiting[0].step == best_step),
                (state, best_step),
            ]
            self._changed.notify_all()

    def active(self) -> bool:
        """Whether a state is on its way, or waits for its turn."""
        return self._busy or bool(self._waiting)

    def spare(self, best_step: int | None = None) -> "State | None":
        """Return a state to be overwritten by the next one that is submitted; None if there is none.

        That is one that is done with, or else one that waits and is not the best so far, of `best_step`: it would be
        given up anyway when the next one is submitted, and memory stays bounded.
        """
        with self._changed:
            if self._done:
                return self._done.pop()
            for place, (waiting, _) in enumerate(self._waiting):
                if waiting.step != best_step:
                    del self._waiting[place]
                    self._tell_given_up(waiting.step)
                    return waiting
            return None

    def expected(self) -> float:
        """Seconds until a state that is submitted now will be safe; 0 if none has been saved yet."""
        return self.upload * (1 + self._busy + len(self._waiting))

    def failed(self) -> bool:
        """Whether `check` would raise."""
        return self._failure is not None

    def check(self) -> None:
        """Raise the error, if there was one, that no further checkpoint could get around."""
        if self._failure:
            raise self._failure

    def finish(self, left: Callable[[], float] = lambda: math.inf) -> None:
        """Wait until all that was submitted is in the store, as long as there are seconds `left`.

        Raises the error of what is not there.
        """
        with self._changed:
            self._closing = True
            while (self._waiting or self._busy) and not self._failure:
                if left() <= 0:
                    log.warn("checkpoint.late", "no time is left for the last checkpoint: the one before it counts")
                    return
                self._changed.wait(_LOOK_SECONDS)
        self.check()

    @staticmethod
    def _tell_given_up(step: int) -> None:
        log.warn(
            "checkpoint.slow",
            f"the checkpoint at step {step} was not sent before the next one was due: checkpoints take longer than the "
            "time between them",
            step=step,
        )

    def _work(self) -> None:
        while True:
            state, best_step = self._next()
            failure = self._save(state, best_step)
            with self._changed:
                self._busy = False
                needed = state.step == best_step or not self._waiting
                if isinstance(failure, _PASSING) and not (self._closing and needed):
                    self._waiting[:0] = [(state, best_step)] if needed else []
                    self._done += [] if needed else [state]
                    log.warn(
                        "checkpoint.failed",
                        f"the checkpoint at step {state.step} is not safe: {failure}. Training goes on, and this one "
                        f"{'is tried again' if needed else 'is left out for a newer one'}",
                        step=state.step,
                    )
                    failure = None
                elif not failure:
                    self._done.append(state)
                self._failure = failure
                self._changed.notify_all()
                if failure:
                    return

    def _next(self) -> "tuple[State, int | None]":
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            self._busy = True
            return self._waiting.pop(0)

    def _save(self, state: "State", best_step: int | None) -> Exception | None:
        begun = time.monotonic()
        try:
            self._checkpoints.save(state, best_step)
            self.upload = time.monotonic() - begun
        except Exception as e:  # noqa: BLE001 - it is raised again in the thread that trains
            return e
        return None
