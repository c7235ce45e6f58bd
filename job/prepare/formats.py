"""From records to conversations: the shapes in which people keep training data, told apart by their keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from job import config
from job.prepare.turns import READ, BadRecordError, Message, answered, placed, read_tools, trained, turn, whole

_NAMES = ", ".join(get_args(config.Data.model_fields["format"].annotation)[1:])


@dataclass(frozen=True)
class Example:
    """What a record says: a conversation, with the tools that its assistant has, or text that is trained as it is."""

    messages: tuple[Message, ...] = ()
    """In which IMAGE stands for an image."""
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    """Whether each answer is to be learned, in their order, where the record says so."""
    images: tuple[str | bytes, ...] = ()
    """In the order of their places: where they lie, or what they are."""
    rejected: "Example | None" = None
    """The same conversation with the answer that is not preferred, if it is about two of them."""


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
    """The keys of a record that its format does not use, and those of its turns."""
    used = _KEYS[name] | _OPTIONAL.get(name, set())
    inner = {
        f"{key}[].{each}"
        for key in used & record.keys()
        for item in (record[key] if key in _TURNS and isinstance(record[key], list) else ())
        if isinstance(item, dict)
        for each in item.keys() - READ
    }
    return (set(record) - used) | inner


def _instruction(record: Mapping[str, Any], input_heading: str) -> Example:
    question, extra = _text(record, "instruction"), _optional(record, "input")
    if extra.strip():
        question = f"{question}{input_heading}{extra}"
    turns = [*_history(record.get("history") or ()), (question, _text(record, "output"))]
    return _conversation(
        [
            {"role": role, "content": content}
            for pair in turns
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ],
        record,
    )


def _history(pairs: object) -> list[tuple[str, str]]:
    """Earlier questions and answers, as they are kept beside an instruction."""
    if not isinstance(pairs, Sequence) or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)  # noqa: PLR2004 - question and answer
        for pair in pairs
    ):
        raise BadRecordError("history is not a list of pairs of question and answer")
    return [(pair[0], pair[1]) for pair in pairs]


def _turns(key: str) -> Callable[[Mapping[str, Any], str], Example]:
    def convert(record: Mapping[str, Any], _heading: str) -> Example:
        turns = record[key]
        if not isinstance(turns, list) or not all(isinstance(each, dict) for each in turns):
            raise BadRecordError(f"{key} is not a list of turns")
        return _conversation(turns, record)

    return convert


def _prompt_completion(record: Mapping[str, Any], _heading: str) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns("both")({**record, "both": [*prompt, *completion]}, "")
    return _conversation(
        [
            {"role": "user", "content": _text(record, "prompt")},
            {"role": "assistant", "content": _text(record, "completion")},
        ],
        record,
    )


def _plain_text(record: Mapping[str, Any], _heading: str) -> Example:
    text = _text(record, "text")
    if not text.strip():
        raise BadRecordError("empty text")
    if any(record.get(key) for key in _SEEN):
        raise BadRecordError("is text with images, which have no place in it: write it as messages")
    return Example(text=whole(text))


def _conversation(turns: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Example:
    messages = [turn(each, number) for number, each in enumerate(turns, start=1)]
    answered(messages)
    system = _optional(record, "system")
    if system.strip():
        if messages and messages[0]["role"] == "system":
            raise BadRecordError("has a system message twice: as the first turn, and as system")
        messages.insert(0, {"role": "system", "content": system})
    images = placed(messages, record)
    tools = read_tools(record["tools"]) if record.get("tools") else ()
    return Example(messages=tuple(messages), tools=tools, trained=trained(turns), images=images)


def _preference(record: Mapping[str, Any], input_heading: str) -> Example:
    """Two answers to what came before, of which the first is preferred."""
    asked = _numbered(_asked(record, input_heading))
    chosen, rejected = (_numbered(_answer(record, key)) for key in ("chosen", "rejected"))
    if len(chosen) > 1 and len(rejected) > 1 and chosen[:-1] == rejected[:-1]:  # the question is told in both
        before, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        if asked[-len(before) :] != before:
            if asked and before[-len(asked) :] != asked:
                raise BadRecordError("chosen and rejected begin with something else than the prompt")
            asked = before
    if not asked:
        raise BadRecordError("has no prompt, and chosen and rejected do not begin with the same one")
    if any("images" in message for message in (*asked, *chosen, *rejected)) or record.get("images"):
        raise BadRecordError("has images, and pairs of answers are compared on text only")
    if chosen == rejected:
        raise BadRecordError("chosen and rejected are the same")
    earlier = sum(message["role"] == "assistant" for message in asked)
    made = []
    for answers in (chosen, rejected):
        example = _conversation([*asked, *answers], record)
        later = sum(message["role"] == "assistant" for message in answers)
        made.append(replace(example, trained=(False,) * earlier + (True,) * later))
    return replace(made[0], rejected=made[1])


def _numbered(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    return [turn(each, number) for number, each in enumerate(turns, start=1)]


def _asked(record: Mapping[str, Any], input_heading: str) -> list[Mapping[str, Any]]:
    prompt = record.get("prompt")
    if prompt is not None:
        return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": _text(record, "prompt")}]
    if record.get("instruction") is not None:
        told = _instruction({**record, "output": "-", "system": None, "tools": None}, input_heading)
        return list(told.messages[:-1])
    for key in ("messages", "conversations"):
        turns = record.get(key)
        if isinstance(turns, list) and turns and _numbered(turns)[-1]["role"] != "assistant":  # not one of the answers
            return list(turns)
    return []


def _answer(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    given = record[key]
    if isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise BadRecordError(f"{key} is neither text nor a turn nor a list of turns")
    return given


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise BadRecordError(f"{key} is of type {type(record[key]).__name__}, not text")
    return str(record[key])


def _optional(record: Mapping[str, Any], key: str) -> str:
    return _text(record, key) if record.get(key) is not None else ""


_SEEN = ("image", "images")
_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_KEYS = {
    "preference": {"chosen", "rejected"},
    "messages": {"messages"},
    "conversations": {"conversations"},
    "instruction": {"instruction", "output"},
    "prompt-completion": {"prompt", "completion"},
    "text": {"text"},
}
_OPTIONAL = {
    "preference": {"prompt", "messages", "conversations", "instruction", "input", "system", "history", "tools"},
    "messages": {"tools", "system", *_SEEN},
    "conversations": {"tools", "system", *_SEEN},
    "instruction": {"input", "system", "history", "tools", *_SEEN},
    "prompt-completion": {"tools", "system", *_SEEN},
}
_CONVERT: Mapping[str, Callable[[Mapping[str, Any], str], Example]] = {
    "messages": _turns("messages"),
    "conversations": _turns("conversations"),
    "instruction": _instruction,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
    "preference": _preference,
}
