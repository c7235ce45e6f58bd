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

from job import errors, log, manifest, paths
from job.config import Sampling
from job.storage import Store

if TYPE_CHECKING:
    from job.model.talk import Speaker

ANSWER = "answer"
_TOLD = (ANSWER, "tokens", "ended")  # what is added to a record
_BATCHES = 8  # in a part
_DIGITS = 9
_PART = re.compile(rf"(\d{{{_DIGITS}}})\.jsonl")


@dataclass(frozen=True)
class Prompt:
    """A record and the conversation that it asks to be gone on with, or plain text to be."""

    record: Mapping[str, Any]
    where: str
    messages: Sequence[Mapping[str, Any]]
    text: str = ""
    """What is gone on with, if there are no messages."""
    tools: Sequence[Any] = ()


class Place:
    """Where the answers go: a file in a store, and beside it the parts that there are so far.

    Beside a file of answers stands what they were made of, and its SHA-256: only what is told so is believed.
    """

    def __init__(self, store: Store, name: str, made_of: str) -> None:
        """Raises `errors.ConfigError` if there is a file that is not `made_of` the same."""
        self._store, self._name, self._made_of = store, name, paths.digest(made_of)
        self._mark, self._folder = f"{name}.made-of.json", f"{name}.parts/{self._made_of}/"
        self.done = self._is_there()

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
        """Make one file of the parts that begin with the prompts `starts`; it is there if another start was faster.

        Raises `errors.ConfigError` if something else is there by now, and `errors.StoreError` if a part has vanished.
        """
        parts = {start: self._store.read(self._part(start)) for start in starts}
        if not self._is_there():
            if lost := [start for start, part in parts.items() if part is None]:
                raise errors.StoreError(
                    f"--out: {self._store.url}/{self._part(lost[0])} has vanished, and {len(lost)} of {len(parts)} "
                    "parts: somebody has removed them; start again to make them anew"
                )
            data = b"".join(part.data for part in parts.values() if part)
            told = {"made_of": self._made_of, "sha256": manifest.sha256_of(data)}
            self._store.put(self._mark, json.dumps(told).encode())  # first: without it nobody believes the file
            try:
                self._store.create(self._name, data)
            except errors.ConflictError:
                self._is_there()
        self.sweep()

    def sweep(self) -> None:
        """Remove the parts of these answers."""
        for entry in self._store.list(self._folder):
            self._store.delete(entry.key)
        if left := self._store.list(f"{self._name}.parts/"):
            log.event(
                "generate.left",
                f"{len(left)} part(s) of starts with other prompts or settings are left in {self.url}.parts/: remove "
                "them if nobody goes on with those",
                parts=len(left),
            )

    def _is_there(self) -> bool:
        """Whether the file is; raises `errors.ConfigError` if it is another one."""
        blob, mark = self._store.read(self._name), self._store.read(self._mark)
        if blob is None:
            return False
        told: dict[str, Any] = {}
        with contextlib.suppress(ValueError, TypeError):
            told = dict(json.loads(mark.data)) if mark else {}
        if told.get("sha256") != manifest.sha256_of(blob.data):
            raise errors.ConfigError(
                f"--out: {self.url} is there, and not as it was written here, if it was: remove it, or give another "
                "place"
            )
        if told.get("made_of") != self._made_of:
            raise errors.ConfigError(
                f"--out: {self.url} is of other prompts, another model or other settings: remove it, or give another "
                "place"
            )
        return True

    def _part(self, start: int) -> str:
        return f"{self._folder}{start:0{_DIGITS}d}.jsonl"


def check(record: Mapping[str, Any], where: str) -> None:
    """Raise `errors.DataError` if the `record`, which was read at `where`, cannot be told again with its answer."""
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as e:  # bytes of Parquet, halves of characters, NaN
        raise errors.DataError(f"{where}: cannot be written as JSON ({e})") from e
    if taken := [key for key in _TOLD if key in record]:
        raise errors.DataError(f"{where}: has a key {taken[0]} already, where the answer is told: rename it")


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
        ids = speaker.prompt(asked.messages, asked.tools) if asked.messages else speaker.text(asked.text)
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
