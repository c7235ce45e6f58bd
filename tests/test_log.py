"""Events, as people and as programs read them."""

import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from job import log


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A stream that people read, and the loggers as they were afterwards."""
    loggers = [logging.getLogger("job"), logging.getLogger()]
    before = [list(logger.handlers) for logger in loggers]
    yield io.StringIO()
    for logger, handlers in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
    loggers[0].propagate = True
    logging.captureWarnings(False)  # noqa: FBT003 - Python's own signature


def test_people_read_lines(stream: io.StringIO) -> None:
    """A time, a mark for what is not well, and the message."""
    log.to_people(stream)

    log.event("pull.done", "the base is here", bytes=7)
    log.warn("data.cut", "two examples were cut")

    one, two = stream.getvalue().splitlines()
    assert one.endswith(" the base is here")
    assert two.endswith(" warning: two examples were cut")


def test_programs_read_json(stream: io.StringIO) -> None:
    """One object per line with the event's name and fields."""
    log.to_people(stream, as_json=True)

    log.event("pull.done", "the base is here: 模型", bytes=7)

    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["bytes"], line["message"]) == (
        "pull.done",
        "info",
        7,
        "the base is here: 模型",
    )


def test_what_libraries_say_goes_to_the_file_only(stream: io.StringIO, tmp_path: Path) -> None:
    """Nothing is lost, and nothing stands between our lines."""
    log.to_people(stream)
    log.to_file(tmp_path / "attempt.jsonl")

    logging.getLogger("some.library").warning("old checkpoint format")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("will change", FutureWarning, stacklevel=1)
    log.event("run.done", "done")

    kept = [json.loads(line)["message"] for line in (tmp_path / "attempt.jsonl").read_text().splitlines()]
    assert kept[0] == "old checkpoint format"
    assert "will change" in kept[1]
    assert kept[2] == "done"
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (14_500_000_000, "14.5 GB"), (2e15, "2000000.0 GB")]
)
def test_sizes_are_readable(count: float, text: str) -> None:
    """Decimal units, as clouds bill them."""
    assert log.size(count) == text


def test_on_a_terminal_lines_stand_above_the_bar(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar moves, and an event in between is a line of its own."""
    reader, writer = os.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        log.to_people(terminal)
        with log.progress("train", 10, terminal) as show:
            show(4, "loss 1.0")
            time.sleep(0.3)  # the bar moves ten times a second
            log.event("checkpoint.saved", "checkpoint sealed")
            show(10, "loss 0.5")
        log.event("run.done", "done")
        terminal.flush()
        seen = b""
        while b" done\r\n" not in seen:
            seen += os.read(reader, 4096)
    os.close(reader)

    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    lines = re.split(r"[\r\n]+", plain)
    assert any(re.fullmatch(r"[0-9:]{8} checkpoint sealed *", line) for line in lines)
    assert any("train" in line and "40%" in line and "loss 1.0" in line for line in lines), lines
    assert re.fullmatch(r"[0-9:]{8} done", lines[-2])
    assert stream.getvalue() == ""


def test_progress_without_a_terminal_is_a_line_now_and_then(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one in ten seconds, however often it is told."""
    log.to_people(stream)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    with log.progress("train", 100, stream) as show:
        for done in range(100):
            now += 0.5
            show(done, "loss 1.0")

    lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert lines[0].startswith("train: ")
    assert lines[0].endswith("% loss 1.0")
    assert 4 <= len(lines) <= 5
