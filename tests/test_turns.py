"""Conversations as people keep them: roles, calls of tools, weights of answers, and which answers are learned."""

import importlib.resources
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_prepare import spans
from tokenizers import AddedToken

from job.model import tokenizer
from job.model.tokenizer import IGNORED
from job.prepare import formats, records, tokens
from job.prepare.formats import Example
from job.prepare.turns import BadRecordError

WEATHER = {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}  # fmt: skip
TOOLS = [{"type": "function", "function": WEATHER}]
ROME = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASKED, ANSWERED = {"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "20 C."}


def said(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def template(name: str) -> str:
    """A real chat template, as TRL has it."""
    path = Path(str(importlib.resources.files("trl"))) / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def example(record: dict[str, object]) -> Example:
    """What a record says, in the format that its keys show."""
    return formats.convert(record, formats.recognise(record), "\n\n")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [said("system", "Be brief."), ASKED, ANSWERED]},
        {"messages": [said("developer", "Be brief."), ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED], "system": "Be brief."},
        {"messages": [said("system", "Be brief."), said("user", [{"type": "text", "text": "Warm?"}]), ANSWERED]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Warm?"},
                           {"from": "gpt", "value": "20 C."}]},
        {"conversations": [{"from": "user", "value": "Warm?"}, {"from": "chatgpt", "value": "20 C."}],
         "system": "Be brief."},
        {"instruction": "Warm?", "output": "20 C.", "system": "Be brief."},
        {"prompt": [said("system", "Be brief."), ASKED], "completion": [ANSWERED]},
        {"messages": [ASKED, said("assistant", "20 C.", weight=None, tool_calls=None)], "system": "Be brief.",
         "tools": None},
    ],
    ids="-".join,
)  # fmt: skip
def test_the_same_conversation_in_different_words(record: dict[str, object]) -> None:
    """The names of OpenAI, ShareGPT and their relatives for roles, contents and the system message."""
    assert example(record) == Example(messages=(said("system", "Be brief."), ASKED, ANSWERED))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, said("assistant", "", tool_calls=[ROME]), said("tool", "20 C"), ANSWERED], "tools": TOOLS},
        {"messages": [
            ASKED,
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
            said("tool", "20 C"), ANSWERED,
        ], "tools": json.dumps(TOOLS)},
        {"conversations": [
            {"from": "human", "value": "Warm?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "20 C"}, {"from": "gpt", "value": "20 C."},
        ], "tools": json.dumps([WEATHER])},
        {"messages": [
            ASKED, {"role": "assistant", "content": None, "function_call": ROME["function"]}, said("function", "20 C"),
            ANSWERED,
        ], "tools": TOOLS},
    ],
    ids=["openai", "openai as text", "sharegpt", "openai of 2023"],
)  # fmt: skip
def test_calls_of_tools_in_different_words(record: dict[str, object]) -> None:
    """As objects and as JSON in text; templates want objects."""
    called = example(record)

    assert called.messages == (ASKED, said("assistant", "", tool_calls=[ROME]), said("tool", "20 C"), ANSWERED)
    assert list(called.tools) == TOOLS


def test_earlier_turns_of_an_instruction_come_first() -> None:
    """As pairs of question and answer."""
    record = {"instruction": "And now?", "output": "Cold.", "history": [["Warm?", "20 C."]]}

    assert example(record).messages == (ASKED, ANSWERED, said("user", "And now?"), said("assistant", "Cold."))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [said("user", "?", tool_calls=[ROME]), ANSWERED]}, "turn 1 calls tools, and is not the assis"),
        ({"messages": [ASKED, said("assistant", "", tool_calls=[{"function": {}}])]}, "call in turn 2 has no name"),
        ({"messages": [ASKED, said("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]}, "is not JSON"),
        ({"messages": [ASKED, said("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])]}, "are no object"),
        ({"messages": [ASKED, ANSWERED], "tools": [{"description": "?"}]}, "a tool has no name"),
        ({"messages": [ASKED, ANSWERED], "tools": "{"}, "tools is not JSON"),
        ({"messages": [said("system", "A"), ASKED, ANSWERED], "system": "B"}, "has a system message twice"),
        ({"messages": [ASKED, said("assistant", [{"type": "image"}])]}, "an answer holds an image"),
        ({"messages": [said("user", [{"type": "video"}]), ANSWERED]}, "a part of turn 1 is of type video, neither"),
        ({"messages": [said("user", 3), ANSWERED]}, "content of turn 1 is of type int, not text"),
        ({"messages": [ASKED, said("assistant", "x", weight=0.5)]}, "the weight of turn 2 is 0.5: it must be 0 or 1"),
        ({"messages": [ASKED, said("assistant", "x", weight=0)]}, "every answer has weight 0"),
        ({"messages": [said("user", "x", weight=1), ANSWERED]}, "only the assistant's turns can be learned"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "history is not a list of pairs"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_turn_is_told(record: dict[str, object], reason: str) -> None:
    """With its number, so that it can be found."""
    with pytest.raises(BadRecordError, match=re.escape(reason)):
        example(record)


def test_parquets_empty_fields_are_no_fields(tmp_path: Path) -> None:
    """Each row of a table has the keys of all rows."""
    rows = [{"messages": [ASKED, {**ANSWERED, "weight": 1, "tool_calls": [{"name": "f", "arguments": "{}"}]}]},
            {"messages": [ASKED, ANSWERED]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")

    found = [record.value for record in records.read(tmp_path / "x.parquet", "x.parquet")]

    assert found[1] == rows[1]


EXAMPLES = [path for path in sorted((ROOT / "tests" / "data").glob("*.jsonl")) if path.stem != "images"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_of_the_readme_can_be_trained_on(
    path: Path, prepared: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Every record of each, recognised by its keys; and the table has a line for each."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template("qwen2_5"), encoding="utf-8")

    folder = prepared(path, model=model, method="dpo" if path.stem == "preference" else "sft")

    counts = json.loads((folder / "data.json").read_text(encoding="utf-8"))["train"]
    assert counts["examples"] == counts["records"] == len(path.read_text(encoding="utf-8").splitlines())
    assert not counts["ignored_keys"]
    assert f"(tests/data/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


TOOL_FAMILIES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2")


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_calls_of_tools_are_trained_as_the_template_writes_them(family: str, tiny_model: Path) -> None:
    """As in the templates that TRL marked by hand; what a tool answers is context."""
    words = tokenizer.load(tiny_model)
    words.add_tokens([AddedToken(mark, special=True) for mark in ("<|tool_list_start|>", "<|tool_list_end|>")])
    words.chat_template = template(f"{family}_training")
    oslo = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    turns = [
        said("system", "Be brief."), ASKED, said("assistant", "", tool_calls=[ROME, oslo]),
        said("tool", "20 C", name="weather"), said("tool", "-3 C", name="weather"), ANSWERED, said("user", "Thanks."),
        said("assistant", "Let me look again.", tool_calls=[ROME]),
    ]  # fmt: skip
    told = example({"messages": turns, "tools": TOOLS})

    (row,) = tokens.Renderer(words, 4096, "assistant").rows([told])

    marked = words.apply_chat_template(
        list(told.messages), tools=list(told.tools), return_dict=True, return_assistant_tokens_mask=True
    )
    theirs = [
        token if on else IGNORED for token, on in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    ]
    assert isinstance(row, tokens.Row)
    assert row.input_ids == marked["input_ids"]
    assert spans(words, row.labels) == spans(words, theirs)


@pytest.mark.parametrize("family", ["deepseekv3", "muse_glimmer"])
def test_a_template_that_fails_on_a_record_refuses_the_record(family: str, tiny_model: Path) -> None:
    """Whatever it raises: the template is a program that somebody else wrote."""
    words = tokenizer.load(tiny_model)
    words.chat_template = template(family)
    told = example({"messages": [ASKED, said("assistant", "x", tool_calls=[ROME]), said("tool", "?"), ANSWERED]})

    (row,) = tokens.Renderer(words, 4096, "assistant").rows([told])

    assert isinstance(row, BadRecordError)


def test_a_template_without_a_place_for_tools_is_refused(tiny_model: Path) -> None:
    """It would leave them out, and the model would learn to guess."""
    words = tokenizer.load(tiny_model)
    called = said("assistant", "", tool_calls=[ROME])
    both = [
        example({"messages": [said("user", "How is the weather?"), ANSWERED], "tools": TOOLS}),
        example({"messages": [ASKED, said("assistant", "I ask weather.", tool_calls=[ROME])]}),
        example({"messages": [ASKED, called]}),
    ]

    reasons = [str(row) for row in tokens.Renderer(words, 4096, "assistant").rows(both)]

    assert reasons == ["the chat template has no place for tools and their calls"] * 3
    words = tokenizer.load(tiny_model, "instruction-en")
    (row,) = tokens.Renderer(words, 4096, "assistant").rows(
        [example({"messages": [ASKED, said("assistant", "x", tool_calls=[ROME]), said("tool", "20 C"), ANSWERED]})]
    )
    assert "no place for tools" in str(row)
    (row,) = tokens.Renderer(words, 4096, "assistant").rows(
        [example({"messages": [ASKED, said("tool", "?"), ANSWERED]})]
    )
    assert "an instruction template has no place for the role tool" in str(row)


@pytest.mark.parametrize(
    ("loss_on", "weights", "learned"),
    [
        ("assistant", (None, None), ["One.<|im_end|>", "Two.<|im_end|>"]),
        ("last", (None, None), ["Two.<|im_end|>"]),
        ("assistant", (0, 1), ["Two.<|im_end|>"]),
        ("assistant", (1, 0), ["One.<|im_end|>"]),
        ("assistant", (0, None), ["Two.<|im_end|>"]),
        ("last", (0, 1), ["Two.<|im_end|>"]),
    ],
)
def test_the_answers_that_are_learned_are_those_that_were_chosen(
    loss_on: str, weights: tuple[int | None, ...], learned: list[str], tiny_model: Path
) -> None:
    """By the config, for every conversation, or by the weights of the messages."""
    words = tokenizer.load(tiny_model)
    answers = [said("assistant", text, weight=weight) for text, weight in zip(("One.", "Two."), weights, strict=True)]
    record = {"messages": [said("user", "1?"), answers[0], said("user", "2?"), answers[1]]}

    (row,) = tokens.Renderer(words, 4096, loss_on).rows([example(record)])

    assert isinstance(row, tokens.Row)
    assert spans(words, row.labels) == learned


@pytest.mark.parametrize(
    ("loss_on", "reason"), [("all", "data.loss_on is all"), ("last", "its last answer has weight 0")]
)
def test_weights_that_contradict_the_config_are_refused(loss_on: str, reason: str, tiny_model: Path) -> None:
    """All tokens cannot be learned and one answer not; nor the last answer only, if it has weight 0."""
    record = {"messages": [ASKED, ANSWERED, ASKED, said("assistant", "x", weight=0)]}

    (row,) = tokens.Renderer(tokenizer.load(tiny_model), 4096, loss_on).rows([example(record)])

    assert reason in str(row)


def test_only_keys_without_a_use_are_called_unused() -> None:
    """Tools and system are what some records have besides."""
    record = {"messages": [said("user", "?", name="a", score=1)], "tools": [], "system": "", "id": 1}

    assert formats.ignored(record, "messages") == {"id", "messages[].score"}
