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
IMAGE = "\ufdd0"  # stands for an image in the content of a turn; by Unicode no character, so that no text holds it
Image = str | bytes | None
"""Where an image lies, or what it is; None for one of those that the record names besides."""
WORD = "<image>"  # as LLaVA and its relatives write its place
_IMAGES = ("image", "image_url", "input_image")
INLINE = "data:image/"  # how a URL begins that holds the image itself
_IMAGE_KEYS = ("image", "image_url", "url", "path")
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
    text, images = _content(content, number)
    message: Message = {"role": role, "content": text, **({"images": images} if images else {})}
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


def image(given: object) -> Image:
    """An image as records name it: a path or URL, or an object that holds one, or the bytes; None if it is nothing."""
    if isinstance(given, dict):
        if isinstance(given.get("bytes"), str):
            given = {"url": f"{INLINE}any;base64,{given['bytes']}"}
        given = next((given[key] for key in ("bytes", "path", "url") if given.get(key) is not None), None)
    if given is not None and not isinstance(given, str | bytes):
        raise BadRecordError(f"an image is of type {type(given).__name__}, not a path, a URL or bytes")
    return given


def placed(messages: Sequence[Message], record: Mapping[str, Any]) -> tuple[str | bytes, ...]:
    """The images of a conversation, each with its sign in the `messages`, which lose everything else about them.

    A record may name them in its turns, or besides: then they belong where the turns have parts without a name, or the
    word <image>, or else before the first question.
    """
    given = record.get("images") if record.get("images") is not None else record.get("image")
    named = [image(each) for each in (given if isinstance(given, list) else [given] if given else [])]
    empty = [number for number, each in enumerate(named, start=1) if not each]
    if empty:
        raise BadRecordError(f"image {empty[0]} of its images is empty")
    if any("images" in message and message["role"] == "assistant" for message in messages):
        raise BadRecordError("an answer holds an image, and answers are text")
    found = [each for message in messages for each in message.pop("images", ())]
    if named and not found:
        asked = [message for message in messages if message["role"] == "user"]
        words = sum(message["content"].count(WORD) for message in asked)
        for message in asked if words else ():
            message["content"] = message["content"].replace(WORD, IMAGE)
        if not words and asked:
            asked[0]["content"] = IMAGE * len(named) + asked[0]["content"]
        found = [None] * (words or len(named))
    free = found.count(None)
    if free != len(named):
        raise BadRecordError(f"names {len(named)} images besides its turns, and has {free} places for them")
    besides = iter(named)
    each_in_place = [next(besides) if each is None else each for each in found]
    there = tuple(each for each in each_in_place if each)
    if len(there) < len(each_in_place):
        raise BadRecordError("an image of its turns is empty")
    if sum(message["content"].count(IMAGE) for message in messages) != len(there):
        raise BadRecordError("holds U+FDD0, which is no character")
    return there


def _content(content: object, number: int) -> tuple[str, list[Image]]:
    """The text of a turn with a sign for each image, and the images."""
    if content is not None and not isinstance(content, str | list):
        raise BadRecordError(f"the content of turn {number} is of type {type(content).__name__}, not text")
    if not isinstance(content, list):
        return whole(content or ""), []
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text += str(part.get("text") or "")
        elif kind in _IMAGES:
            text += IMAGE
            images.append(image(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)))
        else:
            raise BadRecordError(f"a part of turn {number} is of type {kind}, neither text nor image")
    return whole(text), images


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
