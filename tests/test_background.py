"""Checkpoints on their way while training goes on."""

import dataclasses
import threading
import time
from collections.abc import Callable

import pytest
import torch

from job import errors
from job.checkpoint import Background, most_copies
from job.checkpoint.state import State


class Slow:
    """Saves when it is told to, and fails as it is told to."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int | None]] = []
        self.failures: list[errors.JobError] = []
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)

    def save(self, state: State, best_step: int | None) -> None:
        self.begun.release()
        assert self.may.acquire(timeout=10)
        if self.failures:
            raise self.failures.pop(0)
        self.saved.append((state.step, best_step))


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def background(slow: Slow) -> Background:
    return Background(slow)  # type: ignore[arg-type]


def state(step: int) -> State:
    return State(step, {"w": torch.zeros(1)}, {}, {}, "{}")


def test_training_does_not_wait(slow: Slow, background: Background, said: Callable[[], str]) -> None:
    """While one checkpoint is on its way, the newest takes the place of older ones that wait, and that is said."""
    for step in (1, 2, 3, 4):
        background.submit(state(step), None)
        if step == 1:
            assert slow.begun.acquire(timeout=10)
    slow.may.release(9)
    background.finish()

    assert slow.saved == [(1, None), (4, None)]
    assert "the checkpoint at step 2 was not sent before the next one was due" in said()


def test_memory_is_used_again(slow: Slow, background: Background) -> None:
    """That of a state which is safe, or waits and would be given up for the next; not that of one on its way."""
    states = [state(step) for step in (1, 2, 3)]
    background.submit(states[0], None)
    assert slow.begun.acquire(timeout=10)
    assert background.spare() is None
    background.submit(states[1], None)
    assert background.spare(best_step=2) is None
    assert background.spare() is states[1]
    background.submit(states[2], None)
    slow.may.release(9)
    background.finish()

    assert slow.saved == [(1, None), (3, None)]
    assert [background.spare(), background.spare(), background.spare()] == [states[2], states[0], None]


@pytest.mark.parametrize("keep_best", [True, False])
def test_memory_is_bounded_and_training_never_waits(slow: Slow, background: Background, keep_best: bool) -> None:  # noqa: FBT001 - pytest's
    """However slow the store is; the best one and the last one arrive, and uploads that fail change nothing."""
    slow.failures = [errors.StoreError("the store is away") for _ in range(2)]
    copies, best = [], None
    for step in range(1, 40):
        best = step if keep_best and step in (2, 3, 11, 30) else best
        spare = background.spare(best)
        if spare is None:
            spare = state(0)
            copies.append(spare)
        background.submit(dataclasses.replace(spare, step=step), best)  # copied into the same memory
        if step % 9 == 0:
            slow.may.release()
            assert slow.begun.acquire(timeout=10)
    slow.may.release(99)
    background.finish()

    assert len({id(copy.adapter) for copy in copies}) == len(copies) <= most_copies(keep_best=keep_best)
    assert slow.saved[-1][0] == 39
    assert not keep_best or 30 in [step for step, _ in slow.saved]


def test_the_best_one_always_arrives(slow: Slow, background: Background) -> None:
    """And before the checkpoints that rely on it, because saving those forgets the best one before it."""
    background.submit(state(1), None)
    assert slow.begun.acquire(timeout=10)
    for step in (2, 3, 4):
        background.submit(state(step), 2)
    slow.may.release(9)
    background.finish()

    assert slow.saved == [(1, None), (2, 2), (4, 2)]


@pytest.mark.parametrize("failure", [errors.StoreError, errors.ConflictError, errors.ChangedError])
def test_a_store_that_fails_for_a_while_does_not_stop_training(
    failure: type[errors.JobError], slow: Slow, background: Background, said: Callable[[], str]
) -> None:
    """It is said loudly, and what is the newest or the best is tried again; also where a late try of ours came between.

    Who lost the run hears that instead, as an error of its own.
    """
    slow.failures = [failure("the store is away") for _ in range(3)]
    background.submit(state(1), 1)
    for _ in range(2):
        assert slow.begun.acquire(timeout=10)
        slow.may.release()
    assert slow.begun.acquire(timeout=10)
    background.submit(state(2), 1)
    slow.may.release(9)
    while slow.failures:
        time.sleep(0.01)
    background.finish()

    assert slow.saved == [(1, 1), (2, 1)]
    assert "the checkpoint at step 1 is not safe: the store is away. Training goes on, and this one is tried" in said()


def test_a_checkpoint_that_fails_yields_to_a_newer_one(slow: Slow, background: Background) -> None:
    """Nobody needs it any more."""
    slow.failures = [errors.StoreError("the store is away")]
    background.submit(state(1), None)
    assert slow.begun.acquire(timeout=10)
    background.submit(state(2), None)
    slow.may.release(9)
    background.finish()

    assert slow.saved == [(2, None)]


def test_training_does_not_end_before_its_last_checkpoint_is_safe(slow: Slow, background: Background) -> None:
    """What could not be saved in the end is an error of the run."""
    slow.failures = [errors.StoreError("the store is away")]
    background.submit(state(1), None)
    threading.Timer(0.3, slow.may.release).start()

    with pytest.raises(errors.StoreError, match="the store is away"):
        background.finish()

    assert slow.saved == []


@pytest.mark.parametrize("failure", [errors.DeniedError("403"), errors.FencedError("another start owns the run")])
def test_what_no_further_checkpoint_can_get_around_stops_training(
    failure: errors.JobError, slow: Slow, background: Background
) -> None:
    """At the next step: hours of training that cannot be saved are worth nothing."""
    slow.failures = [failure]
    background.submit(state(1), None)
    slow.may.release(9)

    with pytest.raises(type(failure)):
        background.finish()
    with pytest.raises(type(failure)):
        background.check()
    with pytest.raises(type(failure)):
        background.submit(state(2), None)

    assert slow.saved == []
