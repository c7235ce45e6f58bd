"""From conversations to tokens and labels: which characters the model must learn to write, and so which tokens.

Trained are the assistant's words and the token that ends its turn; prompts and headers are context. The place of
each answer is found by rendering the conversation a second time with markers in place of the answers, which works
with any chat template that inserts answers as they are, or trimmed. How a template writes calls of tools is its own
business: in conversations with calls, answers are what stands between the header of their turn and its end.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from job.model.tokenizer import IGNORED, adds_bos
from job.model.vision import Vision
from job.prepare.formats import Example
from job.prepare.template import Template
from job.prepare.turns import BadRecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
_MANY = re.compile(r"([<\[][^<>\[\]\s]+[>\]])\1{7,}")  # a token that is there again and again, as those of an image


@dataclass(frozen=True)
class Row:
    """One example for training: token ids and labels of equal length, and whether the end was cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    rejected: "Row | None" = None
    """The same with the answer that is not preferred."""
    text: str = ""
    """What a base that sees images reads them in."""
    images: tuple[bytes, ...] = ()


class Renderer:
    """Turns examples into rows with one tokenizer."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, loss_on: str, vision: Vision | None = None
    ) -> None:
        self.tokenizer, self._max_length, self._loss_on, self._vision = tokenizer, max_length, loss_on, vision
        self.eos_added = 0  # conversations whose template does not end the last answer
        self._template = Template(tokenizer)
        self.placeholder = vision.placeholder if vision else None
        """What stands for an image in a text, for a base that sees them."""

    def rows(self, examples: Sequence[Example]) -> Iterator[Row | BadRecordError]:
        """A row for each example, in order, or the reason why there is none."""
        single = iter(self._single([each for one in examples for each in (one, one.rejected) if each]))
        for example in examples:
            row = next(single)
            yield row if example.rejected is None else self._pair(row, next(single))

    def _pair(self, row: Row | BadRecordError, other: Row | BadRecordError) -> Row | BadRecordError:
        if isinstance(row, BadRecordError) or isinstance(other, BadRecordError):
            return row if isinstance(row, BadRecordError) else other
        if row.input_ids == other.input_ids:
            return BadRecordError(f"both answers are the same in the first {self._max_length} tokens")
        return replace(row, rejected=other, truncated=row.truncated or other.truncated)

    def _single(self, examples: Sequence[Example]) -> Iterator[Row | BadRecordError]:
        rendered = [self._try(example) for example in examples]
        good = [item for item in rendered if not isinstance(item, BadRecordError)]
        encoded = iter(self._encode([text for text, _ in good]) if self._vision is None else ())
        for example, item in zip(examples, rendered, strict=True):
            if isinstance(item, BadRecordError):
                yield item
            elif self._vision:
                yield self._seen(self._vision, *item, example.images)
            else:
                yield self._row(*next(encoded), item[1])

    def _try(self, example: Example) -> tuple[str, Spans] | BadRecordError:
        try:
            return self._conversation(example) if example.messages else self._text(example.text)
        except BadRecordError as e:
            return e

    def _text(self, text: str) -> tuple[str, Spans]:
        eos, bos = str(self.tokenizer.eos_token or ""), str(self.tokenizer.bos_token or "")
        if adds_bos(self.tokenizer) and not text.startswith(bos):
            text = bos + text
        text = text if text.endswith(eos) else text + eos
        return text, [(0, len(text))]

    def _seen(self, vision: Vision, text: str, spans: Spans, images: Sequence[str | bytes]) -> Row | BadRecordError:
        """A row for a base that sees `images`, which are bytes by now: each becomes many tokens, and moves the rest."""
        held = tuple(image for image in images if isinstance(image, bytes))
        there = text.count(vision.placeholder)
        if there != len(held):
            return BadRecordError(f"has {len(held)} images, and {vision.placeholder} stands {there} times in its text")
        if written := [mark for mark in vision.reserved if mark in text]:
            return BadRecordError(f"has {written[0]} in its text, which stands for what the model sees")
        try:
            read = vision.read(text, held)
        except ValueError as e:
            return BadRecordError(str(e))
        shown = read.shown()
        last = shown[-1][1] if shown else 0
        seen = sum(start < last for start, _ in read.places)
        if seen > self._max_length:
            return BadRecordError(
                f"its images end after {seen} tokens, and data.max_length is {self._max_length}: raise it, or make the "
                "images smaller with data.max_pixels"
            )
        row = self._row(read.ids, read.places, [read.moved(span) for span in spans], shown)
        return row if isinstance(row, BadRecordError) else replace(row, text=text, images=held)

    def _conversation(self, example: Example) -> tuple[str, Spans]:
        calls = any("tool_calls" in message for message in example.messages)
        if (calls or example.tools) and not self._template.knows_tools:
            raise BadRecordError("the chat template has no place for tools and their calls")
        text, spans = (self._with_calls if calls else self._without_calls)(example)
        if self._loss_on == "last":
            if example.trained and not example.trained[-1]:
                raise BadRecordError(
                    "its last answer has weight 0, and data.loss_on is last: there is nothing to learn"
                )
            spans = spans[-1:]
        elif example.trained and self._loss_on == "all":
            raise BadRecordError("says which answers are to be learned, and data.loss_on is all: use assistant")
        elif example.trained:
            spans = [span for span, on in zip(spans, example.trained, strict=True) if on]
        return text, spans

    def _with_calls(self, example: Example) -> tuple[str, Spans]:
        text, spans, end = self._template.write(example), [], 0
        for number, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            start = self._start(text, end, example, number)
            stop = text.find(self._template.end, start)
            if stop < 0 and number == len(example.messages) - 1:
                self.eos_added += 1
                text = text.rstrip() + str(self.tokenizer.eos_token)
                end = len(text)
            elif stop < 0:
                raise BadRecordError(f"the chat template does not end the answer in turn {number + 1}")
            else:
                end = stop + len(self._template.end)
            spans.append((start, end))
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
            lost = [part for part in (message["content"].strip(), *names) if part not in text[start:end]]
            if lost:
                raise BadRecordError(f"the chat template does not write {lost[0][:80]!r} in turn {number + 1}")
        return text, spans

    def _start(self, text: str, end: int, example: Example, number: int) -> int:
        """Where the answer that is message `number` begins in `text`, which is not before `end`."""
        if self._template.header:
            found = text.find(self._template.header, end)
            start = found + len(self._template.header) if found >= 0 else -1
        else:
            before = self._template.write(replace(example, messages=example.messages[:number]))
            start = len(before) if text.startswith(before) else -1
        if start < 0:
            raise BadRecordError(f"the chat template writes turn {number + 1} in another way when more turns follow")
        return start

    def _without_calls(self, example: Example) -> tuple[str, Spans]:
        text, messages = self._template.write(example), example.messages
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        pieces = self._template.around(example, len(answers))
        spans: Spans = []
        end = len(pieces[0])
        if not text.startswith(pieces[0]):
            raise BadRecordError("the chat template writes the question in another way when the answer changes")
        for before, answer, after in zip(pieces, answers, pieces[1:], strict=False):
            start, stop = end, end + self._length(text, end, answer, after)
            opened = before.rfind(self._template.opening) if self._template.opening else -1
            if opened >= 0:  # what is written between header and answer, such as an empty <think>, is the model's too
                start -= len(before) - opened - len(self._template.opening)
            ending = self._template.end_of_turn.match(after)
            spans.append((start, stop + (ending.end() if ending else 0)))
            end = stop + len(after)
        if not self._template.end_of_turn.match(pieces[-1]):
            self.eos_added += 1
            text = text[: spans[-1][1]] + str(self.tokenizer.eos_token)
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    @staticmethod
    def _length(text: str, start: int, answer: str, after: str) -> int:
        for written in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
            if text.startswith(written + after, start):
                return len(written)
        found = text.find(after, start) if after.strip() else -1
        if found < 0:
            raise BadRecordError("the chat template changes the answer, so that its tokens cannot be found")
        return found - start

    def _encode(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _row(
        self, ids: list[int], offsets: Spans, spans: Spans, shown: Sequence[tuple[int, int]] = ()
    ) -> Row | BadRecordError:
        """A row of which `spans` are learned, and never what stands for images, which is `shown`."""
        labels = [
            token if (self._loss_on == "all" or _overlaps(place, spans)) and not _overlaps(place, shown) else IGNORED
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
    if row.rejected:
        chosen, rejected = marked(tokenizer, replace(row, rejected=None)), marked(tokenizer, row.rejected)
        return f"preferred:\n{chosen}\n\nrejected:\n{rejected}"
    parts = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    texts = ((trained, str(tokenizer.decode([token for token, _ in group]))) for trained, group in parts)
    whole = "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)
    return _MANY.sub(lambda found: f"{found[1]} (x {len(found[0]) // len(found[1])})", whole)


def _overlaps(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return any(place[0] < stop and place[1] > start for start, stop in spans)
