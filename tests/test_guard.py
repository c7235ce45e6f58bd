"""What is learned is the answers and the ends of their turns, and nothing else: for any conversation and template."""

import dataclasses
import importlib.resources
import itertools
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare import KNOWN, MARKS, spans
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from job import errors
from job.model import tokenizer
from job.model.tokenizer import IGNORED
from job.prepare import formats, packing, tokens
from job.prepare.turns import BadRecordError

often = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=40).filter(
    lambda text: text.strip()
)
PIECES = st.sampled_from(
    ["It is 3.", "\n\n", "  ", "你好", "é", "```py\nx = 1\n```", "👩‍👩‍👧", "user", "assistant", "1234567"]
)
CONTENT = st.one_of(TEXT, st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(lambda text: text.strip()))
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)
"""Questions and their answers."""


@pytest.fixture(scope="module")
def words(tiny_model: Path) -> PreTrainedTokenizerBase:
    """The tiny tokenizer, with the special tokens of real families."""
    loaded = tokenizer.load(tiny_model)
    loaded.add_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return loaded


def conversation(turns: list[tuple[str, str]]) -> formats.Example:
    return formats.Example(
        messages=tuple(
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        )
    )


@pytest.mark.parametrize("family", KNOWN)
@often
@given(turns=TURNS)
def test_with_real_templates_what_is_learned_is_what_was_marked_by_hand(
    family: str, words: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    """Token for token, but for the line break after the end of a turn, which nobody generates."""
    path = Path(str(importlib.resources.files("trl"))) / "chat_templates" / f"{family}_training.jinja"
    words.chat_template = path.read_text(encoding="utf-8")
    told = conversation(turns)

    (row,) = tokens.Renderer(words, 10**6, "assistant").rows([told])

    marked = words.apply_chat_template(list(told.messages), return_dict=True, return_assistant_tokens_mask=True)
    theirs = [
        token if on else IGNORED for token, on in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    ]
    assert isinstance(row, tokens.Row), row
    assert row.input_ids == marked["input_ids"]
    assert spans(words, row.labels) == spans(words, theirs)


@pytest.mark.parametrize("family", ["instruction-en", "instruction-zh"])
@often
@given(turns=TURNS)
def test_with_instruction_templates_what_is_learned_is_each_answer_and_its_end(
    family: str, tiny_model: Path, turns: list[tuple[str, str]]
) -> None:
    """Whatever stands around it, and whatever headings the texts themselves hold."""
    words = tokenizer.load(tiny_model, family)

    (row,) = tokens.Renderer(words, 10**6, "assistant").rows([conversation(turns)])

    assert isinstance(row, tokens.Row), row
    assert spans(words, row.labels) == [
        words.decode(words(f"{answer}<|im_end|>")["input_ids"]).strip() for _, answer in turns
    ]


@often
@given(turns=TURNS)
def test_the_same_conversation_is_the_same_example_in_every_format(turns: list[tuple[str, str]]) -> None:
    """As messages, as ShareGPT's turns, as an instruction with a history, and as prompt and completion."""
    messages = list(conversation(turns).messages)
    records = [
        {"messages": messages},
        {"conversations": [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in messages]},
        {"instruction": turns[-1][0], "output": turns[-1][1], "history": [list(turn) for turn in turns[:-1]]},
        {"prompt": messages[:-1], "completion": messages[-1:]},
    ]

    told = [formats.convert(record, formats.recognise(record), "").messages for record in records]

    assert all(each == told[0] for each in told)


@often
@given(turns=TURNS, chosen=st.lists(st.booleans(), min_size=4, max_size=4))
def test_answers_that_are_not_chosen_are_context(
    words: PreTrainedTokenizerBase, turns: list[tuple[str, str]], chosen: list[bool]
) -> None:
    """The tokens are the same; of the labels those of the chosen answers stay."""
    chosen = chosen[: len(turns)]
    told = conversation(turns)
    words.chat_template = tokenizer.load(Path(words.name_or_path)).chat_template
    every, last, some = (
        next(iter(tokens.Renderer(words, 10**6, how).rows([example])))
        for how, example in [
            ("assistant", told), ("last", told), ("assistant", dataclasses.replace(told, trained=tuple(chosen)))
        ]
    )  # fmt: skip

    assert isinstance(every, tokens.Row)
    assert isinstance(last, tokens.Row)
    assert every.input_ids == last.input_ids
    assert spans(words, last.labels) == spans(words, every.labels)[-1:]
    if any(chosen):
        assert isinstance(some, tokens.Row)
        kept = [span for span, on in zip(spans(words, every.labels), chosen, strict=True) if on]
        assert spans(words, some.labels) == kept
    else:
        assert isinstance(some, BadRecordError)


@often
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_packing_neither_loses_nor_moves_a_label(lengths: list[int], seed: int) -> None:
    """Each example is in one sequence, with its own labels, whatever the lengths."""
    dice = random.Random(seed)
    rows = [[dice.randrange(3, 400) for _ in range(length)] for length in lengths]
    labels = [[token if dice.random() < 0.5 else IGNORED for token in row] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.arrow"
        schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([rows, labels], schema=schema))
        packing.pack(path, 48)
        found = [
            (tuple(line["input_ids"][start:stop]), tuple(line["labels"][start:stop]))
            for line in Dataset.from_file(str(path))
            for start, stop in itertools.pairwise(itertools.accumulate(line["seq_lengths"], initial=0))
        ]

    assert sorted(found) == sorted(zip(map(tuple, rows), map(tuple, labels), strict=True))


@often
@given(turns=st.lists(TURNS, min_size=1, max_size=3), packed=st.booleans())
def test_what_reaches_the_model_is_what_was_prepared(
    words: PreTrainedTokenizerBase,
    turns: list[list[tuple[str, str]]],
    packed: bool,  # noqa: FBT001 - of hypothesis
) -> None:
    """Through the collator too, with padding or without: padding is not learned."""
    words.chat_template = tokenizer.load(Path(words.name_or_path)).chat_template
    rows = [
        row
        for row in tokens.Renderer(words, 10**6, "assistant").rows([conversation(each) for each in turns])
        if isinstance(row, tokens.Row)
    ]
    examples = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    if packed:
        examples = [
            {
                "input_ids": [token for row in rows for token in row.input_ids],
                "labels": [label for row in rows for label in row.labels],
                "seq_lengths": [len(row.input_ids) for row in rows],
            }
        ]

    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)(examples)

    learned = [label for label in batch["labels"].flatten().tolist() if label != IGNORED]
    assert learned == [label for row in rows for label in row.labels if label != IGNORED]
    assert len(rows) == len(turns)


def test_data_that_no_template_writes_are_not_read_to_their_end(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """What the first batch shows needs no million records."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    path = records("train.jsonl", [{"instruction": "What is 1 and 2?", "output": "It is 3."}] * 5000)

    with pytest.raises(errors.DataError, match="train: 1000 of 1000 records read cannot be used"):
        prepared(path, model=model)


def test_a_split_of_which_nothing_is_context_is_refused(
    prepared: Callable[..., Path], records: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format says that there are questions; an example shows what would be learned."""
    monkeypatch.setattr(tokens, "_overlaps", lambda _place, spans: bool(spans))
    path = records("train.jsonl", [{"instruction": "What is 1 and 2?", "output": "It is 3."}] * 3)

    with pytest.raises(errors.DataError, match="every token would be learned, questions too") as caught:
        prepared(path)

    assert "⟦<|im_start|>user\nWhat is 1 and 2?" in str(caught.value)
