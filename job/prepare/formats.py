"""From records to conversations: the shapes in which people keep training data, told apart by their keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from job import config

Message = dict[str, str]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_NAMES = ", ".join(get_args(config.Data.model_fields["format"].annotation)[1:])


class BadRecordError(Exception):
    """This record cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Example:
    """What a record says: a conversation, or text that is trained as it is."""

    messages: tuple[Message, ...] = ()
    text: str = ""


def recognise(record: Mapping[str, Any]) -> str:
    """The format of a file whose first record this is; raises `BadRecordError` if it is none that we know."""
    for name, keys in _KEYS.items():
        if keys <= record.keys():
            return name
    raise BadRecordError(
        f"has the keys {', '.join(map(str, record)) or '(none)'}, which fit no known format ({_NAMES})"
    )


def convert(record: Mapping[str, Any], name: str, input_heading: str) -> Example:
    """Read a record of format `name`; `input_heading` stands between an instruction and its input.

    Raises `BadRecordError`.
    """
    missing = _KEYS[name] - record.keys()
    if missing:
        raise BadRecordError(f"lacks {', '.join(sorted(missing))}, which the {name} format needs")
    return _CONVERT[name](record, input_heading)


def ignored(record: Mapping[str, Any], name: str) -> set[str]:
    """The keys of a record that its format does not use."""
    return set(record) - _KEYS[name] - {"input", "system"} if name == "instruction" else set(record) - _KEYS[name]


def _instruction(record: Mapping[str, Any], input_heading: str) -> Example:
    question, extra = _text(record, "instruction"), _optional(record, "input")
    if extra.strip():
        question = f"{question}{input_heading}{extra}"
    system = _optional(record, "system")
    before = [{"role": "system", "content": system}] if system.strip() else []
    return _conversation(
        [*before, {"role": "user", "content": question}, {"role": "assistant", "content": _text(record, "output")}]
    )


def _turns(key: str) -> Callable[[Mapping[str, Any], str], Example]:
    def convert(record: Mapping[str, Any], _heading: str) -> Example:
        turns = record[key]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecordError(f"{key} is not a list of turns")
        return _conversation([_turn(turn, number) for number, turn in enumerate(turns, start=1)])

    return convert


def _prompt_completion(record: Mapping[str, Any], _heading: str) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns("both")({"both": [*prompt, *completion]}, "")
    return _conversation(
        [
            {"role": "user", "content": _text(record, "prompt")},
            {"role": "assistant", "content": _text(record, "completion")},
        ]
    )


def _plain_text(record: Mapping[str, Any], _heading: str) -> Example:
    text = _text(record, "text")
    if not text.strip():
        raise BadRecordError("empty text")
    return Example(text=_whole(text))


def _turn(turn: Mapping[str, Any], number: int) -> Message:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise BadRecordError(f"turn {number} lacks {'role or from' if role is None else 'content or value'}")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecordError(f"unknown role {role!r} in turn {number} (known: {', '.join(_ROLES)})")
    if not isinstance(content, str):
        raise BadRecordError(f"the content of turn {number} is of type {type(content).__name__}, not text")
    return {"role": _ROLES[role], "content": content}


def _conversation(messages: list[Message]) -> Example:
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise BadRecordError(
                "empty answer" if message["role"] == "assistant" else f"empty {message['role']} turn ({number})"
            )
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRecordError("does not end with an answer of the assistant")
    for message in messages:
        _whole(message["content"])
    return Example(messages=tuple(messages))


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise BadRecordError(f"{key} is of type {type(record[key]).__name__}, not text")
    return str(record[key])


def _whole(text: str) -> str:
    """JSON can write half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadRecordError(f"holds half a character ({text[e.start]!a}) at {e.start + 1}") from e
    return text


def _optional(record: Mapping[str, Any], key: str) -> str:
    return _text(record, key) if record.get(key) is not None else ""


_KEYS = {
    "messages": {"messages"},
    "conversations": {"conversations"},
    "instruction": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
    "text": {"text"},
}
_CONVERT: Mapping[str, Callable[[Mapping[str, Any], str], Example]] = {
    "messages": _turns("messages"),
    "conversations": _turns("conversations"),
    "instruction": _instruction,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
