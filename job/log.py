"""What happened: one JSON line per event for programs, and the same events for people on stderr.

The standard library's logger carries the events; this module knows their shape and how they look.
"""

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

_LOGGER = logging.getLogger("job")
_QUIET_SECONDS = 10.0  # between two progress lines where there is no terminal


def event(name: str, message: str, **fields: object) -> None:
    """Record that `name` happened; `message` is for people, `fields` (JSON values) for programs."""
    _LOGGER.info(message, extra={"event": name, "fields": fields})


def phase(name: str, **fields: object) -> None:
    """Record what this attempt's seconds go into from now on (see `goodput`); for programs only."""
    _LOGGER.debug(name, extra={"event": "phase", "fields": {"phase": name, **fields}})


def detail(name: str, message: str, **fields: object) -> None:
    """Record something that is for the file only."""
    _LOGGER.debug(message, extra={"event": name, "fields": fields})


def warn(name: str, message: str, **fields: object) -> None:
    """Record something that the user should look at although the job goes on."""
    _LOGGER.warning(message, extra={"event": name, "fields": fields})


def error(name: str, message: str, **fields: object) -> None:
    """Record why the job ends."""
    _LOGGER.error(message, extra={"event": name, "fields": fields})


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":  # noqa: PLR2004 - the step between decimal units
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return _redacted(json.dumps(line, ensure_ascii=False, default=str))


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{clock} {mark}{_redacted(record.getMessage())}"


def _redacted(text: str) -> str:
    """Without the credentials that somebody wrote into a URL."""
    return re.sub(r"://[^/@\s\"']+@", "://***@", text)


class _File(logging.FileHandler):
    """One that says once that its disk is full, in place of a traceback for every line."""

    _lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._lost:
            self._lost = True
            warn("log.lost", f"the log {self.baseFilename} cannot be written ({error}); the job goes on without")


def to_people(stream: TextIO, *, as_json: bool = False) -> None:
    """Show every event on `stream`: readable lines, or JSON lines for a log collector."""
    _apart()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonLines() if as_json else _PlainLines())
    handler.setLevel(logging.DEBUG if as_json else logging.INFO)
    _LOGGER.addHandler(handler)


def to_file(path: Path, *, anew: bool = False) -> Path:
    """Append every event from now on to `path` as JSON lines, and what the libraries warn of as well.

    `anew` forgets what is there. Returns `path`.
    """
    _apart()
    path.parent.mkdir(parents=True, exist_ok=True)
    if anew:
        path.unlink(missing_ok=True)
    handler = _File(path, encoding="utf-8")
    handler.setFormatter(_JsonLines())
    for logger in (_LOGGER, logging.getLogger()):
        logger.addHandler(handler)
    return path


def _apart() -> None:
    """Keep the libraries' notes out of what people see: they belong into the file."""
    _LOGGER.setLevel(logging.DEBUG)
    _LOGGER.propagate = False
    logging.captureWarnings(True)  # noqa: FBT003 - Python's own signature
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("DeepSpeed").addFilter(_as_the_others)


def _as_the_others(record: logging.LogRecord) -> bool:
    """Let what DeepSpeed would print go where the other libraries' notes go, and nowhere else."""
    logging.getLogger().handle(record)
    return False


@contextlib.contextmanager
def progress(title: str, total: float, stream: TextIO) -> Iterator[Callable[[float, str], None]]:
    """Show how far `title` is: a bar on a terminal, a line every ten seconds elsewhere.

    Yields ``show(done, note)``, `done` in the unit of `total`.
    """
    if stream.isatty():
        with _bar(title, total, stream) as show:
            yield show
    else:
        yield _lines(title, total)


def _lines(title: str, total: float) -> Callable[[float, str], None]:
    last = time.monotonic()

    def show(done: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _QUIET_SECONDS:
            last = time.monotonic()
            event("progress", f"{title}: {done / total:.0%} {note}".rstrip(), done=done, total=total)

    return show


@contextlib.contextmanager
def _bar(title: str, total: float, stream: TextIO) -> Iterator[Callable[[float, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar, _above(stream):
        task = bar.add_task(title, total=total, note="")

        def show(done: float, note: str) -> None:
            bar.update(task, completed=done, note=note)

        yield show


@contextlib.contextmanager
def _above(stream: TextIO) -> Iterator[None]:
    """Let the lines that go to `stream` pass through rich, which writes them above the bar and not into it."""
    showing = [h for h in _LOGGER.handlers if isinstance(h, logging.StreamHandler) and h.stream is stream]
    for handler in showing:
        handler.setStream(sys.stderr)  # rich has put its own in place of it
    try:
        yield
    finally:
        for handler in showing:
            handler.setStream(stream)
