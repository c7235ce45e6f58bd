"""What a record asks: the conversation before its answer, exactly as training shows it to the model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from job.prepare import formats
from job.prepare.formats import Example
from job.prepare.turns import BadRecordError

_ANSWER = "-"
_TURN = {"role": "assistant", "content": _ANSWER}


def asked(record: Mapping[str, Any], input_heading: str) -> Example:
    """The conversation that `record` asks to be gone on with, or text to be.

    A record is read as one of the format that it would have with an answer, which may be there already and is not
    looked at. Raises `BadRecordError` if it asks nothing, or with images.
    """
    for key, completed in _COMPLETED.items():
        if record.get(key):
            name, whole = completed(record)
            example = formats.convert(whole, name, input_heading)
            if example.images:
                raise BadRecordError("has images, and only text is answered here")
            if example.text:
                return example
            before = example.messages[:-1]
            if not before:
                raise BadRecordError("asks nothing")
            if before[-1]["role"] == "assistant":
                raise BadRecordError("ends with an answer: leave that out")
            return replace(example, messages=before, trained=())
    raise BadRecordError(
        f"has none of {', '.join(_COMPLETED)} that asks something, but {', '.join(map(str, record)) or 'nothing'}"
    )


def _turns(key: str) -> Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]]:
    def completed(record: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        turns = record[key]
        return key, {**record, key: [*turns, _TURN] if isinstance(turns, list) else turns}

    return completed


def _prompt(record: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    completion: object = [_TURN] if isinstance(record["prompt"], list) else _ANSWER
    return "prompt-completion", {**record, "completion": completion}


_COMPLETED: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]]] = {
    "messages": _turns("messages"),
    "conversations": _turns("conversations"),
    "instruction": lambda record: ("instruction", {**record, "output": _ANSWER}),
    "prompt": _prompt,
    "question": lambda record: ("instruction", {**record, "instruction": record["question"], "output": _ANSWER}),
    "text": lambda record: ("text", record),
}
"""By the key that asks, in the order in which training looks for them."""
