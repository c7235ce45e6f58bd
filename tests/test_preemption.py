"""A request to stop, as every step sees it."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from job import errors, preemption


@pytest.fixture
def notice() -> Iterator[preemption.Notice]:
    """A notice that listens; the signals get their old meaning back afterwards."""
    old = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    made = preemption.Notice()
    made.listen()
    yield made
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", preemption.SIGNALS)
@pytest.mark.usefixtures("notice")
def test_a_signal_interrupts_what_can_be_repeated(number: signal.Signals) -> None:
    """Outside training the job stops at once, by an exception that no library swallows."""
    with pytest.raises(errors.Preempted, match=f"stopped by {number.name}"):
        os.kill(os.getpid(), number)

    assert not issubclass(errors.Preempted, Exception)
    assert errors.Preempted.status == 75


def test_training_is_only_told(notice: preemption.Notice) -> None:
    """Inside the deferred block the request is remembered; a second signal does not break the save."""
    done = False

    def work() -> None:
        nonlocal done
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        done = True

    with pytest.raises(errors.Preempted), notice.deferred():
        work()

    assert done


def test_a_time_limit_is_a_request_some_seconds_before_it(notice: preemption.Notice) -> None:
    """With what is left as the time of grace; nobody has to send a signal."""
    preemption.limit(time.time() + 1.2, 1.0, notice)

    with pytest.raises(errors.Preempted, match="stopped by the scheduler's time limit"):
        time.sleep(10)

    assert notice.grace == 1.0


def test_a_time_limit_that_is_over_already_stops_nothing(notice: preemption.Notice) -> None:
    """Clocks differ, and the scheduler knows its own better."""
    preemption.limit(time.time() + 5, 10.0, notice)
    time.sleep(0.1)

    assert notice.reason is None


def test_nothing_happens_without_a_request(notice: preemption.Notice) -> None:
    """A block that nobody interrupts ends as usual."""
    with notice.deferred():
        pass

    notice.check()


def test_a_signal_after_a_clouds_notice_leaves_what_signals_leave(notice: preemption.Notice) -> None:
    """A node that will be taken away in two minutes is drained before, and gives its pods seconds."""
    with contextlib.suppress(errors.Preempted), notice.deferred():
        notice.request("an AWS spot notice", 115.0)
        before = notice.allowed(10.0)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert before == 115.0
    assert 10.2 <= notice.allowed(10.0) < 20.0


def test_a_second_signal_changes_nothing(notice: preemption.Notice) -> None:
    """The time counts from the first one, and a cloud that gives less still does."""
    with contextlib.suppress(errors.Preempted), notice.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert notice.allowed(30.0) == 30.0
    notice.grace = 5.0
    assert notice.allowed(30.0) == 5.0
