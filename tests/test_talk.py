"""Models that answer: one question, a file of them, or in a terminal."""

import contextlib
import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from conftest import S3, command, files
from killing import Moment, Stopped
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import config, errors, generate, manifest, paths, pull, storage
from job.chat import Chat
from job.cli import talk
from job.cli.program import Program
from job.model import tokenizer, weights
from job.model.talk import Speaker
from job.prepare import formats, records
from job.prepare.tokens import Renderer, Row

Job = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = Program(lambda *_: None, lambda *_: None, {}, ())
GREEDY = ("--temperature", "0", "--max-tokens", "8", "--repetition-penalty", "1")
ASKED = "What is 1 and 2?"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny Llama that says something else after everything, with a chat template."""
    made = adapters.base(tmp_path / "base", tied=False, vocab_size=420, hidden_size=64)
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, made)
    return made


@pytest.fixture
def two(base: Path, tmp_path: Path) -> dict[str, Path]:
    """Two adapters for it, the second with nothing beside its weights."""
    made = {}
    for name, layer in (("one", "q_proj"), ("two", "down_proj")):
        adapters.adapter(adapters.plain(base), tmp_path / name, target_modules=[layer], r=8)
        for path in (*base.glob("tokenizer*"), *base.glob("*.jinja")) if name == "one" else ():
            shutil.copy(path, tmp_path / name)
        made[name] = tmp_path / name
    return made


def said(base: Path, adapter: Path | None, *turns: str, tokens: int = 8) -> str:
    """The likeliest answer, by transformers and PEFT alone; turns of the user and the model in turns."""
    words = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        network = PeftModel.from_pretrained(network, str(adapter))
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
    asked = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = network.generate(**asked, max_new_tokens=tokens, do_sample=False)
    answer: str = words.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def of(base: Path, tmp_path: Path, named: dict[str, Path] | None = None) -> list[object]:
    """The options for a base, and adapters for it."""
    more = [part for name, path in (named or {}).items() for part in ("--adapter", f"{name}={path}")]
    return ["--base", base, *more, "--cache", tmp_path / "cache", "--quantization", "none"]


def test_one_question_is_answered_as_transformers_would(
    base: Path, two: dict[str, Path], job: Job, tmp_path: Path
) -> None:
    """By the base, and by an adapter on it."""
    alone = job("generate", *of(base, tmp_path), *GREEDY, "--prompt", ASKED)
    adapted = job("generate", *of(base, tmp_path, {"one": two["one"]}), *GREEDY, "--prompt", ASKED)

    assert (alone.stdout, adapted.stdout) == (f"{said(base, None, ASKED)}\n", f"{said(base, two['one'], ASKED)}\n")
    assert alone.stdout != adapted.stdout


def prompts(folder: Path, count: int = 20) -> Path:
    """A file of questions of several lengths, in every form that they may have."""
    rows = []
    for number in range(count):
        text = f"What is {number} and {number}?" * (1 + number % 3)
        forms = [
            {"prompt": text},
            {"messages": [{"role": "user", "content": text}]},
            {"instruction": text, "input": ""},
        ]
        rows.append({"id": number, **forms[number % 3]})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_questions_is_answered_in_its_order(base: Path, job: Job, tmp_path: Path) -> None:
    """Each record stays as it is and gets its answer, which does not depend on who is answered beside it."""
    asked = prompts(tmp_path)

    outcome = job("generate", *of(base, tmp_path), *GREEDY, "--input", asked, "--out", tmp_path / "answers.jsonl")

    assert outcome.returncode == 0, outcome.stderr
    made = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [{**row, "answer": 0, "tokens": 0, "ended": 0} for row in records] == [
        {**row, "answer": 0, "tokens": 0, "ended": 0} for row in made
    ]
    for number in (0, 4, 19):
        assert made[number]["answer"] == said(base, None, f"What is {number} and {number}?" * (1 + number % 3))
    assert {name for name in files(tmp_path) if name.startswith("answers")} == {
        "answers.jsonl", "answers.jsonl.made-of.json",
    }  # fmt: skip
    again = job("generate", *of(base, tmp_path), *GREEDY, "--input", asked, "--out", tmp_path / "answers.jsonl")
    assert (again.returncode, "done already: 20 answers" in again.stderr) == (0, True)


@pytest.mark.slow
def test_a_killed_start_is_gone_on_with_to_the_same_answers(
    base: Path, s3: S3, bucket: str, job: Job, tmp_path: Path
) -> None:
    """Drawn at random, from a seed; what was answered is in the store, and is not asked again."""
    drawn = ("--temperature", "1.5", "--max-tokens", "8", "--batch", "1", "--input", prompts(tmp_path))
    whole = job("generate", *of(base, tmp_path), *drawn, "--out", f"s3://{bucket}/whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    options = [*of(base, tmp_path), *drawn, "--out", f"s3://{bucket}/killed.jsonl"]
    (tmp_path / "killed.yaml").touch()

    stopped = Stopped(
        Moment("job", "job.generate", "Place.keep", call=2), tmp_path / "killed.yaml", told=("generate", *options)
    )
    os.kill(stopped.job, signal.SIGKILL)
    stopped.ended()
    (part,) = s3.keys(bucket, "killed")
    assert re.fullmatch(r"killed\.jsonl\.parts/[0-9a-f]+/000000000\.jsonl", part)
    again = job("generate", *options)

    assert again.returncode == 0, again.stderr
    assert "1 part(s) of 8 answers are there from an earlier start" in again.stderr
    read = [s3.client().get_object(Bucket=bucket, Key=f"{name}.jsonl")["Body"].read() for name in ("whole", "killed")]
    assert read[0] == read[1]
    assert s3.keys(bucket, "killed") == {"killed.jsonl", "killed.jsonl.made-of.json"}


def test_an_answer_is_over_at_a_string(base: Path, job: Job, tmp_path: Path) -> None:
    """Which is not part of it."""
    whole = said(base, None, ASKED)

    outcome = job("generate", *of(base, tmp_path), *GREEDY, "--prompt", ASKED, "--stop", whole[3:5])

    assert outcome.stdout == f"{whole[: whole.find(whole[3:5])]}\n"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"prompt": "a"}', "{"], ":2: broken JSON: "),
        (['{"answr": 3}'], ":1: has none of messages, conversations, instruction, prompt, question, text that asks"),
        (['{"prompt": ""}'], ":1: has none of messages, conversations, instruction, prompt, question, text that asks"),
        (['{"question": 3}'], ":1: instruction is of type int, not text"),
        (['{"prompt": "a", "answer": "b"}'], ":1: has a key answer already"),
        (['{"prompt": "a", "tokens": 1}'], ":1: has a key tokens already"),
        (['{"prompt": "a", "images": ["b.png"]}'], ":1: has images, and only text is answered here"),
        (['{"prompt": "a\\ud800"}'], ":1: cannot be written as JSON"),
        (['{"prompt": "a", "score": NaN}'], ":1: cannot be written as JSON"),
        (['{"instruction": "a", "input": 3}'], ":1: input is of type int, not text"),
        (['{"instruction": "a", "history": ["b"]}'], ":1: history is not a list of pairs of question and answer"),
        (['{"messages": [{"role": "user"}]}'], ":1: turn 1 lacks content or value"),
        (['{"messages": [{"role": "nobody", "content": "a"}]}'], ":1: unknown role 'nobody' in turn 1"),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], ":1: ends with an answer: leave that out"),
        (['{"messages": ["a"]}'], ":1: messages is not a list of turns"),
        (['{"messages": {"role": "user"}}'], ":1: messages is not a list of turns"),
        (["3"], ":1: "),
    ],
)
def test_a_record_that_asks_nothing_is_told_with_its_line(lines: list[str], told: str, tmp_path: Path) -> None:
    """Before anything is loaded."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))

    with pytest.raises(errors.DataError, match=re.escape(f"prompts.jsonl{told}")):
        talk.prompts([(f"prompts.jsonl:{each.place}", each) for each in records.read(path, path.name)])


TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("parts", [False, True], ids=["text", "parts"])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi"},
        {"prompt": "Hi", "input": "which that format has not", "history": [["a", "b"]]},
        {"prompt": [{"role": "user", "content": "Hi"}], "system": "Be brief"},
        {"messages": [{"role": "user", "content": "Hi"}], "system": "Be brief"},
        {"messages": [{"role": "developer", "content": "Be brief"}, {"role": "human", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"},
                           {"from": "human", "value": "And?"}]},
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0},
                      {"role": "function", "content": "3"}], "tools": [TOOL]},
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "function_call", "content": json.dumps(TOOL | {"arguments": {}})},
                      {"role": "observation", "content": "3"}], "tools": json.dumps(TOOL)},
        {"instruction": "Add", "input": "1 2", "history": [["Hi", "Ho"]], "system": "Be brief"},
        {"instruction": "Add", "input": " ", "system": " "},
        {"instruction": "Add", "output": "what is there already"},
        {"text": "Once upon a time"},
    ],
    ids="-".join,
)  # fmt: skip
def test_a_record_is_asked_as_it_is_trained_on(record: dict[str, Any], parts: bool, base: Path) -> None:  # noqa: FBT001 - a parameter
    """The tokens that the model reads are those that stand before the answer in training, in every format."""
    speaker = Speaker(base, config.Model(base=base.as_uri(), quantization="none"), {})
    words = speaker.words
    words.chat_template = (
        TEMPLATE.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}") if parts else TEMPLATE
    )
    speaker._wants_parts = [tokenizer.wants_parts(words)]
    turn = {"role": "assistant", "content": "ANSWER"}
    key = next(key for key in ("messages", "conversations", "prompt", "instruction", "text") if key in record)
    whole = {
        "messages": lambda: {**record, key: [*record[key], turn]},
        "conversations": lambda: {**record, key: [*record[key], {"from": "gpt", "value": "ANSWER"}]},
        "prompt": lambda: {**record, "completion": [turn] if isinstance(record[key], list) else "ANSWER"},
        "instruction": lambda: {**record, "output": "ANSWER"},
        "text": lambda: record,
    }[key]()
    example = formats.convert(whole, formats.recognise(whole), tokenizer.input_heading(words))
    (row,) = Renderer(words, max_length=500, loss_on="last").rows([example])
    assert isinstance(row, Row)
    answer = next(place for place, label in enumerate(row.labels) if label != tokenizer.IGNORED)
    before = row.input_ids[:-1] if key == "text" else row.input_ids[:answer]

    (asked,) = talk.prompts([("here", records.Record(1, record))], tokenizer.input_heading(words))
    ids = speaker.prompt(asked.messages, asked.tools) if asked.messages else speaker.text(asked.text)

    assert words.decode(ids) == words.decode(before)
    assert ids == before


def test_tools_that_the_template_does_not_write_are_an_error(base: Path) -> None:
    """In training they are as well."""
    speaker = Speaker(base, config.Model(base=base.as_uri(), quantization="none"), {})
    speaker.words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    with pytest.raises(ValueError, match="does not write the tool 'add': it has no place for tools"):
        speaker.prompt([{"role": "user", "content": "Hi"}], [{"type": "function", "function": TOOL}])


@pytest.fixture
def answers(tmp_path: Path) -> Callable[[str], generate.Place]:
    """The place of answers that are made of what is told."""
    return functools.partial(generate.Place, storage.connect((tmp_path / "out").as_uri()), "a.jsonl")


def test_parts_that_are_not_of_these_answers_are_not_believed(
    answers: Callable[[str], generate.Place], tmp_path: Path
) -> None:
    """A part that vanished is missed; parts of others stay theirs, who may be at it."""
    answers("others").keep(0, "old\n")
    place = answers("these")
    assert place.there() == set()
    place.keep(0, "one\n")

    with pytest.raises(errors.StoreError, match="has vanished, and 1 of 2 parts"):
        place.finish([0, 8])

    assert not (tmp_path / "out" / "a.jsonl").exists()
    place.keep(8, "two\n")
    place.finish([0, 8])
    assert (tmp_path / "out" / "a.jsonl").read_text() == "one\ntwo\n"
    assert len(list(tmp_path.glob("out/a.jsonl.parts/**/*.jsonl"))) == 1
    assert answers("these").done
    (tmp_path / "out" / "a.jsonl").unlink()
    assert not answers("these").done


@pytest.mark.parametrize("same", [True, False], ids=["the same", "another"])
def test_of_two_starts_at_one_place_the_faster_wins(
    same: bool, answers: Callable[[str], generate.Place], tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """The slower one finds its own answers, or is told; it never replaces what is there."""
    slow, fast = answers("these"), answers("these" if same else "those")
    slow.keep(0, "slow\n")
    fast.keep(0, "fast\n")
    fast.finish([0])

    if same:
        slow.finish([0])
    else:
        with pytest.raises(errors.ConfigError, match="is of other prompts, another model or other settings"):
            slow.finish([0])

    assert (tmp_path / "out" / "a.jsonl").read_text() == "fast\n"
    assert answers("these" if same else "those").done


@pytest.mark.parametrize("spoil", ["cut", "no mark", "broken mark"])
def test_answers_that_were_changed_are_neither_believed_nor_overwritten(
    spoil: str, answers: Callable[[str], generate.Place], tmp_path: Path
) -> None:
    """Whose they are then, nobody knows."""
    place, path = answers("these"), tmp_path / "out" / "a.jsonl"
    place.keep(0, "one\ntwo\n")
    place.finish([0])
    if spoil == "cut":
        path.write_text("one\n")
    elif spoil == "no mark":
        path.with_name("a.jsonl.made-of.json").unlink()
    else:
        path.with_name("a.jsonl.made-of.json").write_text("{")
    before = path.read_text()

    with pytest.raises(errors.ConfigError, match="is there, and not as it was written here, if it was: remove it"):
        answers("these")

    assert path.read_text() == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--max-tokens", "5000"), "are more than the 2048 that the model was made for: shorten it"),
        pytest.param(
            ("--temperature", "-1"), "--temperature -1.0: input should be greater than or equal", marks=pytest.mark.slow
        ),
        pytest.param(
            ("--temperature", "1e-40"), "must be 0, which is always the likeliest token, or", marks=pytest.mark.slow
        ),
        pytest.param(("--out", "."), "--out . is a folder: give the name of a file in it too", marks=pytest.mark.slow),
        pytest.param(("--prompt", "b"), "give either --prompt, or --input and --out", marks=pytest.mark.slow),
        pytest.param(("--adapter", "nowhere"), "has no adapter_config.json and adapter_", marks=pytest.mark.slow),
        pytest.param(
            ("--merged",), "give a run (its config or its URL), perhaps with --merged", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_answered_is_said_before_the_model_is_loaded(
    more: tuple[str, ...], told: str, base: Path, job: Job, tmp_path: Path
) -> None:
    """And nothing is written."""
    (base / "model.safetensors").write_bytes(b"to load this fails")
    asked = prompts(tmp_path, 1)

    outcome = job("generate", *of(base, tmp_path), "--input", asked, "--out", tmp_path / "out.jsonl", *more)

    assert outcome.returncode == 64, outcome.stderr
    assert told in outcome.stderr
    assert not [name for name in files(tmp_path) if name.startswith("out")]


@pytest.mark.slow
def test_other_answers_are_not_overwritten(base: Path, job: Job, tmp_path: Path) -> None:
    """Neither those of other settings, nor a file that happens to lie there."""
    given = [*of(base, tmp_path), *GREEDY, "--input", prompts(tmp_path, 2), "--out"]
    (tmp_path / "mine.jsonl").write_text("mine")
    assert job("generate", *given, tmp_path / "ours.jsonl").returncode == 0

    mine = job("generate", *given, tmp_path / "mine.jsonl")
    other = job("generate", *given, tmp_path / "ours.jsonl", "--seed", "1")

    assert (mine.returncode, other.returncode) == (64, 64)
    assert "is of other prompts, another model or other settings: remove it" in other.stderr
    assert "is there, and not as it was written here" in mine.stderr
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_adapters_are_switched_in_a_conversation(base: Path, two: dict[str, Path], tmp_path: Path) -> None:
    """Each answers by itself, to what was said before; a command that there is not ends nothing."""
    lines = [
        ASKED,
        "/adapter two",
        "/reset",
        ASKED,
        "/base",
        "/reset",
        ASKED,
        "And?",
        "/adapter three",
        "/what",
        "/quit",
        "no",
    ]

    outcome = subprocess.run(
        command("chat", *of(base, tmp_path, two), *GREEDY),
        input="\n".join(lines), capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert outcome.returncode == 0, outcome.stderr
    first = said(base, None, ASKED)
    expected = [
        "loading the model", "adapter one; /help tells the commands", said(base, two["one"], ASKED), "(adapter two)",
        "(forgotten)", said(base, two["two"], ASKED), "(the base model)", "(forgotten)", first,
        said(base, None, ASKED, first, "And?"), "there is no adapter called three: there is one, two",
        "there is no command /what",
    ]  # fmt: skip
    assert outcome.stdout.startswith("\n".join(expected))


def trained_on(adapter: Path, base: Path, cache: Path) -> None:
    """Tell beside the `adapter`, as a run does, which base it is for."""
    digest = pull.base(base.as_uri(), paths.Cache.of(cache, "talk")).digest
    (adapter / "training.json").write_text(json.dumps({"inputs": {"base": digest}}))
    manifest.seal(adapter)


def test_an_adapter_does_not_speak_on_another_base(base: Path, two: dict[str, Path], tmp_path: Path) -> None:
    """It would say something, and nobody would know why that is nonsense."""
    trained_on(two["one"], base, tmp_path / "cache")
    given = {"run": None, "merged": False, "base": str(base), "adapters": (f"one={two['one']}",),
             "quantization": "none", "cache": tmp_path / "cache"}  # fmt: skip
    with ExitStack() as after:
        speaker, _ = talk._speaker(PROGRAM, given, after)
    assert speaker.adapters == ["one"]
    adapters.base(base, tied=True, vocab_size=420, hidden_size=64)

    with (
        pytest.raises(errors.ModelError, match="the adapter was trained on"),
        ExitStack() as after,
    ):
        talk._speaker(PROGRAM, given, after)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"base": "copy"}, ["tuned"]),
        ({"base": "copy", "adapters": ("v1.0=run/adapter", "./run/adapter")}, ["v1.0", "adapter2"]),
        ({"merged": True}, []),
        ({}, ["tuned"]),
    ],
    ids=["another place of the base", "adapters", "merged", "the run"],
)
def test_what_speaks_is_what_was_asked_for(
    given: dict[str, Any], names: list[str], base: Path, two: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., Path],
) -> None:  # fmt: skip
    """A run speaks with its adapter, also where its base lies elsewhere now."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "copy")
    described = tiny_run(model={"base": str(base)})
    shutil.copytree(two["one"], "run/adapter")
    trained_on(Path("run/adapter").absolute(), base, tmp_path / "cache")
    shutil.copytree(base, "run/merged")
    usual = {"run": str(described), "merged": False, "base": None, "adapters": (), "quantization": None}

    with ExitStack() as after:
        speaker, _ = talk._speaker(PROGRAM, {**usual, "cache": tmp_path / "cache", **given}, after)

    assert speaker.adapters == names


def test_a_question_that_is_too_long_is_said_so_and_nothing_is_forgotten(base: Path) -> None:
    """It alone is not answered."""
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**told, "max_position_embeddings": 160}))
    speaker = Speaker(base, config.Model(base=base.as_uri(), quantization="none"), {})
    lines = iter(["Hi", "And?", "why " * 200, "Why?"])
    out = io.StringIO()

    def ask(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat = Chat(speaker, config.Sampling(temperature=0, max_tokens=2), out)
    chat.run(ask)

    assert "(no answer: ValueError: that is too long: it has 816 tokens, and the model reads 160)" in out.getvalue()
    assert [each["content"] for each in chat._said if each["role"] == "user"] == ["Hi", "And?", "Why?"]
    assert "forgotten" not in out.getvalue()


def test_answers_that_may_be_longer_than_the_context_leave_room_for_what_was_said(base: Path) -> None:
    """They can count on a quarter of it; the oldest turns are forgotten when more is said."""
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**told, "max_position_embeddings": 200}))
    speaker = Speaker(base, config.Model(base=base.as_uri(), quantization="none"), {})
    chat = Chat(speaker, config.Sampling(max_tokens=500), io.StringIO())
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"turn {number}"} for number in range(11)]

    chat._said = turns[:3]
    assert chat._fitting() == speaker.prompt(turns[:3])
    chat._said = list(turns)
    fitting = chat._fitting()

    assert len(fitting) <= 150
    assert len(chat._said) > 3
    assert chat._said[-1] == turns[-1]
    assert fitting == speaker.prompt(chat._said)


def test_a_byte_that_is_no_text_ends_no_conversation(base: Path, tmp_path: Path) -> None:
    """What is piped in may be anything."""
    talking = command("chat", *of(base, tmp_path), *GREEDY)
    outcome = subprocess.run(
        list(map(str, talking)), input=b"caf\xe9\n/reset\n", capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip

    assert outcome.returncode == 0, outcome.stderr
    assert b"(forgotten)" in outcome.stdout
    assert b"no answer" not in outcome.stdout


def test_settings_that_lie_beside_the_base_do_not_change_how_answers_are_drawn(base: Path) -> None:
    """They may ask for beams, lists, other ends and hurry; what is asked for here is all that counts, but the end."""
    plain = config.Model(base=base.as_uri(), quantization="none")
    how = config.Sampling(temperature=0, max_tokens=8)
    asked = [{"role": "user", "content": ASKED}]
    speaker = Speaker(base, plain, {})
    expected = speaker.answers([speaker.prompt(asked)], how, 1)
    told = {"num_beams": 4, "return_dict_in_generate": True, "num_return_sequences": 2, "stop_strings": ["a"],
            "max_time": 1e-9, "prompt_lookup_num_tokens": 3, "min_new_tokens": 30}  # fmt: skip
    (base / "generation_config.json").write_text(json.dumps(told))

    other = Speaker(base, plain, {})

    assert other.answers([other.prompt(asked)], how, 1) == expected
    assert "".join(other.stream(other.prompt(asked), how, 1, threading.Event())) == expected[0].text


def test_an_answer_is_over_at_a_string_with_a_special_token(base: Path) -> None:
    """Of which the text shows nothing."""
    speaker = Speaker(base, config.Model(base=base.as_uri(), quantization="none"), {})
    special = next(token for token in speaker.words.all_special_tokens if token != speaker.words.eos_token)
    ids = speaker.words(f"Hello{special}user and more", add_special_tokens=False)["input_ids"]
    speaker.load()

    answer = speaker._answer(ids, config.Sampling(stop=(f"{special}user",)))

    assert (answer.text, answer.ended) == ("Hello", True)


def test_short_questions_are_filled_up_with_a_token_that_the_model_has(tiny_model: Path, tmp_path: Path) -> None:
    """Where the tokenizer's own for that is behind the last row of the embedding, as of some Llamas."""
    words = AutoTokenizer.from_pretrained(tiny_model)
    rows = len(words)
    base = adapters.base(tmp_path / "base", tied=False, vocab_size=rows, hidden_size=64)
    words.save_pretrained(base)
    padded = Path(shutil.copytree(base, tmp_path / "padded"))
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(padded)
    settings = config.Model(base=base.as_uri(), quantization="none")
    how = config.Sampling(temperature=0, max_tokens=8)
    told = [[{"role": "user", "content": text}] for text in ("Why?", "What is 1 and 2 and 3?")]
    answers = []
    for folder in (base, padded):
        speaker = Speaker(folder, settings, {})
        answers.append([each.text for each in speaker.answers([speaker.prompt(each) for each in told], how, 1)])

    assert words.pad_token_id == rows
    assert answers[0] == answers[1]
    with pytest.raises(errors.ModelError, match=rf"token {rows} \(<pad>\), and the model has embeddings for {rows}: "):
        speaker.answers([speaker.text("a<pad>")], how, 1)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_of_odd_widths_answers(quantization: str, tmp_path: Path) -> None:
    """Kernels for some processors want tiles."""
    base = adapters.base(tmp_path / "base", tied=False, hidden_size=48)

    network = weights.for_answering(base, config.Model(base=base.as_uri(), quantization=quantization))

    assert torch.isfinite(adapters.logits(network)).all()


@pytest.mark.slow
def test_the_result_of_a_run_is_talked_to_by_its_url(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """By its adapter over the base as it was trained, or by its merged model."""
    described = tiny_run(model={"compute_dtype": "float32"}, merge={"dtype": "float32"})
    assert job("run", described).returncode == 0
    url, more = (tmp_path / "run").as_uri(), (*GREEDY, "--prompt", ASKED, "--cache", tmp_path / "cache")

    merged = job("generate", url, "--merged", *more)
    adapted = job("generate", described, "--quantization", "none", *more)
    as_trained = job("generate", url, *more)

    expected = said(tmp_path / "run" / "merged", None, ASKED)
    assert (merged.stdout, adapted.stdout, as_trained.returncode) == (f"{expected}\n", f"{expected}\n", 0)


def test_ctrl_c_stops_an_answer_and_not_the_program(base: Path, tmp_path: Path) -> None:
    """In a real terminal; at the prompt it says how to leave."""
    talking = command("chat", *of(base, tmp_path), "--temperature", "0", "--max-tokens", "1900")
    process, terminal = pty.fork()
    if not process:
        os.execv(talking[0], [str(word) for word in talking])  # noqa: S606 - ours
    shown = ""

    def until(pattern: str, pressed: bytes = b"") -> None:
        """Read until that is shown; press what is to be `pressed` every now and then, as its user would."""
        nonlocal shown
        ends, pause = time.monotonic() + 60, 5 if pressed else 60
        os.write(terminal, pressed)
        while not re.search(pattern, shown):
            assert time.monotonic() < ends, shown
            if select.select([terminal], [], [], pause)[0]:
                shown += os.read(terminal, 1000).decode(errors="replace")
            else:  # GNU readline does not hear a signal of the moment before it listens
                os.write(terminal, pressed)

    until("/help tells the commands")
    os.write(terminal, b"Talk!\n")
    until(r"Talk!\r\n.{20}")
    until(r"\(stopped\)", b"\x03")
    until(r"\(/quit leaves\)", b"\x03")
    for _ in range(5):  # pressed in a hurry
        os.write(terminal, b"\x03\x03")
    until(r"\(forgotten\)", b"/reset\n")
    os.write(terminal, b"/quit\n")

    with contextlib.suppress(OSError):  # a terminal that nobody has any more
        while os.read(terminal, 1000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
