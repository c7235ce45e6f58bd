"""Answers to many prompts, in their order: JSON lines in, JSON lines out, and an interrupted start is gone on with.

While it goes on, the answers lie in parts beside the place of the result, a number of batches each; at the end they
become one file.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job import errors, log, paths
from job.config import Sampling
from job.storage import Store

if TYPE_CHECKING:
    from job.model.talk import Speaker

ANSWER = "answer"
_TOLD = (ANSWER, "tokens", "ended")  # what is added to a record
_ASKS = ("prompt", "instruction", "question")
_BATCHES = 8  # in a part
_SHOWN = 60  # characters of a value in a message
_DIGITS = 9
_PART = re.compile(rf"(\d{{{_DIGITS}}})\.jsonl")


@dataclass(frozen=True)
class Prompt:
    """A record and the conversation that it asks to be gone on with, or plain text to be."""

    record: Mapping[str, Any]
    where: str
    messages: Sequence[Mapping[str, Any]] | None
    text: str = ""
    """What is gone on with; beside messages the input that belongs to the last of them."""
    tools: Sequence[Any] | None = None


class Place:
    """Where the answers go: a file in a store, and beside it the parts that there are so far."""

    def __init__(self, store: Store, name: str, made_of: str) -> None:
        """Raises `errors.ConfigError` if there is something that was not `made_of` the same."""
        self._store, self._name, self._made_of = store, name, paths.digest(made_of)
        self._mark, self._folder = f"{name}.made-of.json", f"{name}.parts/{self._made_of}/"
        before = self._told()
        there = any(entry.key == name for entry in store.list(name))
        if there and before.get("made_of") != self._made_of:
            raise errors.ConfigError(
                f"--out: {self.url} is of other prompts, another model or other settings: remove it, or give another "
                "place"
            )
        self.done = there and bool(before.get("done"))

    @property
    def url(self) -> str:
        """Of the file."""
        return f"{self._store.url}/{self._name}"

    def there(self) -> set[int]:
        """The numbers of the first prompts of the parts that there are."""
        found = (_PART.fullmatch(entry.key.removeprefix(self._folder)) for entry in self._store.list(self._folder))
        return {int(each[1]) for each in found if each}

    def keep(self, start: int, lines: str) -> None:
        """Write the part that begins with prompt `start`."""
        self._store.put(self._part(start), lines.encode())

    def finish(self, starts: Iterable[int]) -> None:
        """Make one file of the parts that begin with the prompts `starts`.

        Raises `errors.StoreError` if one has vanished, as when another start has finished in the meantime.
        """
        parts = {start: self._store.read(self._part(start)) for start in starts}
        if lost := [start for start, part in parts.items() if part is None]:
            raise errors.StoreError(
                f"--out: {self._store.url}/{self._part(lost[0])} has vanished, and {len(lost)} of {len(parts)} parts: "
                "another start of the same is at it, or has finished; start again to see"
            )
        self._store.put(self._mark, json.dumps({"made_of": self._made_of}).encode())
        self._store.put(self._name, b"".join(part.data for part in parts.values() if part))
        self._store.put(self._mark, json.dumps({"made_of": self._made_of, "done": True}).encode())
        self.sweep()

    def sweep(self) -> None:
        """Remove the parts, of these answers and of others."""
        for entry in self._store.list(f"{self._name}.parts/"):
            self._store.delete(entry.key)

    def _told(self) -> dict[str, Any]:
        before = self._store.read(self._mark)
        return dict(json.loads(before.data)) if before else {}

    def _part(self, start: int) -> str:
        return f"{self._folder}{start:0{_DIGITS}d}.jsonl"


def prompt(record: Mapping[str, Any] | None, where: str, reason: str = "") -> Prompt:
    """What the `record` asks, which was read at a place that is called `where`, or could not be for a `reason`.

    Raises `errors.DataError` if it asks nothing, or what cannot be answered.
    """
    if record is None:
        raise errors.DataError(f"{where}: {reason}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (TypeError, ValueError) as e:  # bytes of Parquet, halves of characters
        raise errors.DataError(f"{where}: cannot be written as JSON ({e})") from e
    if taken := [key for key in _TOLD if key in record]:
        raise errors.DataError(f"{where}: has a key {taken[0]} already, where the answer is told: rename it")
    if seen := [key for key in ("image", "images") if record.get(key)]:
        raise errors.DataError(f"{where}: has {seen[0]}, and only text is answered here")
    tools = _listed(record, "tools", where)
    said = record.get("messages") or next((record[key] for key in _ASKS if record.get(key)), None)
    if isinstance(said, list):
        return Prompt(record, where, _messages(said, where), tools=tools)
    if isinstance(said, str):
        return Prompt(record, where, _conversation(record, said, where), _written(record, "input", where), tools)
    if record.get("text") and isinstance(record["text"], str):
        return Prompt(record, where, None, record["text"])
    raise errors.DataError(
        f"{where}: has none of messages, {', '.join(_ASKS)} and text that asks something, but "
        f"{', '.join(record) or 'nothing'}"
    )


def _conversation(record: Mapping[str, Any], question: str, where: str) -> list[Mapping[str, Any]]:
    """A question with what was said before it."""
    turns: list[Mapping[str, Any]] = []
    if system := _written(record, "system", where):
        turns.append({"role": "system", "content": system})
    for pair in _listed(record, "history", where) or ():
        if not isinstance(pair, list) or [type(each) for each in pair] != [str, str]:
            raise errors.DataError(f"{where}: history is not a list of pairs of question and answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, {"role": "user", "content": question}]


def _written(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise errors.DataError(f"{where}: {key} must be text, and is {str(value)[:_SHOWN]}")
    return value or ""


def _listed(record: Mapping[str, Any], key: str, where: str) -> list[Any] | None:
    value = record.get(key)
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) and value else value
    if value and not isinstance(value, list):
        raise errors.DataError(f"{where}: {key} must be a list, and is {str(value)[:_SHOWN]}")
    return value or None


def _messages(given: Sequence[Any], where: str) -> Sequence[Mapping[str, Any]]:
    for each in given:
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise errors.DataError(f"{where}: a message must have a role and a content: {str(each)[:_SHOWN]}")
        if not isinstance(each.get("content"), str) and not each.get("tool_calls"):
            raise errors.DataError(f"{where}: the content of a message must be text: {str(each)[:_SHOWN]}")
    if given[-1]["role"] == "assistant":
        raise errors.DataError(f"{where}: its last message is an answer: leave that out")
    return given


def one(question: str, speaker: "Speaker", how: Sampling) -> str:
    """The answer to one question."""
    asked = Prompt({}, "--prompt", ({"role": "user", "content": question},))
    (answer,) = speaker.answers([_tokens(asked, speaker, how)], how, how.seed)
    return answer.text


def answers(
    prompts: Sequence[Prompt], speaker: "Speaker", how: Sampling, batch: int, place: Place
) -> None:  # fmt: skip
    """Write the answers to `prompts` to `place`, `batch` of them at once.

    An answer depends on the prompts of its batch, the seed, and nothing else, so that a start which was interrupted is
    gone on with to the same answers.
    """
    if place.done:
        place.sweep()
        log.event("generate.here", f"done already: {len(prompts)} answers are in {place.url}")
        return
    size, there = batch * _BATCHES, place.there()
    ids = [_tokens(each, speaker, how) for each in prompts]
    left = [start for start in range(0, len(prompts), size) if start not in there]
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


def _tokens(asked: Prompt, speaker: "Speaker", how: Sampling) -> list[int]:
    """What the model reads; raises `errors.DataError` if that is nothing, or leaves no room for an answer."""
    try:
        if asked.messages is None:
            ids = list(speaker.words(asked.text)["input_ids"])
        else:
            ids = speaker.prompt(asked.messages, asked.text, asked.tools)
    except Exception as e:  # templates and tokenizers fail in many ways
        raise errors.DataError(f"{asked.where}: the model's template or tokenizer does not take it: {e}") from e
    if not ids:
        raise errors.DataError(f"{asked.where}: asks nothing: it has no tokens")
    if len(ids) + how.max_tokens > speaker.context:
        raise errors.DataError(
            f"{asked.where}: a prompt of {len(ids)} tokens and an answer of {how.max_tokens} are more than the "
            f"{speaker.context} that the model was made for: shorten it, or lower --max-tokens"
        )
    return ids
