"""Several examples in one sequence: nothing is lost, and none of them sees another."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from test_families import COMMON, IDS, OTHERS, SMALL, random_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from job import errors
from job.prepare import packing
from job.train.borders import kept_apart, seems_apart

LEAKING = ("falcon", "bloom", "opt", "gpt_oss", "minimax", "qwen3_next")  # of transformers 5.23
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@pytest.fixture
def rows() -> list[list[int]]:
    """Token ids of short and long examples."""
    dice = random.Random(0)
    return [[dice.randrange(3, 250) for _ in range(dice.randrange(2, 33))] for _ in range(100)]


@pytest.fixture
def path(rows: list[list[int]], tmp_path: Path) -> Path:
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        labels = [[-100, *row[1:]] for row in rows]
        writer.write_batch(pa.record_batch([rows, labels], schema=SCHEMA))
    return tmp_path / "train.arrow"


def test_every_example_is_in_one_sequence_and_whole(path: Path, rows: list[list[int]]) -> None:
    """With its labels; and hardly a place stays empty."""
    count = packing.pack(path, 64)

    packed = Dataset.from_file(str(path))
    found = []
    for line in packed:
        assert len(line["input_ids"]) == len(line["labels"]) == sum(line["seq_lengths"]) <= 64
        start = 0
        for length in line["seq_lengths"]:
            example = line["input_ids"][start : start + length]
            assert line["labels"][start : start + length] == [-100, *example[1:]]
            found.append(example)
            start += length
    assert count == len(packed)
    assert sorted(found) == sorted(rows)
    assert sum(map(len, rows)) / (count * 64) > 0.95
    assert [p.name for p in path.parent.iterdir()] == ["train.arrow"]


def test_packing_the_same_gives_the_same(path: Path) -> None:
    """To the byte, wherever and whenever: the digest of the data says if a checkpoint belongs to them."""
    again = path.with_name("again.arrow")
    again.write_bytes(path.read_bytes())
    os.utime(again, (1, 1))

    packing.pack(path, 64)
    packing.pack(again, 64)

    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_example_sees_another(attention: str, path: Path, rows: list[list[int]], tiny_model: Path) -> None:
    """What the model says to each token of a packed batch is what it says to the example alone."""
    packing.pack(path, 64)
    packed = Dataset.from_file(str(path))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=attention)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed[0], packed[1]])

    with torch.no_grad():
        together = model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits[0]
        start, seen = 0, 0
        for length in [*packed[0]["seq_lengths"], *packed[1]["seq_lengths"]]:
            alone = model(batch["input_ids"][:, start : start + length]).logits[0]
            assert torch.allclose(together[start : start + length], alone, atol=1e-5)
            assert batch["labels"][0, start] == -100
            start, seen = start + length, seen + 1

    assert seen > 3
    assert len(rows) == 100


@pytest.mark.parametrize(
    "family",
    [
        "llama", "gemma3_text", "phi3", "falcon", "gpt_oss",
        *(pytest.param(name, marks=pytest.mark.slow) for name in {**COMMON, **OTHERS} if name not in
          ("llama", "gemma3_text", "phi3", "falcon", "gpt_oss")),
    ],
)  # fmt: skip
def test_a_family_that_reads_across_the_borders_is_found_out(family: str, tmp_path: Path) -> None:
    """By asking the model itself: no list of families stays true."""
    model = AutoModelForCausalLM.from_pretrained(random_model(family, tmp_path / "base")).eval()

    assert kept_apart(model, IDS) == (family not in LEAKING)
    assert seems_apart(model, IDS) == (family not in LEAKING)


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2"])
def test_a_state_beside_attention_is_found_out_whatever_stands_in_the_data(kind: str) -> None:
    """Little of it reaches the next example, which a comparison of logits misses for some tokens."""
    shape = {"falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
             "lfm2": {"layer_types": ["conv", "full_attention"]}}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **shape[kind])).eval()

    assert not any(kept_apart(model, torch.randint(3, 400, (1, 16))) for _ in range(6))


@pytest.mark.parametrize("ids", [[5] * 16, [*range(8), *reversed(range(8))], [5, 6, 7]])
def test_any_tokens_tell(ids: list[int], tmp_path: Path) -> None:
    """Also where the first example is as good as empty, or the same from both ends."""
    model = AutoModelForCausalLM.from_pretrained(random_model("falcon", tmp_path / "base")).eval()

    assert not kept_apart(model, torch.tensor([ids]))
    assert not seems_apart(model, torch.tensor([ids]))
    assert kept_apart(model, torch.tensor([ids[:1]]))
    assert seems_apart(model, torch.tensor([ids[:1]]))


def test_a_base_that_answers_with_nan_is_not_blamed_on_packing(tiny_model: Path) -> None:
    """It is damaged, or of numbers that are too large."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.lm_head.weight.data[5] = float("nan")

    with pytest.raises(errors.ModelError, match="it answers with NaN before any training: it is damaged"):
        kept_apart(model, IDS)


def test_rounding_to_eight_bits_is_no_leak(smol_model: Path) -> None:
    """Its rounding depends on what else is in the batch, so that what is said changes; no gradient comes of that."""
    quantized = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(smol_model, quantization_config=quantized, dtype=torch.bfloat16)
    torch.manual_seed(0)

    assert all(kept_apart(model.eval(), torch.randint(3, 40_000, (1, 16))) for _ in range(8))


@pytest.mark.slow
@pytest.mark.every_commit
def test_packing_for_a_model_that_reads_across_the_borders_is_refused(
    job: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    tiny_model: Path,
    tiny_run: Callable[..., Path],
) -> None:
    """Before the first step, with what to change."""
    base = random_model("falcon", tmp_path / "base")
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, base)

    outcome = job("run", tiny_run(model={"base": str(base)}, data={"packing": True}))

    assert outcome.returncode == 64, outcome.stderr
    assert "data.packing: falcon with sdpa attention does not keep packed examples apart" in outcome.stderr
    assert "set data.packing to false" in outcome.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert not (tmp_path / "run" / "adapter").exists()
