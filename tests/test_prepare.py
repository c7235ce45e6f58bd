"""From data files to tokens and labels: what is read, what is trained, what is refused and how it is told."""

import gzip
import importlib.resources
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TEMPLATE, files
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from job import errors, manifest
from job.model import tokenizer
from job.model.tokenizer import IGNORED
from job.prepare import formats, tokens

PAIR = {"instruction": "What is 1 and 2?", "output": "It is 3."}
TRAINED = "<|im_start|>user\nWhat is 1 and 2?<|im_end|>\n<|im_start|>assistant\n⟦It is 3.<|im_end|>⟧\n"


def seen(folder: Path, model: Path, split: str = "train") -> list[str]:
    """What the model will see, with the trained parts marked."""
    words = tokenizer.load(model)
    rows = Dataset.from_file(str(folder / f"{split}.arrow"))
    return [tokens.marked(words, tokens.Row(r["input_ids"], r["labels"], truncated=False)) for r in rows]


ASKED, ANSWERED = {"role": "user", "content": "What is 1 and 2?"}, {"role": "assistant", "content": "It is 3."}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"instruction": "What is 1 and 2?", "input": "", "output": "It is 3."},
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "What is 1 and 2?"}, {"from": "gpt", "value": "It is 3."}]},
        {"conversations": [ASKED, ANSWERED]},
        {"prompt": "What is 1 and 2?", "completion": "It is 3."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ],
    ids="-".join,
)
def test_every_format_says_the_same(
    record: dict[str, object], prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """The answer and its end of turn are trained; the question and the headers are not."""
    assert seen(prepared(records("train.jsonl", [record])), tiny_model) == [TRAINED]


def test_every_answer_of_a_long_conversation_is_trained(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """System and user turns are context, each assistant turn is trained with its end."""
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two.")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}

    (text,) = seen(prepared(records("train.jsonl", [record])), tiny_model)

    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
        "⟦One.<|im_end|>⟧\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧\n"
    )


def test_text_is_trained_as_it_is_with_an_end(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """Plain text has no assistant, so all of it is trained."""
    path = records("train.jsonl", [{"text": "One and two."}, {"text": "Three.<|im_end|>"}])

    assert seen(prepared(path), tiny_model) == ["⟦One and two.<|im_end|>⟧", "⟦Three.<|im_end|>⟧"]


def test_loss_on_all_trains_every_token(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """Only when the config asks for it."""
    path = records("train.jsonl", [PAIR])

    assert seen(prepared(path, loss_on="all"), tiny_model) == ["⟦" + TRAINED.replace("⟦", "").replace("⟧", "") + "⟧"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("instruction-en", "### Instruction\nSum\n\n### Input\n1, 2\n\n### Response\n⟦3<|im_end|>⟧"),
        ("instruction-zh", "### 指令\nSum\n\n### 输入\n1, 2\n\n### 回答\n⟦3<|im_end|>⟧"),
        ("chat", "<|im_start|>user\nSum\n\n1, 2<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧\n"),
    ],
)
def test_templates_write_instruction_and_input(
    template: str, expected: str, prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """The tutorials' prompt in Chinese and English for base models, the model's own for chat models."""
    path = records("train.jsonl", [{"instruction": "Sum", "input": "1, 2", "output": "3"}])

    assert seen(prepared(path, template=template), tiny_model) == [expected]


def write_csv(path: Path) -> Path:
    path.write_text('instruction,output\n"What is 1 and 2?","It is 3."\n', encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps([PAIR]), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([PAIR]), path)
    return path


def write_gz(path: Path) -> Path:
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    return path


def write_zst(path: Path) -> Path:
    path.write_bytes(pa.Codec("zstd").compress(json.dumps(PAIR).encode(), asbytes=True))
    return path


def write_with_bom(path: Path) -> Path:
    path.write_text(json.dumps(PAIR) + "\n\n", encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", write_csv), ("a.json", write_json), ("a.parquet", write_parquet), ("a.jsonl.gz", write_gz),
        ("a.jsonl.zst", write_zst), ("a.jsonl", write_with_bom),
    ],
)  # fmt: skip
def test_every_kind_of_file_is_read(
    name: str, write: Callable[[Path], Path], prepared: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """JSON lines, JSON, CSV and Parquet, plain and compressed, with and without a byte-order mark."""
    assert seen(prepared(write(tmp_path / name)), tiny_model) == [TRAINED]


def test_json_lines_may_be_called_json(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """As many data sets of the hub call them."""
    folder = prepared(records("a.json", [PAIR, PAIR, PAIR]))

    assert json.loads((folder / "data.json").read_text())["train"]["examples"] == 3


def test_files_of_several_formats_make_one_split(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """The format is recognised for each file, and kept in the figures."""
    folder = prepared(records("one.jsonl", [PAIR, PAIR]), records("two.jsonl", [{"text": "One."}]))

    counts = json.loads((folder / "data.json").read_text())["train"]
    assert counts["examples"] == 3
    assert sorted(counts["formats"].values()) == ["instruction", "text"]
    assert 0 < counts["trained_tokens"] < counts["tokens"]


BROKEN = [
    ('{"instruction": "x", "output": ', "broken JSON: Expecting value at column"),
    ('{"instruction": "What?"}', "lacks output, which the instruction format needs"),
    ('{"instruction": "What?", "output": "  "}', "empty answer"),
    ('{"instruction": "What?", "output": 7}', "output is of type int, not text"),
    ('{"instruction": " ", "output": "x"}', "empty user turn (1)"),
    ('["What?", "That."]', "is of type list, not an object with keys"),
    ("caf\udce9", "not UTF-8: byte 0xe9 at column 4"),
    ('{"instruction": "What?", "output": "\\ud800"}', "holds half a character"),
    ('{"instruction": "What?", "output": "x", "output": "y"}', "unusable JSON: a key is given twice"),
    ("[" * 100_000, "unusable JSON"),
]


def test_every_bad_record_is_listed_with_file_line_and_reason(prepared: Callable[..., Path], tmp_path: Path) -> None:
    """All of them at once, so that one correction is enough; nothing is left that a later run would use."""
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(PAIR), *(line for line, _ in BROKEN)]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    with pytest.raises(errors.DataError) as caught:
        prepared(path)

    for number, (_, reason) in enumerate(BROKEN, start=2):
        assert f"{path.as_uri()}:{number}: {reason}" in str(caught.value)
    assert "10 of 11 records read cannot be used" in str(caught.value)
    assert "set data.skip_bad_share to 0.91" in str(caught.value)
    assert not [name for name in files(tmp_path / "cache" / "prepared") if name.endswith("manifest.json")]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "?")], "does not end with an answer of the assistant"),
        ([("narrator", "?"), ("assistant", "!")], "unknown role 'narrator' in turn 1"),
        ([(["user"], "?"), ("assistant", "!")], "unknown role ['user'] in turn 1"),
        ([("user", "?"), ("assistant", "")], "empty answer"),
        ([], "does not end with an answer"),
    ],
)
def test_a_conversation_that_cannot_be_trained_is_refused(
    turns: list[tuple[str, str]], reason: str, prepared: Callable[..., Path], records: Callable[..., Path]
) -> None:
    """Unknown roles, empty answers, and conversations without an answer at the end."""
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}

    with pytest.raises(errors.DataError, match=re.escape(reason)):
        prepared(records("train.jsonl", [record]))


def test_a_token_that_the_model_has_no_embedding_for_is_refused(
    tiny_model: Path, prepared: Callable[..., Path], records: Callable[..., Path], tmp_path: Path
) -> None:
    """Before a GPU meets it, which would end with an assertion of the device in the first step, again and again."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    words = AutoTokenizer.from_pretrained(base)
    rows = len(words)
    words.add_tokens(["<|turn|>"])
    words.chat_template = words.chat_template.replace("<|im_start|>", "<|turn|>")
    words.save_pretrained(base)
    data = records("train.jsonl", [{"prompt": "Why?", "completion": "So."}])

    with pytest.raises(errors.ModelError, match=rf"makes token {rows} \(<\|turn\|>\), .* embeddings for {rows}: use"):
        prepared(data, model=base)


def test_bad_records_are_left_out_up_to_the_share_that_the_config_allows(
    prepared: Callable[..., Path], records: Callable[..., Path]
) -> None:
    """And they are counted."""
    path = records("train.jsonl", [PAIR, PAIR, PAIR, {"instruction": "What?", "output": ""}])

    counts = json.loads((prepared(path, skip_bad_share=0.25) / "data.json").read_text())["train"]

    assert (counts["records"], counts["examples"], counts["bad"]) == (4, 3, 1)
    with pytest.raises(errors.DataError, match="1 of 4 records"):
        prepared(path, skip_bad_share=0.24)


def test_a_long_list_of_bad_records_is_cut(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """Twenty are listed; a file that is all wrong is not read to its end."""
    path = records("train.jsonl", [{"instruction": "What?", "output": ""}] * 500)

    with pytest.raises(errors.DataError, match="and 1 more") as caught:
        prepared(path)

    assert str(caught.value).count("empty answer") == 20


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"", "no record in"),
        ("a.json", b'[{"text": ', "broken JSON at line 1, column 11"),
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.json", b'{"rows": []}', "must be a list of records"),
        ("a.csv", b"text\ncaf\xe9\n", "not UTF-8: byte 0xe9"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b'{"question": "x"}', "has the keys question, which fit no known format"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    name: str, content: bytes, told: str, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """Empty, broken, of another kind than its name says, or of unknown keys."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(errors.DataError, match=name) as caught:
        prepared(tmp_path / name)

    assert told in str(caught.value)


def test_long_examples_are_cut_and_counted(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """The beginning stays; the end of the answer, and so its end of turn, is lost."""
    path = records("train.jsonl", [PAIR, {"instruction": "1?", "output": "One. " * 30}])

    folder = prepared(path, max_length=40)

    assert json.loads((folder / "data.json").read_text())["train"]["truncated"] == 1
    assert len(Dataset.from_file(str(folder / "train.arrow"))[1]["input_ids"]) == 40
    assert seen(folder, tiny_model)[1].endswith("⟦One. One. One. One. O⟧")


def test_an_example_without_anything_to_train_is_a_bad_record(
    prepared: Callable[..., Path], records: Callable[..., Path]
) -> None:
    """When the question alone fills the length, the record would only burn time."""
    path = records("train.jsonl", [PAIR, {"instruction": "one and two " * 50, "output": "Three."}])

    with pytest.raises(errors.DataError, match="nothing left to train"):
        prepared(path, max_length=64)


def test_the_held_out_share_is_a_function_of_the_seed(
    prepared: Callable[..., Path], records: Callable[..., Path], tiny_model: Path
) -> None:
    """No record is in both splits, none is lost, and the same seed draws the same ones."""
    rows = [{"instruction": f"What is {n} and 0?", "output": f"It is {n}."} for n in range(200)]
    path = records("train.jsonl", rows)

    one = prepared(path, eval_fraction=0.2)
    train, held_out = seen(one, tiny_model), seen(one, tiny_model, "eval")

    assert len(train) + len(held_out) == 200
    assert not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 60


def test_a_share_that_holds_out_nothing_is_refused(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """By the name of the key that is too small."""
    with pytest.raises(errors.DataError, match=r"data\.eval_fraction 0.0001 holds out none of the records"):
        prepared(records("train.jsonl", [PAIR]), eval_fraction=0.0001)


def test_the_same_file_for_training_and_evaluation_is_refused(
    prepared: Callable[..., Path], records: Callable[..., Path]
) -> None:
    """The eval loss would measure memory."""
    one, other = records("train.jsonl", [PAIR]), records("eval.jsonl", [PAIR])

    with pytest.raises(errors.DataError, match=r"eval.jsonl has the same content as .*train.jsonl"):
        prepared(one, evaluation=(other,))


def test_the_digest_is_that_of_the_tokens(tmp_path: Path, tiny_model: Path, records: Callable[..., Path]) -> None:
    """Another machine, another place of the same file, another hash seed: a checkpoint still fits."""
    rows = [PAIR | {"id": 1, "source": "x", "topic": "y", "lang": "en"}]
    paths_ = [records("one.jsonl", rows), records("two.jsonl", rows)]
    program = (
        "import contextlib, sys; from pathlib import Path; from job import config, inputs, paths, prepare;"
        "tree = {'run': {'name': 't', 'url': 'file:///run'}, 'model': {'base': 'file:///b'}, 'data': {'train': ['file:///x']}};"
        "path = Path(sys.argv[2]); made = prepare.dataset(config.check(tree, config.Places('t', {})),"
        "inputs.Base('b', Path(sys.argv[1]), 'd'), [inputs.DataFile(path.as_uri(), path, 'sha')], [], "
        "paths.Cache(Path(sys.argv[3]), 'r'), contextlib.ExitStack());"
        "print(made.digest)"
    )

    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(tiny_model), str(path), str(tmp_path / f"cache{seed}")],
            env={**os.environ, "PYTHONHASHSEED": str(seed)}, cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for seed, path in enumerate(paths_)
    }  # fmt: skip

    assert len(digests) == 1


def test_a_damaged_preparation_is_made_again(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """A cache that lost its manifest is replaced, not stumbled over."""
    path = records("train.jsonl", [PAIR])
    (prepared(path) / "manifest.json").unlink()

    assert manifest.sealed(prepared(path))


def test_preparing_the_same_again_reads_the_result(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """The result is kept under a key of everything it depends on; a changed setting makes another one."""
    path = records("train.jsonl", [PAIR])

    one, other = prepared(path), prepared(path, max_length=100)

    assert prepared(path) == one
    assert one != other


CONTENT = "{{ m['content'] }}"
THOUGHT = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
BARE = (
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} <|im_end|>{% endif %}"
)
TEMPLATES = {
    # Like Qwen3's: an empty thought is written before an answer that has none.
    "thought": (
        TEMPLATE.replace(CONTENT, THOUGHT + CONTENT),
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 3.<|im_end|>⟧\n",
    ),
    # Like Llama-3's: contents are trimmed.
    "trimmed": (TEMPLATE.replace(CONTENT, "{{ m['content'] | trim }}"), "assistant\n⟦It is 3.<|im_end|>⟧\n"),
    # Like Llama-2's: no header before the answer, the end of turn after a blank.
    "bare": ("{% for m in messages %}" + BARE + "{% endfor %}", "[/INST]⟦ It is 3. <|im_end|>⟧"),
    # Like Cohere2's: another mark stands before the one that ends generation.
    "marked": (TEMPLATE.replace(CONTENT, CONTENT + "<|endoftext|>"), "⟦It is 3.<|endoftext|><|im_end|>⟧\n"),
    # Ends nothing at all: the end is added.
    "endless": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", ":⟦ It is 3.<|im_end|>⟧"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_part_is_found_with_any_template(name: str, tiny_model: Path) -> None:
    """The answer, what the template makes the model write before it, and the end of turn."""
    template, expected = TEMPLATES[name]
    words = tokenizer.load(tiny_model)
    words.chat_template = template
    answer = "  It is 3. \n" if name == "trimmed" else "It is 3."
    example = formats.Example(
        messages=({"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": answer})
    )

    (row,) = tokens.Renderer(words, 100, "assistant").rows([example])

    assert isinstance(row, tokens.Row)
    text = tokens.marked(words, row)
    assert text.endswith(expected)
    assert text.count("⟦") == 1


KNOWN = (
    "llama3",
    "cohere",
    "glm4moe",
    "gemma",
    "gemma3",
    "lfm2",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_vl",
)
HEADERS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<|assistant|>",
    "<|user|>",
    "<|START_OF_TURN_TOKEN|>",
)
MARKS = (*HEADERS, "<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>")


@pytest.mark.parametrize("family", KNOWN)
def test_the_trained_part_is_that_of_the_templates_that_trl_marked_by_hand(family: str, tiny_model: Path) -> None:
    """For real families, over several turns; but the line break after the end of turn, which nobody generates."""
    words = tokenizer.load(tiny_model)
    words.add_tokens([AddedToken(mark, special=True) for mark in MARKS])
    path = Path(str(importlib.resources.files("trl"))) / "chat_templates" / f"{family}_training.jinja"
    words.chat_template = path.read_text(encoding="utf-8")
    turns = [("user", "1 and 2?"), ("assistant", "It is 3."), ("user", "And 4?"), ("assistant", "It is 7.")]
    messages = tuple({"role": role, "content": content} for role, content in turns)

    (row,) = tokens.Renderer(words, 4096, "assistant").rows([formats.Example(messages=messages)])

    marked = words.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    theirs = [
        token if on else IGNORED for token, on in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    ]
    assert isinstance(row, tokens.Row)
    assert row.input_ids == marked["input_ids"]
    assert spans(words, row.labels) == spans(words, theirs)


def spans(words: PreTrainedTokenizerBase, labels: list[int]) -> list[str]:
    """The trained texts, without white space around them."""
    groups = itertools.groupby(labels, key=lambda label: label != IGNORED)
    return [words.decode(list(group)).strip() for trained, group in groups if trained]


def test_what_the_template_makes_of_an_answer_is_trained(tiny_model: Path) -> None:
    """A template that rewrites answers, as reasoning models' do, is followed; one that drops them is refused."""
    words = tokenizer.load(tiny_model)
    words.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    example = formats.Example(messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": "It is."}))

    (row,) = tokens.Renderer(words, 100, "assistant").rows([example])

    assert isinstance(row, tokens.Row)
    assert "assistant\n⟦IT IS.<|im_end|>⟧" in tokens.marked(words, row)

    words.chat_template = "{{ messages[0]['content'] }}"
    (row,) = tokens.Renderer(words, 100, "assistant").rows([example])

    assert isinstance(row, formats.BadRecordError)
    assert "writes 0 of the 1 answers" in str(row)
