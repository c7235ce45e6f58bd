"""From conversations to tokens and labels: which characters the model must learn to write, and so which tokens.

Trained are the assistant's words and the token that ends its turn; prompts and headers are context. The place of
each answer is found by rendering the conversation a second time with markers in place of the answers, which works
with any chat template that inserts answers as they are, or trimmed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import jinja2

from job.model.tokenizer import IGNORED
from job.prepare.formats import BadRecordError, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Row:
    """One example for training: token ids and labels of equal length, and whether the end was cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class Renderer:
    """Turns examples into rows with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int, *, answers_only: bool) -> None:
        self._tokenizer, self._max_length, self._answers_only = tokenizer, max_length, answers_only
        self.eos_added = 0  # conversations whose template does not end the last answer
        self._end_of_turn = _end_of_turn(tokenizer)
        self._opening = self._generation_prompt() if tokenizer.chat_template else ""

    def rows(self, examples: Sequence[Example]) -> Iterator[Row | BadRecordError]:
        """A row for each example, in order, or the reason why there is none."""
        rendered = [self._try(example) for example in examples]
        good = [item for item in rendered if not isinstance(item, BadRecordError)]
        encoded = iter(self._encode([text for text, _ in good]))
        for item in rendered:
            yield item if isinstance(item, BadRecordError) else self._row(*next(encoded), item[1])

    def _try(self, example: Example) -> tuple[str, Spans] | BadRecordError:
        try:
            return self._conversation(list(example.messages)) if example.messages else self._text(example.text)
        except jinja2.TemplateError as e:
            return BadRecordError(f"the chat template refuses it: {e}")
        except BadRecordError as e:
            return e

    def _text(self, text: str) -> tuple[str, Spans]:
        eos, bos = str(self._tokenizer.eos_token or ""), str(self._tokenizer.bos_token or "")
        if _adds_bos(self._tokenizer) and not text.startswith(bos):
            text = bos + text
        text = text if text.endswith(eos) else text + eos
        return text, [(0, len(text))]

    def _conversation(self, messages: list[Message]) -> tuple[str, Spans]:
        text = self._apply(messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        pieces = self._around(messages, len(answers))
        spans: Spans = []
        end = len(pieces[0])
        if not text.startswith(pieces[0]):
            raise BadRecordError("the chat template writes the question in another way when the answer changes")
        for before, answer, after in zip(pieces, answers, pieces[1:], strict=False):
            start, stop = end, end + self._length(text, end, answer, after)
            opened = before.rfind(self._opening) if self._opening else -1
            if (
                opened >= 0
            ):  # what the template writes between header and answer, such as an empty <think>, is the model's to write
                start -= len(before) - opened - len(self._opening)
            ending = self._end_of_turn.match(after)
            spans.append((start, stop + (ending.end() if ending else 0)))
            end = stop + len(after)
        if not self._end_of_turn.match(pieces[-1]):
            self.eos_added += 1
            text = text[: spans[-1][1]] + str(self._tokenizer.eos_token)
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _around(self, messages: list[Message], count: int) -> list[str]:
        """What the template writes around the answers: one piece more than there are answers."""
        marks = iter(f"\ue000{i}\ue001" for i in range(count))
        marked = [m | {"content": next(marks)} if m["role"] == "assistant" else m for m in messages]
        pieces = re.split("\ue000[0-9]+\ue001", self._apply(marked))
        if len(pieces) != count + 1:
            raise BadRecordError(f"the chat template writes {len(pieces) - 1} of the {count} answers")
        return pieces

    @staticmethod
    def _length(text: str, start: int, answer: str, after: str) -> int:
        for written in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
            if text.startswith(written + after, start):
                return len(written)
        found = text.find(after, start) if after.strip() else -1
        if found < 0:
            raise BadRecordError("the chat template changes the answer, so that its tokens cannot be found")
        return found - start

    def _apply(self, messages: list[Message], *, open_turn: bool = False) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))

    def _generation_prompt(self) -> str:
        asked = [{"role": "user", "content": "?"}]
        try:
            closed, opened = self._apply(asked), self._apply(asked, open_turn=True)
        except jinja2.TemplateError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    def _encode(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _row(self, ids: list[int], offsets: Spans, spans: Spans) -> Row | BadRecordError:
        labels = [
            token if not self._answers_only or _overlaps(place, spans) else IGNORED
            for token, place in zip(ids, offsets, strict=True)
        ]
        cut = labels[: self._max_length]
        if all(label == IGNORED for label in cut):
            return BadRecordError(
                f"nothing left to train: it has {len(ids)} tokens and the answer starts after "
                f"data.max_length {self._max_length}"
            )
        return Row(ids[: self._max_length], cut, truncated=len(ids) > self._max_length)


def marked(tokenizer: "PreTrainedTokenizerBase", row: Row) -> str:
    """What the model will see of `row`, with the trained parts between ⟦ and ⟧."""
    parts = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    texts = ((trained, str(tokenizer.decode([token for token, _ in group]))) for trained, group in parts)
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What ends an answer: special tokens up to the one that ends generation if it follows at once, else the first."""
    eos = re.escape(str(tokenizer.eos_token))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted({eos, *map(re.escape, special)}, key=len, reverse=True)
    any_special = f"(?:{'|'.join(longest_first)})"
    return re.compile(rf"\s*(?:{any_special}*?{eos}|{any_special})")


def _overlaps(place: tuple[int, int], spans: Spans) -> bool:
    return any(place[0] < stop and place[1] > start for start, stop in spans)


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(tokenizer.bos_token) and ids[:1] == [tokenizer.bos_token_id]
