"""The program that verifies, in a separate process: started early, asked once or several times."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_PROGRAM = Path(__file__).with_name("plain.py")
_POLL = 0.05  # seconds
_MARGIN = 0.05  # of the time: the program ends by itself so much earlier, with what it has


@dataclass(frozen=True)
class Outcome:
    """What the program answered, model by model, and why it ended before all of them, if so."""

    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    unanswered: str = ""
    """Why models have no answer; the first of them is the one at which the program ended."""
    timed_out: bool = False


class Program:
    """The running program; where it has died, the next question starts it again."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def start(self) -> None:
        """Start it if it does not run: its imports take seconds, during which others work."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        command = [sys.executable, "-P", str(_PROGRAM)]
        self._process = subprocess.Popen(  # noqa: S603 - ours
            command,
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C and signals to the whole group are for the job; end of input ends this
        )

    def ask(
        self,
        models: Sequence[Mapping[str, Any]],
        examples: Sequence[Mapping[str, Any]],
        scratch: Path,
        ends: float,
    ) -> Outcome:
        """Return its answers about the `models`; it is killed at `ends`, by `time.monotonic`."""
        self.start()
        questions, answers = scratch / "asked.json", scratch / "told.jsonl"
        early = ends - _MARGIN * max(0.0, ends - time.monotonic())
        text = json.dumps({"models": models, "examples": examples, "ends": early})
        questions.write_text(text, encoding="utf-8")
        answers.unlink(missing_ok=True)
        process = self._process
        assert process
        assert process.stdin
        with contextlib.suppress(OSError):  # it has died, which is found below
            process.stdin.write(
                json.dumps({"questions": str(questions), "answers": str(answers)}).encode() + b"\n",
            )
            process.stdin.flush()
        while process.poll() is None and time.monotonic() < ends:
            if _is_finished(answers):
                break
            time.sleep(_POLL)
        found = _read(answers)
        if _is_finished(answers):
            return Outcome(found)
        if process.poll() is None:
            self.stop()
            return Outcome(found, "the time was over", timed_out=True)
        return Outcome(
            found,
            f"the program that looks at it ended with {process.poll()}: {self._last_words()}",
        )

    def stop(self) -> None:
        """End it, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin:
                with contextlib.suppress(OSError):  # what was not read any more
                    self._process.stdin.close()
        if self._errors is not None:
            self._errors.close()
        self._process = self._errors = None

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]


@contextlib.contextmanager
def started(environ: Mapping[str, str], gpus: Sequence[str], *, wanted: bool) -> Iterator[Program]:
    """Yield the program, started at once if it is `wanted`, with the `gpus` in their order."""
    order = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name; examples differ in length
        order["PYTORCH_ALLOC_CONF"] = environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    program = Program({**environ, **order})
    if wanted:
        program.start()
    try:
        yield program
    finally:
        program.stop()


def _is_finished(answers: Path) -> bool:
    """Whether the last line is the empty one that the program writes behind the last model."""
    return answers.is_file() and answers.read_bytes()[-2:] in (b"\n\n", b"\n")


def _read(answers: Path) -> dict[str, dict[str, Any]]:
    lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
    found = {}
    for line in filter(None, lines):
        with contextlib.suppress(ValueError):  # the last one may be torn
            answer = json.loads(line)
            found[answer["name"]] = answer
    return found
