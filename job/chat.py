"""A conversation in a terminal: words appear as they are said, adapters are switched in between."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from job import errors
from job.config import Sampling

if TYPE_CHECKING:
    from job.model.talk import Speaker

_HELP = """\
/adapter NAME   answer with that adapter       /base    answer with the base alone
/reset          forget what was said           /quit    leave, as Ctrl-D does
Ctrl-C stops an answer. What begins with two slashes is said with one."""


class Chat:
    """What was said so far, to a `speaker`, who answers on the stream `out`."""

    def __init__(self, speaker: "Speaker", how: Sampling, out: TextIO) -> None:
        self._speaker, self._how, self._out = speaker, how, out
        self._said: list[dict[str, str]] = []
        self._turn = 0

    def run(self, ask: Callable[[str], str]) -> None:
        """Go on until the user leaves; `ask` shows a prompt and returns a line, or raises `EOFError`."""
        self._tell("loading the model")
        self._speaker.load()
        self._tell(f"{self._who()}; /help tells the commands")
        while True:
            try:
                line = ask("> ").strip()
                if line == "/quit":
                    return
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line:
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt, or in the moment before
                self._tell("\n(/quit leaves)")

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name == "reset":
            self._said.clear()
            self._tell("(forgotten)")
        elif name in ("base", "adapter"):
            self._use(argument.strip() if name == "adapter" else None)
        else:
            self._tell(_HELP if name == "help" else f"there is no command /{name}\n{_HELP}")

    def _use(self, name: str | None) -> None:
        if name == "":
            self._tell(f"which one? There is {', '.join(self._speaker.adapters) or 'none'}")
            return
        try:
            self._speaker.use(name)
        except errors.ConfigError as e:
            self._tell(str(e))
        else:
            self._tell(f"({self._who()})")

    def _who(self) -> str:
        return f"adapter {self._speaker.adapter}" if self._speaker.adapter else "the base model"

    def _answer(self, line: str) -> None:
        self._said.append({"role": "user", "content": line})
        stop = threading.Event()
        try:
            with _interrupting(stop):
                self._said.append({"role": "assistant", "content": self._streamed(stop)})
        except BrokenPipeError:
            raise
        except Exception as e:  # noqa: BLE001 - a template, a tokenizer or a GPU that fails once is no reason to leave
            self._said.pop()
            self._tell(f"(no answer: {type(e).__name__}: {e})")
            return
        self._turn += 1
        self._tell(" (stopped)" if stop.is_set() else "")  # Ctrl-C is for the prompt again by now

    def _streamed(self, stop: threading.Event) -> str:
        """Say the answer to what was said so far, and return it."""
        prompt, said = self._fitting(), ""
        room = self._speaker.context - len(prompt)
        if room < 1:
            raise ValueError(f"that is too long: the model reads {self._speaker.context} tokens")
        how = self._how.model_copy(update={"max_tokens": min(self._how.max_tokens, room)})
        for part in self._speaker.stream(prompt, how, self._how.seed + self._turn, stop):
            said += part
            self._out.write(part)
            self._out.flush()
        return said

    def _fitting(self) -> list[int]:
        """The tokens of the conversation, without its oldest turns if it has become too long."""
        while True:
            prompt = self._speaker.prompt(self._said)
            if len(prompt) + self._how.max_tokens <= self._speaker.context or len(self._said) == 1:
                return prompt
            del self._said[:2]
            self._tell("(the oldest question and its answer are forgotten: the model reads no more)")

    def _tell(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()


@contextmanager
def _interrupting(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `stop` instead of ending the program."""

    def heard(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
