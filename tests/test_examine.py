"""What the result is like: opened by plain transformers, compared with what was trained, and asked questions."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapters
import psutil
import pytest
import torch
import yaml
from conftest import command, files
from safetensors.torch import load_file, save_file

from job import card, cluster, config, errors, examine, inputs, merge, report
from job.examine import devices, examples, judge, plain
from job.examine.runner import Outcome, Program
from job.model import load_size

Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path) -> examine.Models:
    """A base, an adapter with nothing beside its weights that makes a difference, and what they make together."""
    base = adapters.base(tmp_path / "base", tied=False, vocab_size=420)
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, base)
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8}
    adapters.adapter(adapters.plain(base), tmp_path / "adapter", **targets)
    given = inputs.Base(base.as_uri(), base, "its digest")
    made = merge.folder(
        given, tmp_path / "adapter", config.Model(base=base.as_uri()), config.Merge(), tmp_path / "m" / "m"
    )
    return examine.Models(base, tmp_path / "adapter", made, lambda: None)


class InThisProcess(Program):
    """The program without a process of its own, whose imports take longer than what it does here."""

    def __init__(self) -> None:
        super().__init__({})

    def ask(
        self,
        models: Sequence[Mapping[str, Any]],
        examples: Sequence[Mapping[str, Any]],
        scratch: Path,
        ends: float,
    ) -> Outcome:
        del scratch  # for the files that go between two processes
        plain._load_tokenizer.cache_clear()
        questions, texts = json.loads(json.dumps([models, examples]))  # as it would receive them
        return Outcome({each["name"]: plain.examine(each, texts, ends) for each in questions})


def looked(
    models: examine.Models, scratch: Path, minutes: float = 5, figures: Path | None = None, quantization: str = "none",
    program: Program | None = None, **more: object,
) -> dict[str, object]:  # fmt: skip
    """What is seen of the models with the examples in `figures`, if there are any."""
    model = {"base": models.base.as_uri(), "quantization": quantization}
    order = config.Merging.model_validate(
        {"run": {"name": "m", "url": "file:///out"}, "model": model, "adapter": {"url": models.adapter.as_uri()},
         "examine": {"minutes": minutes}, **more}
    )  # fmt: skip
    return examine.results(models, order, figures, scratch, (), program or InThisProcess())


@pytest.fixture
def program() -> Iterator[Program]:
    """The program as a run starts it."""
    with examine.started(os.environ, (), wanted=True) as started:
        yield started


def test_a_run_tells_what_its_result_is_like(
    tiny_model: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Losses of each way to use it, answers before and after, and cards that pass the base's licence on."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [secret]\n---\n# The base\n")
    described = tiny_run(model={"base": str(base)}, examine={"minutes": 5, "prompts": 2, "tokens": 8})

    outcome = job("run", described)

    assert outcome.returncode == 0, outcome.stderr
    assert "transformers alone opens the merged model (LlamaForCausalLM): its logits are within" in outcome.stderr
    seen = json.loads((tmp_path / "run" / "report" / "seen.json").read_text())
    facts = json.loads((tmp_path / "run" / "adapter" / "training.json").read_text())
    assert seen["loss"].keys() == {"base", "trained", "adapted", "merged", "other"}
    assert abs(seen["loss"]["trained"] - facts["loss_after"]) < 0.01
    assert abs(seen["loss"]["base"] - facts["loss_before"]) < 0.01
    assert seen["off"] < 0.02 < seen["effect"]
    assert seen["from_trained"]["other"] < seen["from_trained"]["merged"]  # the dequantized base is what it saw
    written = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "- the base as it was trained on, with the adapter: on the CPU in float32" in written
    assert not any("cut" in each for each in seen["answers"])
    assert "| the merged model: into the original base |" in written
    assert "Nearer to what was trained is the merge into the dequantized base" in written
    assert written.count("**Tuned**") == len(seen["answers"]) == 2
    for place, library in (("adapter", "peft"), ("merged", "transformers")):
        card = (tmp_path / "run" / place / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        assert (head["license"], head["library_name"], "datasets" in head) == ("apache-2.0", library, False)
        assert facts["inputs"]["base"] in card
        assert facts["inputs"]["data"] in card
    assert not [name for name in files(tmp_path / "cache" / "runs") if not name.endswith(".use")]


def test_an_answer_that_the_time_has_cut_says_so(said: Callable[[], str], tmp_path: Path) -> None:
    """In the log, in seen.json and in the report; there is nothing to say of one that ended."""
    ended, cut = {"text": "yes", "tokens": 1, "cut": False}, {"text": "well then", "tokens": 2, "cut": True}
    found = {
        "merged": {"name": "merged", "answers": [ended, cut]},
        "adapted": {"name": "adapted", "answers_before": [ended, ended]},
    }
    prompts = [{"prompt": "One?", "answer": "1"}, {"prompt": "Two?", "answer": "2"}]

    told = judge.summarize(found, "eval", prompts, tmp_path, judge.Standard())

    assert [each.get("cut") for each in told["answers"]] == [None, {"tuned": 2}]
    assert "1 of 4 answers are shorter than examine.tokens, because the time was over" in said()
    shown = report._answers(told["answers"])
    assert shown.count("(cut after 2 tokens: the time was over)") == shown.count("cut after") == 1
    assert "**Tuned** (cut after 2 tokens" in shown


@pytest.mark.slow
def test_a_run_that_merges_nothing_answers_too(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """By the adapter over its base; once more started, it looks at nothing again."""
    described = tiny_run(merge={"enabled": False}, examine={"minutes": 5, "prompts": 1, "tokens": 4})

    assert job("run", described).returncode == 0
    again = job("run", described)

    assert (again.returncode, "transformers" in again.stderr) == (0, False)
    seen = json.loads((tmp_path / "run" / "report" / "seen.json").read_text())
    assert seen["loss"].keys() == {"base", "trained", "adapted"}
    assert len(seen["answers"]) == 1


def test_the_merged_model_is_held_against_the_base_with_the_adapter(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], program: Program
) -> None:
    """Without examples of its own, on some text."""
    seen = looked(models, tmp_path / "scratch", program=program)

    assert seen["class"] == "LlamaForCausalLM"
    assert 0 < float(str(seen["off"])) < 0.02 < float(str(seen["effect"]))
    assert "which differ from the base's by" in said()
    assert not (tmp_path / "scratch").exists()


def test_a_merge_to_compare_with_that_has_no_room_is_said(
    models: examine.Models, tmp_path: Path, said: Callable[[], str]
) -> None:
    """In the report and the card, where its loss would be."""
    (tmp_path / "figures").mkdir()
    ids = list(range(3, 30))
    held = {"split": "held-out text", "examples": [{"ids": ids, "labels": ids, "asked": 0}]}
    (tmp_path / "figures" / "held-out.json").write_text(json.dumps(held))

    seen = looked(models, tmp_path / "scratch", figures=tmp_path / "figures", quantization="nf4")

    assert seen["left"]["other"] == "there is no room for it on the disk"
    assert "the other merge, for comparison: not verified: there is no room for it on the disk" in said()


def test_the_time_for_the_other_merge_is_not_that_for_verification(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes, both merges are compared when the first models left time for it."""
    (tmp_path / "figures").mkdir()
    ids = list(range(3, 30))
    held = {"split": "held-out text", "examples": [{"ids": ids, "labels": ids, "asked": 0}]}
    (tmp_path / "figures" / "held-out.json").write_text(json.dumps(held))
    adapters.adapter(adapters.plain(tiny_model), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    base = inputs.Base(tiny_model.as_uri(), tiny_model, "its digest")
    model = config.Model(base=tiny_model.as_uri())
    merged = merge.folder(base, tmp_path / "adapter", model, config.Merge(), tmp_path / "m" / "m")
    real, skipped = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + skipped[0])

    def merge_for_an_hour() -> Path:
        skipped[0] += 3600
        return Path(shutil.copytree(merged, tmp_path / "other"))

    models = examine.Models(tiny_model, tmp_path / "adapter", merged, merge_for_an_hour)
    seen = looked(models, tmp_path / "scratch", figures=tmp_path / "figures", quantization="nf4")

    assert isinstance(seen["loss"], dict)
    assert seen["loss"]["other"] == seen["loss"]["merged"]
    assert not seen["left"]
    assert not (tmp_path / "other").exists()


def damaged(models: examine.Models, how: Callable[[Path], object]) -> examine.Models:
    """The same with a merged model to which something was done."""
    assert models.merged
    copy = Path(shutil.copytree(models.merged, models.merged.with_name("damaged")))
    how(copy)
    return examine.Models(models.base, models.adapter, copy, models.other)


def without(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")
    held.pop(name)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def other_words(folder: Path) -> None:
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["merges"] = words["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            lambda folder: shutil.copy(folder.parents[1] / "base" / "model.safetensors", folder),
            "does not compute what the base with the adapter does: in float32 its logits are off by",
        ),
        (
            lambda folder: without(folder, "model.norm.weight"),
            "cannot be opened by plain transformers: ValueError: it lacks 1 weights, such as model.norm.weight",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            "cannot be opened by plain transformers: ValueError",
        ),
        (other_words, "the merged model's tokenizer splits text into other tokens than the adapter's"),
    ],
    ids=["the base", "a weight lacks", "no config", "tokenizer"],
)
def test_a_merged_model_that_is_not_what_was_trained_is_an_error(
    how: Callable[[Path], object], told: str, models: examine.Models, tmp_path: Path
) -> None:
    """Whatever a merge has done wrong: this is the last moment before it is published."""
    with pytest.raises(errors.ModelError, match=told):
        looked(damaged(models, how), tmp_path / "scratch")


def write_logits(
    folder: Path,
    merged: torch.Tensor,
    adapted: torch.Tensor,
    before: torch.Tensor | None = None,
    name: str = "adapted",
) -> dict[str, dict[str, Any]]:
    """Write what two models add to the logits `before`, and return what the program would answer."""
    if before is None:
        before = torch.randn(64, 200, generator=torch.manual_seed(0))
    save_file({"logits": before + merged}, folder / "merged.safetensors")
    save_file({"logits": before + adapted, "before": before}, folder / f"{name}.safetensors")
    words = {"tokens": 9, "ids": [], "texts": [], "chat": ""}
    opened = {"tokenizer": words, "rows": 9, "class": "Llama", "losses": [[1.0, 1]], "positions": [64]}
    return {
        "merged": {**opened, "name": "merged"},
        name: {**opened, "name": name, "losses_before": [[2.0, 1]]},
    }


def draw_logits(effect: float, share: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the merged model and the adapted one add to the base's logits.

    The adapter's `effect`, of which the merged model has a `share`, and noise of its own.
    """
    way, other = (torch.randn(64, 200, generator=torch.manual_seed(seed)) for seed in (1, 2))
    return way * effect * share + other * noise, way * effect


def judged(folder: Path, merged: torch.Tensor, adapted: torch.Tensor, numbers: str, name: str = "adapted") -> object:
    """Return how far off a merged model is judged to be; see `write_logits`."""
    found = write_logits(folder, merged, adapted, name=name)
    return judge.check(found, folder, judge.Standard(name, numbers))["off"]


@pytest.mark.parametrize("name", ["adapted", "trained"])
@pytest.mark.parametrize(
    ("figures", "numbers", "good"),
    [
        ((0.04, 1.0, 0.015), "float32", True),
        ((0.04, 0.0, 0.0), "float32", False),
        ((0.04, 2.0, 0.0), "float32", False),
        ((0.45, 0.9, 0.17), "float32", False),
        ((0.23, 1.0, 0.06), "bfloat16", True),
        ((0.23, 0.0, 0.0), "bfloat16", False),
        ((0.004, 0.3, 0.003), "float32", True),
        ((0.37, 0.97, 0.24), "int8", True),
        ((0.37, 0.0, 0.24), "int8", False),
        ((0.37, 1.0, float("nan")), "float32", False),
    ],
    ids=["good", "the base", "twice", "one layer lacks", "bfloat16", "the base in bfloat16", "faint", "int8",
         "the base in int8", "nan"],
)  # fmt: skip
def test_a_merged_model_does_what_the_adapter_does(
    figures: tuple[float, float, float], numbers: str, good: bool, name: str, tmp_path: Path,  # noqa: FBT001 - a parameter
    said: Callable[[], str],
) -> None:  # fmt: skip
    """What it makes, how much of that is there, and noise: it is not only little that is wrong, but nothing lacks."""
    effect, has, noise = figures
    merged, adapted = draw_logits(*figures)

    if good:
        assert judged(tmp_path, merged, adapted, numbers, name) == pytest.approx(
            math.hypot(effect * (1 - has), noise), rel=0.1
        )
        assert ("hides how much of so small a change is there" in said()) == (has < 0.5)
    else:
        with pytest.raises(errors.ModelError, match="does not compute what the base with the adapter does"):
            judged(tmp_path, merged, adapted, numbers, name)


@pytest.mark.parametrize(
    ("figures", "numbers", "certain"),
    [
        ((0.3, 1.0, 0.05), "bfloat16", True),
        ((0.3, 1.0, 0.2), "bfloat16", False),
        ((0.3, 0.0, 0.0), "bfloat16", False),
        ((0.05, 1.0, 0.01), "bfloat16", False),
        ((0.05, 0.0, 0.0), "float32", True),
        ((0.05, 0.0, 0.0), "int8", True),
    ],
    ids=["clear", "far off", "the base", "weak", "float32", "int8"],
)
def test_what_bfloat16_cannot_tell_is_compared_in_float32(
    figures: tuple[float, float, float], numbers: str, certain: bool, tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """For a weak adapter, a large difference, and before a refusal; other formats are compared once."""
    found = write_logits(tmp_path, *draw_logits(*figures))

    assert judge.is_certain(found, tmp_path, judge.Standard(numbers=numbers)) is certain


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that computes in bfloat16 at first, as GPUs do that have no room for float32."""
    usual = devices.find_placements
    monkeypatch.setattr(devices, "find_placements", lambda *args, **kwargs: usual(*args, **kwargs)[::-1])


def weaken(models: examine.Models, factor: float) -> examine.Models:
    """Return the models with an adapter whose effect is so many times as large, merged anew."""
    file = models.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: each * factor if "lora_B" in name else each for name, each in tensors.items()}, file)
    base = inputs.Base(models.base.as_uri(), models.base, "its digest")
    merged = merge.folder(
        base, models.adapter, config.Model(base=base.url), config.Merge(), models.base.parent / "weak" / "m"
    )
    return examine.Models(models.base, models.adapter, merged, models.other)


@pytest.mark.usefixtures("in_bfloat16")
def test_a_weak_adapter_that_was_not_merged_is_found_in_float32(
    models: examine.Models, tmp_path: Path, said: Callable[[], str]
) -> None:
    """In bfloat16 it looks like rounding; the good merge passes, with the figures of float32."""
    weak = weaken(models, 0.15)
    assert weak.merged
    base = weak.base / "model.safetensors"

    seen = looked(weak, tmp_path / "good")

    assert seen["dtype"] == "float32"
    assert float(str(seen["effect"])) < 0.1
    assert seen["on_devices"] == dict.fromkeys(("merged", "adapted"), "the CPU in bfloat16")
    assert "bfloat16 is too coarse to compare the merged model with" in said()
    with pytest.raises(errors.ModelError, match=r"in float32 its logits are off by .* it has 0%"):
        looked(damaged(weak, lambda folder: shutil.copy(base, folder)), tmp_path / "bad")


@pytest.mark.usefixtures("in_bfloat16")
def test_a_weak_adapter_is_no_error_where_float32_does_not_fit(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doubt is told, with what would remove it."""
    monkeypatch.setattr(devices, "_FLOAT32_SHARE", 0)

    seen = looked(weaken(models, 0.15), tmp_path / "scratch")

    assert seen["dtype"] == "bfloat16"
    assert "which rounding in bfloat16 may hide or feign; this machine has no memory to compare in float32" in said()


@pytest.mark.usefixtures("in_bfloat16")
def test_why_float32_did_not_compare_is_told(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both models fitted by the estimate and a model could not be loaded after all."""
    usual = plain.load

    def load(model: dict[str, Any]) -> object:
        if model["dtype"] == "float32":
            raise MemoryError
        return usual(model)

    monkeypatch.setattr(plain, "load", load)

    seen = looked(weaken(models, 0.15), tmp_path / "scratch")

    assert seen["dtype"] == "bfloat16"
    assert "the comparison in float32 failed (the merged model: memory: MemoryError" in said()


def test_models_that_read_different_numbers_of_examples_are_compared_on_the_common_ones(tmp_path: Path) -> None:
    """Also one that read fewer without its adapter: no figure is of examples that another one lacks."""
    generator = torch.manual_seed(0)
    logits, before = (torch.randn(64, 200, generator=generator) for _ in range(2))
    found = write_logits(tmp_path, logits, logits, before)
    adapted = load_file(tmp_path / "adapted.safetensors")
    adapted["before"] = adapted["before"][:32].clone()
    save_file(adapted, tmp_path / "adapted.safetensors")
    merged = before + logits
    merged[32:] = 0  # wrong where nothing can be said of the adapter's effect
    save_file({"logits": merged}, tmp_path / "merged.safetensors")
    for each in found.values():
        each |= {"losses": [[1.0, 2], [9.0, 3]], "positions": [32, 32]}
    found["adapted"]["losses_before"] = [[4.0, 2]]

    told = judge.summarize(found, "held-out text", [], tmp_path, judge.Standard())

    assert told["loss"] == {"merged": 0.5, "adapted": 0.5, "base": 2.0}
    assert told["read"] == 1
    assert judge.check(found, tmp_path, judge.Standard())["off"] == 0


@pytest.mark.parametrize("fault", [float("nan"), 3.0], ids=["nan", "wrong"])
@pytest.mark.usefixtures("in_bfloat16")
def test_a_fault_in_a_late_example_is_not_hidden_by_the_comparison_in_float32(
    fault: float, models: examine.Models, tmp_path: Path
) -> None:
    """The examples that are compared again are those in which both models differ most."""
    texts = [[3 + number * 20 + place for place in range(20)] for number in range(4)]
    held = {"split": "held-out text", "examples": [{"ids": ids, "labels": ids, "asked": 0} for ids in texts]}
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "held-out.json").write_text(json.dumps(held))

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][texts[3]] += fault  # tokens of the last example alone
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert "off" in looked(models, tmp_path / "good", figures=tmp_path / "figures")
    with pytest.raises(errors.ModelError, match="does not compute what the base with the adapter does"):
        looked(damaged(models, damage), tmp_path / "bad", figures=tmp_path / "figures")


def test_an_example_is_cut_behind_the_positions_that_are_compared() -> None:
    """No later token changes their logits; one with images stays, for its tokens stand for them."""
    ids = list(range(10, 20))
    example = {"ids": ids, "labels": [plain.IGNORED] * 4 + ids[4:], "seen": None}

    assert examples.shorten(example, 3)["ids"] == ids[:7]
    assert examples.shorten(example, 3)["labels"] == example["labels"][:7]
    assert examples.shorten(example, 6) == example
    assert examples.shorten(example | {"seen": "images"}, 3)["ids"] == ids


def test_a_model_whose_size_cannot_be_counted_is_left_out(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights were checked; what is odd about its config.json does not fail the run."""

    def measure(*_: object) -> None:
        raise AttributeError("'OddConfig' object has no attribute 'hidden_size'")

    monkeypatch.setattr(load_size, "measure", measure)

    seen = looked(models, tmp_path / "scratch")

    reason = "the memory that it needs cannot be counted (AttributeError: 'OddConfig' object has no attribute"
    assert isinstance(seen["left"], dict)
    assert str(seen["left"]["merged"]).startswith(reason)
    assert reason in said()
    assert "not enough memory" not in said()


def test_a_merge_into_what_was_quantized_is_held_against_that(tiny_model: Path, tmp_path: Path) -> None:
    """It is as far from the original base with the adapter as quantization is, and that is no fault."""
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8}
    adapters.adapter(adapters.plain(tiny_model), tmp_path / "adapter", **targets)
    given = inputs.Base(tiny_model.as_uri(), tiny_model, "its digest")
    model = config.Model(base=tiny_model.as_uri(), compute_dtype="float32")
    made = merge.folder(given, tmp_path / "adapter", model, config.Merge(base="dequantized"), tmp_path / "m" / "m")

    seen = looked(
        examine.Models(tiny_model, tmp_path / "adapter", made, lambda: None), tmp_path / "scratch",
        quantization="nf4", merge={"base": "dequantized"},
    )  # fmt: skip

    assert seen["class"] == "LlamaForCausalLM"
    assert float(str(seen["off"])) < 0.05 < float(str(seen["effect"]))


def test_what_does_not_fit_into_memory_is_said(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no error: the sums were checked without a model in memory."""
    monkeypatch.setattr(cluster, "free_memory", lambda: 10**6)

    told = looked(models, tmp_path / "scratch")

    assert told["left"]["merged"] == "there was not enough memory"
    assert not {"loss", "off"} & {name for name, value in told.items() if value}
    assert "- the merged model: there was not enough memory" in card.left(told)
    assert "the result is not opened as a whole: it takes 1.0 GB of memory, and 1.0 MB of the host's" in said()


def test_the_template_of_an_adapter_is_looked_for_in_the_merged_model(models: examine.Models, tmp_path: Path) -> None:
    """Also where it has no tokenizer of its own, and its template speaks through the base's."""
    (models.adapter / "chat_template.jinja").write_text("{% for each in messages %}[{{ each.content }}]{% endfor %}")

    with pytest.raises(errors.ModelError, match="writes another chat format than the adapter's"):
        looked(models, tmp_path / "one")

    given = inputs.Base(models.base.as_uri(), models.base, "its digest")
    wanted = config.Model(base=given.url)
    made = merge.folder(given, models.adapter, wanted, config.Merge(), tmp_path / "again" / "m")
    assert looked(examine.Models(models.base, models.adapter, made, lambda: None), tmp_path / "two")["off"]


def test_a_prompt_as_long_as_the_context_is_no_failure(models: examine.Models, tmp_path: Path) -> None:
    """It is answered with as much as there is room for, also where positions are learned and there are no more."""
    told = models.base / "config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "max_position_embeddings": 8}))
    assert models.merged
    asked = {
        "examples": [{"ids": list(range(8)), "labels": list(range(8)), "seen": None}],
        "models": [
            {"name": "adapted", "path": str(models.base), "adapter": str(models.adapter), "words": str(models.base),
             "template": None, "quantized": None, "device_map": {"": "cpu"}, "dtype": "float32", "positions": 4,
             "tokens": 5, "chunk": 3, "batch": 2, "before": True, "answers": ["after", "before"], "check_words": True,
             "trust_remote_code": False, "logits": str(tmp_path / "logits"),
             "prompts": [{"ids": list(range(length)), "seen": None} for length in (6, 8)]},
        ],
    }  # fmt: skip

    with examine.started(os.environ, (), wanted=True) as program:
        outcome = program.ask(asked["models"], asked["examples"], tmp_path, time.monotonic() + 120)

    found = outcome.answers["adapted"]
    assert not {"error", "failed"} & found.keys()
    assert (found["answers"][0]["text"] == "", found["answers"][1]["text"]) == (False, "")
    assert (found["answers"][0]["tokens"], found["answers"][0]["cut"]) == (2, False)  # as many as there is room for


@pytest.mark.parametrize("kind", ["failed", "memory"])
def test_what_can_be_opened_and_not_measured_is_said(kind: str, tmp_path: Path, said: Callable[[], str]) -> None:
    """A disk that is full, or memory: the merged model is none the worse for it."""
    opened = {"tokenizer": {"tokens": 9, "ids": [], "chat": ""}, "rows": 9, "class": "Llama"}

    found = {"merged": {**opened, kind: "RuntimeError: no"}}
    assert judge.check(found, tmp_path, judge.Standard()) == {}

    told = judge.summarize(found, "some text", [], tmp_path, judge.Standard())

    assert "RuntimeError: no" in told["left"]["merged"]
    assert "the merged model: could not be verified" in said()


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("unable to mmap 269060552 bytes from file: Cannot allocate memory (12)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_a_lack_of_memory_says_nothing_about_the_model(error: Exception, memory: bool) -> None:  # noqa: FBT001 - a parameter
    """Libraries have many words for it."""
    assert plain._of_memory(error) is memory


def test_a_tokenizer_with_more_tokens_than_rows_is_an_error_unless_the_base_has_it(
    tmp_path: Path, said: Callable[[], str]
) -> None:
    """Published bases are like that; a merge must not make one so."""
    opened = {"tokenizer": {"tokens": 9, "ids": [], "chat": ""}, "rows": 8, "failed": "left out"}
    with pytest.raises(errors.ModelError, match="its tokenizer has 9 tokens, and its embedding 8 rows"):
        judge.check({"merged": opened}, tmp_path, judge.Standard())

    judge.check({"merged": opened}, tmp_path, judge.Standard(short=True))

    assert "is like its base, which cannot read all of its tokens" in said()


def test_what_takes_too_long_is_left_out_and_said(
    models: examine.Models, tmp_path: Path, said: Callable[[], str], program: Program
) -> None:
    """A job does not burn hours to look at itself."""
    started = time.monotonic()

    seen = looked(models, tmp_path / "scratch", minutes=0.01, program=program)

    assert time.monotonic() - started < 30
    assert "the original base with the adapter: not verified, because its share of examine.minutes (0.01)" in said()
    assert not seen.get("off")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)], ids=["asked", "killed"])
def test_a_job_that_ends_while_it_looks_leaves_nobody_behind(
    number: int, status: int, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """The program that looks ends with it, and the next start looks again."""
    described = tiny_run(examine={"minutes": 5}, train={"max_steps": 2, "eval_every": 2})
    process = subprocess.Popen(command("run", described), stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: [*tmp_path.rglob("asked.json")])  # the program was started before, while the merge ran
    looking = programs(process.pid)

    os.kill(process.pid, number)

    assert process.wait(30) == status
    psutil.wait_procs(looking, 10)
    assert not [program for program in looking if program.is_running()]
    assert not (tmp_path / "run" / "merged" / "manifest.json").exists()
    again = job("run", described)
    assert again.returncode == 0, again.stderr
    assert "merging" not in again.stderr  # what was merged on this machine is whole
    assert "transformers alone opens the merged model" in again.stderr


def programs(job: int) -> list[psutil.Process]:
    """Those that look at a result for the `job`."""
    with contextlib.suppress(psutil.Error):  # one that has just ended
        return [each for each in psutil.Process(job).children() if any("plain.py" in word for word in each.cmdline())]
    return []


def until(found: Callable[[], list[Path]]) -> None:
    ends = time.monotonic() + 120
    while not found():
        assert time.monotonic() < ends
        time.sleep(0.05)
