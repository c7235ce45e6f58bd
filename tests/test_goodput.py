"""Where the seconds of a run went, by its logs."""

import json

import pytest

from job import goodput


def phases(*told: tuple[float, str, int | None]) -> list[dict[str, object]]:
    """The lines of a log: when which phase began, and at which step."""
    return [
        {"event": "phase", "time": time, "phase": name, "message": ""} | ({"step": step} if step is not None else {})
        for time, name, step in told
    ]


BEGIN = {"event": "attempt.begin", "time": 1005.0, "started": 1000.0, "message": ""}
METRICS = {"event": "train.metrics", "message": ""}
END = {"event": "run.end", "message": ""}


def test_every_second_of_an_attempt_is_in_one_phase() -> None:
    """From the start of the process to its last word; the first step's surplus is warming up."""
    log = [
        BEGIN,
        *phases((1006.0, "pull", None), (1010.0, "prepare", None), (1012.0, "load", None), (1030.0, "compile", 0)),
        *phases((1035.0, "train", 1), (1043.0, "save", 9), (1043.5, "train", 9)),
        *phases((1044.5, "evaluate", 10), (1046.5, "train", 10), (1047.0, "upload", 10), (1049.0, "publish", None)),
        {**END, "time": 1050.0},
    ]

    told = goodput.account(log)

    assert told.seconds == pytest.approx(
        {
            "start": 6, "pull": 4, "prepare": 2, "load": 18, "compile": 5 - 9.5 / 9, "train": 9.5 + 9.5 / 9,
            "save": 0.5, "evaluate": 2, "upload": 2, "publish": 1,
        }
    )  # fmt: skip
    assert sum(told.seconds.values()) == pytest.approx(50)
    assert (told.resumed, told.reached) == (0, 10)


def test_steps_that_the_next_attempt_does_again_are_lost() -> None:
    """With their share of the time that training took; an attempt that never trained changes nothing."""
    killed = [BEGIN, *phases((1010.0, "compile", 20), (1020.0, "train", 21)), {**METRICS, "time": 1110.0, "step": 30}]
    pulled = [BEGIN, *phases((1010.0, "pull", None)), {**END, "time": 1020.0}]
    last = [BEGIN, *phases((1010.0, "compile", 24), (1020.0, "train", 25), (1110.0, "publish", 34))]

    told = goodput.spent([goodput.account(log) for log in (killed, pulled, last)])

    assert told.lost_steps == 6
    assert told.seconds["lost"] == pytest.approx(60)
    assert told.seconds["train"] == pytest.approx(40 + 100)
    assert told.total == pytest.approx(110 + 20 + 110)
    assert told.goodput == pytest.approx(140 / 240)
    assert told.to_json()["attempts"] == 3


def test_steps_that_are_done_three_times_are_lost_twice() -> None:
    """When the checkpoint that an attempt went on from is found to be damaged later."""
    logs = [
        [
            BEGIN,
            *phases((1000.0, "compile", begun), (1001.0, "train", begun + 1), (1000.0 + end - begun, "upload", end)),
        ]
        for begun, end in ((0, 30), (30, 40), (10, 40))
    ]

    told = goodput.spent([goodput.account(log) for log in logs])

    assert told.lost_steps == 20 + 10
    assert told.seconds["lost"] == pytest.approx(30, rel=0.1)


def test_seconds_before_the_first_line_count() -> None:
    """Also where something is logged before the attempt says when it began."""
    early = {"event": "store.retry", "time": 1030.0, "message": ""}

    told = goodput.account([early, {**BEGIN, "time": 1040.0}, *phases((1042.0, "pull", None))])

    assert told.seconds == {"start": 42}


def test_an_attempt_that_ended_in_its_first_step_lost_nothing_that_anybody_saw() -> None:
    """Nor does it divide by nothing."""
    told = goodput.spent([goodput.account([BEGIN, *phases((1010.0, "compile", 0)), {**END, "time": 1013.0}])])

    assert told.seconds == {"start": 10, "compile": 3}
    assert told.goodput == 0


def test_what_a_kill_cut_off_is_left_out() -> None:
    """Half a line, and lines that are not ours."""
    whole = json.dumps(BEGIN)

    assert goodput.parse(f'te": 3}}\n{whole}\n[1]\n{whole[:20]}'.encode()) == [BEGIN]
