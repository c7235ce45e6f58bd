"""A chat template as a thing that is asked: what it writes, and what stands around an answer."""

import re
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from job.model.tokenizer import wants_parts
from job.prepare.formats import Example
from job.prepare.turns import IMAGE, BadRecordError, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "zq7_probe"  # the name of a tool that no text holds
_ASKED: Message = {"role": "user", "content": "?"}


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer, self._in_parts = tokenizer, False
        self.end_of_turn = _end_of_turn(tokenizer)
        self.opening, self.header, self.end = "", "", str(tokenizer.eos_token)
        """What asks for an answer, the part of it that stands before every answer, and what ends one."""
        if tokenizer.chat_template:
            self._in_parts = wants_parts(tokenizer)
            self._ask()

    def write(self, example: Example, *, open_turn: bool = False) -> str:
        """The text of a conversation; raises `BadRecordError` if the template refuses it, or writes no tools."""
        try:
            written = self._tokenizer.apply_chat_template(
                [self._told(message) for message in example.messages], tools=list(example.tools) or None,
                tokenize=False, add_generation_prompt=open_turn,
            )  # fmt: skip
        except Exception as e:
            raise BadRecordError(f"the chat template refuses it: {e}") from e
        unknown = [tool["function"]["name"] for tool in example.tools if tool["function"]["name"] not in written]
        if unknown:
            raise BadRecordError(f"the chat template does not write the tool {unknown[0]!r}: it has no place for tools")
        return str(written)

    def around(self, example: Example, count: int) -> list[str]:
        """What is written around the `count` answers of a conversation: one piece more than there are answers."""
        marks = iter(f"\ue000{i}\ue001" for i in range(count))
        marked = [m | {"content": next(marks)} if m["role"] == "assistant" else m for m in example.messages]
        pieces = re.split("\ue000[0-9]+\ue001", self.write(replace(example, messages=tuple(marked))))
        if len(pieces) != count + 1:
            raise BadRecordError(f"the chat template writes {len(pieces) - 1} of the {count} answers")
        return pieces

    def _told(self, message: Message) -> Message:
        """A turn as the template wants it: one with images in parts, and any where it knows nothing else."""
        if IMAGE not in message["content"] and not self._in_parts:
            return message
        texts = message["content"].split(IMAGE)
        parts: list[dict[str, str]] = []
        for number, text in enumerate(texts):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        return message | {"content": parts}

    @cached_property
    def knows_tools(self) -> bool:
        """Whether it writes tools and calls of them; their names may stand in the text of a record by chance."""
        function = {"name": _PROBE, "description": "?", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "function": {"name": _PROBE, "arguments": {}}}
        called: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        tools = ({"type": "function", "function": function},)
        try:
            told = self.write(Example((_ASKED,), tools=tools))
            used = self.write(Example((_ASKED, called), tools=tools))
        except BadRecordError:
            return False
        return used.count(_PROBE) > told.count(_PROBE)

    def _ask(self) -> None:
        answer: Message = {"role": "assistant", "content": "\ue000"}
        try:
            closed, opened = self.write(Example((_ASKED,))), self.write(Example((_ASKED,)), open_turn=True)
            before, _, after = self.write(Example((_ASKED, answer))).partition(answer["content"])
        except BadRecordError:
            return
        self.opening = opened.removeprefix(closed) if opened.startswith(closed) else ""
        if before.startswith(closed):
            self.header = _shared_start(self.opening, before.removeprefix(closed))
        ending = self.end_of_turn.match(after)
        self.end = ending[0].lstrip() if ending else self.end


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What ends an answer: special tokens up to the one that ends generation if it follows at once, else the first."""
    eos = re.escape(str(tokenizer.eos_token))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted({eos, *map(re.escape, special)}, key=len, reverse=True)
    any_special = f"(?:{'|'.join(longest_first)})"
    return re.compile(rf"\s*(?:{any_special}*?{eos}|{any_special})")


def _shared_start(one: str, other: str) -> str:
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[:length]
