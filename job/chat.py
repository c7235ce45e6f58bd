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

_ANSWERED = 4  # a share of the context that an answer can count on
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
        self._asking, self._stop = False, threading.Event()

    def run(self, ask: Callable[[str], str]) -> None:
        """Go on until the user leaves; `ask` shows a prompt and returns a line, or raises `EOFError`."""
        self._tell("loading the model")
        self._speaker.load()
        self._tell(f"{self._who()}; /help tells the commands")
        with self._hearing():
            while (line := self._asked(ask)) != "/quit":
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line:
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _asked(self, ask: Callable[[str], str]) -> str:
        """What the user says; nothing if he pressed Ctrl-C instead, and /quit if he has left."""
        try:
            self._asking = True
            try:
                if self._stop.is_set():  # in the moment before
                    raise KeyboardInterrupt
                return ask("> ").strip()
            finally:
                self._asking = False
        except EOFError:
            return "/quit"
        except KeyboardInterrupt:
            self._tell("\n(/quit leaves)")
            self._stop.clear()
            return ""

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Let Ctrl-C stop an answer; at the prompt, and only there, the first of several is an exception."""

        def heard(_number: int, _frame: FrameType | None) -> None:
            self._stop.set()
            if self._asking:
                self._asking = False
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
        try:
            self._said.append({"role": "assistant", "content": self._streamed(self._stop)})
        except BrokenPipeError:
            raise
        except Exception as e:  # noqa: BLE001 - a template, a tokenizer or a GPU that fails once is no reason to leave
            self._said.pop()
            self._tell(f"(no answer: {type(e).__name__}: {e})")
            return
        stopped = self._stop.is_set()
        self._stop.clear()  # Ctrl-C is for the prompt again
        self._turn += 1
        self._tell(" (stopped)" if stopped else "")

    def _streamed(self, stop: threading.Event) -> str:
        """Say the answer to what was said so far, and return it."""
        prompt, said = self._fitting(), ""
        room = self._speaker.context - len(prompt)
        how = self._how.model_copy(update={"max_tokens": min(self._how.max_tokens, room)})
        for part in self._speaker.stream(prompt, how, self._how.seed + self._turn, stop):
            said += part
            self._out.write(part)
            self._out.flush()
        return said

    def _fitting(self) -> list[int]:
        """The tokens of the conversation, without its oldest turns if it has become too long.

        Raises `ValueError` if the newest question alone is, and forgets nothing for that.
        """
        context = self._speaker.context
        if (alone := len(self._speaker.prompt(self._said[-1:]))) >= context:
            raise ValueError(f"that is too long: it has {alone} tokens, and the model reads {context}")
        room = min(self._how.max_tokens, context // _ANSWERED)
        while True:
            prompt = self._speaker.prompt(self._said)
            if len(prompt) + room <= context or len(self._said) == 1:
                return prompt
            del self._said[:2]
            self._tell("(the oldest question and its answer are forgotten: the model reads no more)")

    def _tell(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()
