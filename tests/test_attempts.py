"""What the starts of a run did, and when it is time to give up."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job import attempts, errors, log, paths, storage


@pytest.fixture
def store(tmp_path: Path) -> storage.Store:
    return storage.connect((tmp_path / "store").as_uri())


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What happens in the block is logged to `path`."""
    loggers = (logging.getLogger("job"), logging.getLogger())
    before = [list(logger.handlers) for logger in loggers]
    log.to_file(path)
    yield
    for logger, kept in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(kept):
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture
def attempt(store: storage.Store, tmp_path: Path, said: Callable[[], str]) -> Callable[..., None]:  # noqa: ARG001 - makes the job's code talk
    """One start of the run from its beginning to its end, or to where it was killed."""

    def start(
        number: int,
        progress: tuple[int, int],
        ending: str | None = "no store",
        status: int = 1,
        limit: int = 3,
        ends: float | None = None,
        *,
        lost: bool = False,
    ) -> None:
        path = tmp_path / f"{number}.jsonl"
        with logged(path):
            attempts.begin(store, path, number, progress, limit, ends)
            log.event("pull.done", "pulled the base")
            if ending:
                log.error("run.end", ending, status=status, lost=lost)
                attempts.keep(store, path, paths.attempt(number), lambda: None)

    return start


def test_an_attempt_is_there_from_its_first_moment(store: storage.Store, attempt: Callable[..., None]) -> None:
    """One that is killed leaves when and where it began, and how far the run was."""
    attempt(1, (0, 20), ending=None)

    there = store.read("attempts/1.jsonl")

    assert there
    line = json.loads(there.data.splitlines()[0])
    assert (line["event"], line["attempt"], line["progress"]) == ("attempt.begin", 1, [0, 20])


def test_a_time_limit_that_is_too_short_is_no_bad_luck(attempt: Callable[..., None]) -> None:
    """Every start has as little time as the last; one that is stopped long before its limit was only unlucky."""
    now = time.time()
    attempt(1, (0, 20), "stopped by SIGUSR1", status=75, ends=now + 120)
    attempt(2, (0, 20), "stopped by SIGTERM", status=75, ends=now + 3600)
    attempt(3, (0, 20), "stopped by the scheduler's time limit", status=75, ends=now + 110)
    attempt(4, (0, 20), "stopped by SIGUSR1", status=75, ends=now + 120)

    with pytest.raises(errors.PermanentError, match="3 attempts in a row made no progress"):
        attempt(5, (0, 20))
    attempt(6, (0, 40))


def test_attempts_that_get_nowhere_end_for_good_with_their_reasons(
    store: storage.Store, attempt: Callable[..., None]
) -> None:
    """The start that gives up does not count as one, nor do those that were asked to stop: they did nothing wrong."""
    attempt(1, (0, 10))
    attempt(2, (0, 20))
    attempt(3, (0, 20), "asked to stop", status=75)
    attempt(4, (0, 20), ending=None)
    attempt(5, (0, 20), "the disk is full")

    with pytest.raises(errors.PermanentError) as caught:
        attempt(6, (0, 20))

    assert caught.value.status == 64
    told = str(caught.value).splitlines()
    assert "3 attempts in a row made no progress" in told[0]
    assert "attempt 2 on " in told[1]
    assert told[1].endswith("no store")
    assert "killed, or its machine was lost" in told[2]
    assert told[3].endswith("the disk is full")
    assert "larger run.give_up_after (it is 3)" in told[4]
    assert store.read("attempts/6.jsonl") is None


def test_losses_that_nobody_is_to_blame_for_come_to_an_end_too(attempt: Callable[..., None]) -> None:
    """A scheduler never counts them, so the run does; one that got further in between begins the count anew."""
    attempt(1, (0, 10), "lost another process", status=75, lost=True)
    for number in (2, 3, 4):
        attempt(number, (0, 20), "lost another process", status=75, lost=True)

    with pytest.raises(errors.PermanentError, match="3 attempts in a row made no progress"):
        attempt(5, (0, 20))


def test_progress_begins_the_count_anew(attempt: Callable[..., None]) -> None:
    """A run on short-lived machines may take any number of attempts, as long as each of them brings something."""
    for number in range(1, 9):
        attempt(number, (0, number))
    attempt(9, (1, 0))


def test_a_larger_limit_lets_a_run_go_on(attempt: Callable[..., None]) -> None:
    """Who removed the reason says so."""
    for number in range(1, 4):
        attempt(number, (0, 0))
    with pytest.raises(errors.PermanentError):
        attempt(4, (0, 0))

    attempt(4, (0, 0), limit=4)


def test_the_time_between_preemptions_is_what_this_run_saw(store: storage.Store, attempt: Callable[..., None]) -> None:
    """A kill, a request to stop and a lost machine count, an error does not; without any, some hours are assumed."""
    assert attempts.between(store, 1) == 4 * 3600
    ends = ({"status": 75}, None, {"status": 1}, {"status": 75, "lost": True})
    for number, event in enumerate(ends, start=1):
        attempt(number, (0, number), ending=None)
        lines = [
            {"event": "attempt.begin", "message": "", "time": 1000.0},
            {"event": "x", "message": "", "time": 4600.0},
        ]
        ending = [{"event": "run.end", "message": "", "time": 4600.0, **event}] if event else []
        store.put(f"attempts/{number}.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in [*lines, *ending]))

    assert attempts.between(store, 5) == pytest.approx((4 * 3600 + 4 * 3600) / 4)
