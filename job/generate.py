"""Answers to many prompts, in their order: JSON lines in, JSON lines out, and an interrupted start is gone on with.

While it goes on, the answers lie in parts beside the place of the result, a number of batches each; at the end they
become one file.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import errors, log, paths
from job.config import Sampling
from job.storage import Store

if TYPE_CHECKING:
    from job.model.talk import Speaker

ANSWER = "answer"
_BATCHES = 8  # in a part
_SHOWN = 60  # characters of a line in a message
_DIGITS = 9


@dataclass(frozen=True)
class Prompt:
    """A record and the conversation that it asks to be gone on with, or plain text to be."""

    record: Mapping[str, Any]
    where: str
    messages: Sequence[Mapping[str, str]] | None
    text: str = ""


class Place:
    """Where the answers go: a file in a store, and beside it the parts that there are so far."""

    def __init__(self, store: Store, name: str, made_of: str) -> None:
        """Raises `errors.ConfigError` if there is something that was not `made_of` the same."""
        self._store, self._name, self._made_of = store, name, paths.digest(made_of)
        self._mark, self._folder = f"{name}.made-of.json", f"{name}.parts/"
        before = store.read(self._mark)
        told = json.loads(before.data) if before else {}
        if told.get("made_of", self._made_of) != self._made_of or (not before and store.read(name)):
            raise errors.ConfigError(
                f"--out: {self.url} is of other prompts, another model or other settings: remove it, with "
                f"{self._mark}, or give another place"
            )
        self.done = bool(told.get("done"))

    @property
    def url(self) -> str:
        """Of the file."""
        return f"{self._store.url}/{self._name}"

    def there(self) -> set[int]:
        """The numbers of the first prompts of the parts that there are."""
        return {int(entry.key.removeprefix(self._folder)[:_DIGITS]) for entry in self._store.list(self._folder)}

    def keep(self, start: int, lines: str) -> None:
        """Write the part that begins with prompt `start`."""
        self._store.put(self._mark, json.dumps({"made_of": self._made_of}).encode())
        self._store.put(self._part(start), lines.encode())

    def finish(self, starts: Iterable[int]) -> None:
        """Make one file of the parts that begin with the prompts `starts`."""
        parts = [self._store.read(self._part(start)) for start in starts]
        self._store.put(self._name, b"".join(part.data for part in parts if part))
        self._store.put(self._mark, json.dumps({"made_of": self._made_of, "done": True}).encode())
        for entry in self._store.list(self._folder):
            self._store.delete(entry.key)

    def _part(self, start: int) -> str:
        return f"{self._folder}{start:0{_DIGITS}d}.jsonl"


def read(path: Path, name: str) -> list[Prompt]:
    """The prompts in a file of JSON lines, perhaps gzipped, that is called `name`.

    Raises `errors.DataError` with the line of the first record that asks nothing.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        found = [_prompt(line, f"{name}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    if not found:
        raise errors.DataError(f"{name} holds no prompts")
    return found


def one(question: str, speaker: "Speaker", how: Sampling) -> str:
    """The answer to one question."""
    prompt = Prompt({}, "the prompt", ({"role": "user", "content": question},))
    (answer,) = speaker.answers([_tokens(prompt, speaker, how)], how, how.seed)
    return answer.text


def _prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise errors.DataError(f"{where}: {line.strip()[:_SHOWN]!r} is not JSON ({e})") from e
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise errors.DataError(f"{where}: must be an object or a string, and is {type(record).__name__}")
    if ANSWER in record:
        raise errors.DataError(f"{where}: has a key {ANSWER} already, where the answer would go: rename it")
    if isinstance(record.get("messages"), list):
        return Prompt(record, where, _messages(record["messages"], where))
    if isinstance(record.get("text"), str):
        return Prompt(record, where, None, record["text"])
    said = record.get("prompt", record.get("instruction", record.get("question")))
    if isinstance(said, list):
        return Prompt(record, where, _messages(said, where))
    if not isinstance(said, str) or not said:
        raise errors.DataError(
            f"{where}: has none of prompt, messages, instruction, question and text, but "
            f"{', '.join(record) or 'nothing'}"
        )
    more = record.get("input")
    question = f"{said}\n\n{more}" if isinstance(more, str) and more else said
    system = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    return Prompt(record, where, (*system, {"role": "user", "content": question}))


def _messages(given: Sequence[Any], where: str) -> Sequence[Mapping[str, str]]:
    for each in given:
        if not isinstance(each, dict) or not isinstance(each.get("role"), str) or "content" not in each:
            raise errors.DataError(f"{where}: a message must have a role and a content: {str(each)[:_SHOWN]}")
    if not given:
        raise errors.DataError(f"{where}: has no messages")
    return given


def answers(
    prompts: Sequence[Prompt], speaker: "Speaker", how: Sampling, batch: int, place: Place
) -> None:  # fmt: skip
    """Write the answers to `prompts` to `place`, `batch` of them at once.

    An answer depends on the prompts of its batch, the seed, and nothing else, so that a start which was interrupted is
    gone on with to the same answers.
    """
    if place.done:
        log.event("generate.here", f"done already: {len(prompts)} answers are in {place.url}")
        return
    size = batch * _BATCHES
    ids = [_tokens(each, speaker, how) for each in prompts]
    left = [start for start in range(0, len(prompts), size) if start not in place.there()]
    if kept := len(range(0, len(prompts), size)) - len(left):
        log.event("generate.kept", f"{kept} part(s) of {size} answers are there from an earlier start", parts=kept)
    with log.progress("generate", len(prompts), sys.stderr) as show:
        for start in left:
            lines = []
            for first in range(start, min(start + size, len(prompts)), batch):
                made = speaker.answers(ids[first : first + batch], how, how.seed + first)
                for prompt, answer in zip(prompts[first : first + batch], made, strict=True):
                    told = {ANSWER: answer.text, "tokens": answer.tokens, "ended": answer.ended}
                    lines.append(json.dumps({**prompt.record, **told}, ensure_ascii=False))
            place.keep(start, "".join(f"{line}\n" for line in lines))
            show(min(len(prompts), start + size), "")
    place.finish(range(0, len(prompts), size))
    log.event("generate.done", f"done: {len(prompts)} answers are in {place.url}", answers=len(prompts))


def _tokens(prompt: Prompt, speaker: "Speaker", how: Sampling) -> list[int]:
    """What the model reads; raises `errors.DataError` if that leaves no room for an answer."""
    ids = list(speaker.words(prompt.text)["input_ids"]) if prompt.messages is None else speaker.prompt(prompt.messages)
    if len(ids) + how.max_tokens > speaker.context:
        raise errors.DataError(
            f"{prompt.where}: a prompt of {len(ids)} tokens and an answer of {how.max_tokens} are more than the "
            f"{speaker.context} that the model was made for: shorten it, or lower --max-tokens"
        )
    return ids
