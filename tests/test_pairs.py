"""Preference tuning: pairs of answers from data to gradients, and a run from the first loss to the merged model."""

import json
import math
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUESTIONS, files, take_back
from datasets import Dataset
from peft import PeftModel
from test_families import random_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from job import config, errors
from job.model import lora, tokenizer, weights
from job.model.tokenizer import IGNORED
from job.prepare import formats, tokens
from job.prepare.turns import BadRecordError
from job.train.order import filled
from job.train.pairs import Collator, PairTrainer, _valid

Job = Callable[..., subprocess.CompletedProcess[str]]
ASKED = {"role": "user", "content": "Warm?"}
SYSTEM, OLD, OLDER = (
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
)  # fmt: skip
GOOD, BAD = {"role": "assistant", "content": "20 C."}, {"role": "assistant", "content": "Dunno."}


def example(record: dict[str, Any]) -> formats.Example:
    return formats.convert(record, formats.recognise(record), "\n\n")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Warm?", "chosen": "20 C.", "rejected": "Dunno."},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "Warm?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"conversations": [{"from": "human", "value": "Warm?"}], "chosen": {"from": "gpt", "value": "20 C."},
         "rejected": {"from": "gpt", "value": "Dunno."}},
        {"instruction": "Warm?", "input": "", "chosen": "20 C.", "rejected": "Dunno."},
        {"prompt": "Warm?", "prompt_id": "7", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 8.0,
         "messages": [ASKED, GOOD], "score_rejected": 2.0},
    ],
    ids=lambda record: "-".join(record) + f"-{type(record['chosen']).__name__}",
)  # fmt: skip
def test_the_same_pair_in_different_words(record: dict[str, Any]) -> None:
    """With the prompt beside the answers, in front of both, or as the turns before them."""
    pair = example(record)

    assert pair.messages == (ASKED, GOOD)
    assert pair.rejected is not None
    assert pair.rejected.messages == (ASKED, BAD)
    assert pair.trained == pair.rejected.trained == (True,)


def test_only_the_answers_that_differ_are_compared() -> None:
    """Those of the turns before them are context, with a system message and tools as in other formats."""
    record = {"messages": [ASKED, GOOD, ASKED], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief."}

    pair = example(record)

    assert [message["role"] for message in pair.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert pair.trained == (False, True)


@pytest.mark.parametrize("told", [[GOOD], [ASKED, GOOD], [SYSTEM, ASKED, GOOD], [OLD, OLDER, SYSTEM, ASKED, GOOD]])
def test_no_turn_of_the_prompt_is_lost(told: list[dict[str, str]]) -> None:
    """However many of them the answers repeat, or tell besides."""
    record = {"prompt": [SYSTEM, ASKED], "chosen": told, "rejected": [*told[:-1], BAD]}

    pair = example(record)

    before = [SYSTEM, ASKED] if len(told) < 4 else told[:-1]
    assert list(pair.messages) == [*before, GOOD]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Warm?", "chosen": "x", "rejected": "x"}, "chosen and rejected are the same"),
        ({"chosen": "x", "rejected": "y"}, "has no prompt, and chosen and rejected do not begin with the same one"),
        (
            {"prompt": "Cold?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            "begin with something else",
        ),
        ({"prompt": "Warm?", "chosen": {**GOOD, "score": 1}, "rejected": {**GOOD, "score": 2}}, "are the same"),
        ({"prompt": "Warm?", "chosen": 3, "rejected": "x"}, "chosen is neither text nor a turn"),
        ({"prompt": "Warm?", "chosen": " ", "rejected": "x"}, "empty answer"),
    ],
)
def test_what_is_wrong_with_a_pair_is_told(record: dict[str, Any], reason: str) -> None:
    """A pair of equals teaches nothing; answers to different questions teach the wrong thing."""
    with pytest.raises(BadRecordError, match=reason):
        example(record)


@pytest.mark.parametrize(
    ("record", "method", "told"),
    [
        ({"prompt": "Warm?", "chosen": "x", "rejected": "y"}, "sft", "which train.method sft has no use for"),
        ({"prompt": "Warm?", "completion": "x"}, "dpo", "prompt-completion format, and train.method dpo needs pairs"),
    ],
)
def test_data_and_method_must_fit(
    record: dict[str, Any],
    method: str,
    told: str,
    tiny_run: Callable[..., Path],
    records: Callable[..., Path],
    job: Job,
) -> None:
    """Said before the model is loaded."""
    path = records("odd.jsonl", [record] * 8)

    outcome = job("run", tiny_run(data={"train": [str(path)], "eval": []}, train={"method": method}))

    assert outcome.returncode == 64, outcome.stderr
    assert told in outcome.stderr


def test_answers_that_are_the_same_within_the_length_teach_nothing(tiny_model: Path) -> None:
    """They would only dilute the loss."""
    pair = example({"prompt": "Warm?", "chosen": "It is 3. " * 40, "rejected": "It is 3. " * 41})

    (row,) = tokens.Renderer(tokenizer.load(tiny_model), 64, "assistant").rows([pair])

    assert str(row) == "both answers are the same in the first 64 tokens"


def test_a_batch_without_a_usable_pair_is_told(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """With the reason for each, as for other records."""
    rows = [{"prompt": "It is 3. " * 60, "chosen": "x", "rejected": "y"}] * 3

    with pytest.raises(errors.DataError, match="3 of 3 records read cannot be used") as caught:
        prepared(records("long.jsonl", rows), method="dpo", max_length=64)

    assert "nothing left to train" in str(caught.value)


@pytest.mark.parametrize("data", [{"packing": True}, {"loss_on": "all"}])
def test_pairs_are_neither_packed_nor_learned_as_a_whole(data: dict[str, Any], tiny_run: Callable[..., Path]) -> None:
    """The config says so at once."""
    with pytest.raises(errors.ConfigError, match="dpo compares whole answers"):
        config.read(tiny_run(data=data, train={"method": "dpo"}))


@pytest.fixture
def network(tiny_model: Path, tiny_run: Callable[..., Path]) -> PeftModel:
    """The tiny model with an adapter that has learned something."""
    read = config.read(tiny_run(model={"quantization": "none", "compute_dtype": "float32"}, lora={"dropout": 0.0}))
    made = lora.adapted(weights.for_training(tiny_model, read.model), read.lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return made


def pairs(tiny_model: Path) -> Dataset:
    """Six pairs of different lengths, as they are prepared."""
    told = [
        example({"prompt": question, "chosen": answer, "rejected": f"{answer} I guess. {number}"})
        for number, (question, answer) in enumerate(QUESTIONS[:6])
    ]
    rows = list(tokens.Renderer(tokenizer.load(tiny_model), 512, "assistant").rows(told))
    assert all(isinstance(row, tokens.Row) and row.rejected for row in rows)
    return Dataset.from_list(
        [
            {
                "input_ids": row.input_ids, "labels": row.labels,
                "rejected_input_ids": row.rejected.input_ids, "rejected_labels": row.rejected.labels,
            }
            for row in rows
            if isinstance(row, tokens.Row) and row.rejected
        ]
    )  # fmt: skip


def test_the_loss_is_that_of_the_paper(network: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    """Equation 7, with log-probabilities from plain logits; and so the mean over pairs, whatever blank ones fill up."""
    rows = pairs(tiny_model)
    beta, expected = 0.3, []
    for row in rows:
        ratio = []
        for prefix in ("", "rejected_"):
            ids, labels = torch.tensor([row[f"{prefix}input_ids"]]), torch.tensor(row[f"{prefix}labels"])
            both = []
            for context in (torch.enable_grad(), network.disable_adapter()):
                with context:
                    spoken = network(input_ids=ids).logits[0, :-1].log_softmax(-1)
                picked = spoken[torch.arange(len(labels) - 1), ids[0, 1:]]
                both.append(picked[labels[1:] != IGNORED].sum())
            ratio.append(both[0] - both[1])
        expected.append(-torch.nn.functional.logsigmoid(beta * (ratio[0] - ratio[1])))
    trainer = trainer_of(network, tiny_model, tmp_path, beta)
    whole = Collator(0)([dict(row) for row in filled(rows, 8)])

    loss = trainer.compute_loss(trainer.model, whole)

    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    assert _valid(whole["labels"]).tolist() == [True] * 6 + [False] * 2
    assert trainer._weight(whole) == 6


def test_gradients_do_not_depend_on_the_micro_batch(network: PeftModel, tiny_model: Path, tmp_path: Path) -> None:
    """Every pair of a step counts alike, however they are cut."""
    rows = [dict(row) for row in filled(pairs(tiny_model), 4)]
    trainer = trainer_of(network, tiny_model, tmp_path, 0.3)

    def gradients(size: int) -> list[torch.Tensor]:
        network.zero_grad()
        batches = [Collator(0)(rows[start : start + size]) for start in range(0, len(rows), size)]
        count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        assert int(count) == 6
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
        return [p.grad.clone() for p in network.parameters() if p.requires_grad]

    for one, other in zip(gradients(8), gradients(2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_no_dropout_is_left_in_the_base(tiny_run: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    """With it an adapter that has learned nothing would seem to prefer something: GPT-2 has dropout everywhere."""
    base = random_model("gpt2", tmp_path / "base")
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, base)
    read = config.read(tiny_run(model={"base": str(base), "quantization": "none", "compute_dtype": "float32"}))
    made = lora.adapted(weights.for_training(base, read.model), read.lora)
    lora.draw(made, 1)
    lora.without_dropout(made)
    trainer = trainer_of(made, tiny_model, tmp_path, 0.3)
    trainer.model.train()

    loss = trainer.compute_loss(trainer.model, Collator(0)([dict(row) for row in pairs(tiny_model)]))

    assert math.isclose(float(loss.detach()), math.log(2), rel_tol=1e-5)


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The lines of the report's figures."""
    return [json.loads(line) for line in (run / "report" / "metrics.jsonl").read_text("utf-8").splitlines()]


def as_pairs(folder: Path) -> None:
    """Turn the data of a tiny run into pairs."""
    for name in ("train", "eval"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        told = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "I do not know."} for r in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")


def trainer_of(network: PeftModel, tiny_model: Path, folder: Path, beta: float) -> PairTrainer:
    """The trainer without a run around it."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, about TRL's defaults
        told = SFTConfig(output_dir=str(folder), use_cpu=True, report_to=[], max_length=None)
    return PairTrainer(
        None, SimpleNamespace(), SimpleNamespace(size=1), None, keep_best=False, beta=beta, model=network,  # type: ignore[arg-type]
        args=told, data_collator=Collator(0), processing_class=tokenizer.load(tiny_model),
        train_dataset=pairs(tiny_model),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.every_commit
def test_a_run_learns_the_preference_and_goes_on_to_the_same_bits(
    job: Job, tiny_run: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    """From ln 2, where both answers are as likely as before, down; a second start in the middle ends the same."""
    settings = tiny_run(
        train={"method": "dpo", "max_steps": 8, "learning_rate": 5e-3, "beta": 0.5, "eval_every": 4, "log_every": 2},
        checkpoint={"every_steps": 4}, lora={"dropout": 0.05}, model={"base": str(tmp_path / "base")},
    )  # fmt: skip
    as_pairs(tmp_path)
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))  # without a token for padding, as Llama's
    for path in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        if path.exists():
            told = json.loads(path.read_text(encoding="utf-8"))
            told.pop("pad_token", None)
            path.write_text(json.dumps(told), encoding="utf-8")
    run = tmp_path / "run"
    first = job("run", settings)
    assert first.returncode == 0, first.stderr
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    facts = json.loads((run / "adapter" / "training.json").read_text(encoding="utf-8"))
    assert math.isclose(facts["loss_before"], math.log(2), rel_tol=1e-4)
    assert facts["loss_after"] < 0.4
    assert "no dropout: train.method dpo" in first.stderr
    assert "eval_rewards/margins" in metrics_of(run)[-1]
    assert metrics_of(run)[-1]["eval_rewards/accuracies"] == 1.0
    sample = (run / "report" / "sample.txt").read_text(encoding="utf-8")
    assert sample.index("preferred:") < sample.index("⟦It is") < sample.index("rejected:") < sample.index("⟦I do not")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    take_back(run, step=8)

    again = job("run", settings)

    assert again.returncode == 0, again.stderr
    assert "going on after step 4" in again.stderr
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert "adapter_model.safetensors" in files(run / "adapter")
    assert next(merged.parameters()).dtype == torch.bfloat16
