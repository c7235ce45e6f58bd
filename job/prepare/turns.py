"""One turn of a conversation, as OpenAI, ShareGPT and their relatives write it, as chat templates want it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_CALL = "call"
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
_WEIGHTS = ("weight", "train")  # OpenAI's name for it, and axolotl's
_KEPT = ("name", "tool_call_id", "reasoning_content")
READ = {"role", "from", "content", "value", "tool_calls", "function_call", *_WEIGHTS, *_KEPT}  # keys of a turn


class BadRecordError(Exception):
    """This record cannot be trained on; the message says why."""


def turn(given: Mapping[str, Any], number: int) -> Message:
    """The turn that is `given`, the one with this `number`; raises `BadRecordError`."""
    role, content = _either(given, "role", "from"), _either(given, "content", "value")
    if role is None:
        raise BadRecordError(f"turn {number} lacks role or from")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRecordError(f"unknown role {role!r} in turn {number} (known: {', '.join(_ROLES)})")
    role = _ROLES[role]
    calls = given.get("tool_calls") or given.get("function_call")
    if role == _CALL:
        role, content, calls = "assistant", "", _parsed(content, f"the call in turn {number}")
    if content is None and not calls:
        raise BadRecordError(f"turn {number} lacks content or value")
    message: Message = {"role": role, "content": _content(content, number)}
    if calls:
        if role != "assistant":
            raise BadRecordError(f"turn {number} calls tools, and is not the assistant's")
        message["tool_calls"] = [_call(each, number) for each in (calls if isinstance(calls, list) else [calls])]
    for key in _KEPT:
        if isinstance(given.get(key), str):
            message[key] = whole(given[key])
    return message


def trained(turns: Sequence[Mapping[str, Any]]) -> tuple[bool, ...]:
    """Whether each answer among the `turns` is to be learned; empty if none says anything about it."""
    said = [(number, each, _weight(each, number)) for number, each in enumerate(turns, start=1)]
    if all(weight is None for _, _, weight in said):
        return ()
    answers = []
    for number, each, weight in said:
        if _ROLES[str(_either(each, "role", "from"))] in ("assistant", _CALL):
            answers.append(weight is not False)
        elif weight:
            raise BadRecordError(f"turn {number} has a weight, and only the assistant's turns can be learned")
    if not any(answers):
        raise BadRecordError("every answer has weight 0: there is nothing to learn")
    return tuple(answers)


def read_tools(given: object) -> tuple[dict[str, Any], ...]:
    """The tools of a record, described as JSON schemas, as OpenAI writes them; raises `BadRecordError`."""
    tools = _parsed(given, "tools")
    made = []
    for tool in tools if isinstance(tools, list) else [tools]:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRecordError(f"a tool has no name: {json.dumps(tool, ensure_ascii=False)[:80]}")
        made.append({"type": "function", "function": inner})
    return tuple(made)


def answered(messages: Sequence[Message]) -> None:
    """Raise `BadRecordError` if there is a turn without content, or no answer in the end."""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not message["content"].strip() and role != "tool" and "tool_calls" not in message:
            raise BadRecordError("empty answer" if role == "assistant" else f"empty {role} turn ({number})")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRecordError("does not end with an answer of the assistant")


def whole(text: str) -> str:
    """JSON can write half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadRecordError(f"holds half a character ({text[e.start]!a}) at {e.start + 1}") from e
    return text


def _either(given: Mapping[str, Any], one: str, other: str) -> object:
    return given[one] if given.get(one) is not None else given.get(other)


def _content(content: object, number: int) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is not None and not isinstance(content, str):
        raise BadRecordError(f"the content of turn {number} is of type {type(content).__name__}, not text")
    return whole(content or "")


def _call(given: object, number: int) -> dict[str, Any]:
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRecordError(f"a tool call in turn {number} has no name")
    arguments = _parsed(inner.get("arguments") or {}, f"the arguments of {inner['name']} in turn {number}")
    if not isinstance(arguments, dict):
        raise BadRecordError(f"the arguments of {inner['name']} in turn {number} are no object")
    told = {"id": given["id"]} if isinstance(given, dict) and isinstance(given.get("id"), str) else {}
    return {**told, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _parsed(given: object, what: str) -> object:
    """JSON that is kept as text, which OpenAI does with arguments, and ShareGPT's relatives with everything."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(whole(given))
    except ValueError as e:
        raise BadRecordError(f"{what} is not JSON: {e}") from e


def _weight(given: Mapping[str, Any], number: int) -> bool | None:
    weight = next((given[key] for key in _WEIGHTS if given.get(key) is not None), None)
    if weight not in (None, 0, 1):
        raise BadRecordError(f"the weight of turn {number} is {weight!r}: it must be 0 or 1")
    return None if weight is None else bool(weight)
