"""The command `merge`: an adapter that is in a store already, wherever it was made, put into its base."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import adapters
import pytest
import torch
from conftest import S3, command, files
from safetensors.torch import load_file, save_file

from job import manifest
from job.model import shard

Job = Callable[..., subprocess.CompletedProcess[str]]
GIGABYTE = 10**9


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny Llama with the tokenizer of the tiny model."""
    made = adapters.base(tmp_path / "base", tied=False, vocab_size=420)
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, made)
    return made


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """What PEFT saves of an adapter for it, and nothing else."""
    adapters.adapter(adapters.plain(base), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    return tmp_path / "adapter"


def test_an_adapter_from_elsewhere_is_merged_from_store_to_store(
    base: Path, adapter: Path, s3: S3, bucket: str, job: Job, tmp_path: Path
) -> None:
    """Base and adapter come from S3 and the model goes there; a second start finds it, and fetches nothing."""
    s3.upload(base, bucket, "base")
    s3.upload(adapter, bucket, "adapter")
    given = ["--base", f"s3://{bucket}/base", "--adapter", f"s3://{bucket}/adapter", "--out", f"s3://{bucket}/merged"]
    more = ["--set", f"run.cache={tmp_path}/cache", "--set", "merge.dtype=float32"]

    first = job("merge", *given, *more)
    shutil.rmtree(tmp_path / "cache")
    second = job("merge", *given, *more)

    assert first.returncode == 0, first.stderr
    assert "the adapter does not say by a digest which base it was trained on" in first.stderr
    assert (second.returncode, "pull" in second.stderr) == (0, False), second.stderr
    for key in s3.keys(bucket, "merged/"):
        path = tmp_path / key
        path.parent.mkdir(exist_ok=True)
        s3.client().download_file(bucket, key, str(path))
    expected = adapters.logits(adapters.PeftModel.from_pretrained(adapters.plain(base), str(adapter)))
    torch.testing.assert_close(adapters.logits(adapters.plain(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)
    assert {"tokenizer.json", "config.json", "manifest.json", "training.json"} < files(tmp_path / "merged")
    assert not [name for name in files(tmp_path / "cache" / "runs") if not name.endswith((".use", ".lock"))]


@pytest.mark.slow
def test_the_adapter_of_a_run_is_merged_in_another_way(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """By its config, or by its URL alone; the run stays as it is."""
    described = tiny_run(merge={"enabled": False}, train={"max_steps": 1, "warmup": 0})
    assert job("run", described).returncode == 0
    before = files(tmp_path / "run")

    by_config = job("merge", described, "--out", tmp_path / "one", "--set", "merge.dtype=float32")
    by_url = job("merge", (tmp_path / "run").as_uri(), "--out", tmp_path / "two", "--set", "merge.dtype=float32")

    assert (by_config.returncode, by_url.returncode) == (0, 0), by_config.stderr + by_url.stderr
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert "taken on trust" not in by_config.stderr
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: given.pop("--out"), "--out is missing: give its URL"),
        (lambda given: given.pop("--adapter"), "--adapter is missing: give its URL, or the config or the URL of a run"),
        (lambda given: given.update({"--out": given["--base"]}), "lie in each other: give another --out"),
        (lambda given: given.update({"--adapter": given["--base"]}), "has no adapter_config.json and adapter_model"),
        (lambda given: given.update({"--set": "merge.dtyp=float16"}), "merge.dtyp: unknown key. Did you mean"),
        (lambda given: given.update({"--set": "train.epochs=2"}), "train: unknown key."),
        (
            lambda given: (Path(given["--out"]).mkdir(), (Path(given["--out"]) / "thesis.tex").write_text("all of it")),
            "holds something else already, such as thesis.tex: give a place of its own",
        ),
        (
            lambda given: shutil.copytree(given["--base"], given["--out"]),
            "holds something else already, such as config.json: give a place of its own",
        ),
        (
            lambda given: given.update({"--out": f"file://{given['--base']}/../{Path(given['--base']).name}"}),
            "lie in each other: give another --out",
        ),
        (
            lambda given: Path(given["--out"]).symlink_to(given["--base"]),
            "lie in each other: give another --out",
        ),
        (
            lambda given: (Path(given["--adapter"]) / "training.json").write_text("{}"),
            "is of a run that has not published it whole: start the run again first",
        ),
    ],
    ids=[
        "no out",
        "no adapter",
        "over the base",
        "no adapter there",
        "wrong key",
        "no such section",
        "occupied",
        "another model",
        "the base by another name",
        "the base by a link",
        "torn",
    ],
)
def test_a_merge_that_cannot_be_meant_is_refused(
    change: Callable[[dict[str, str]], object], told: str, base: Path, adapter: Path, job: Job, tmp_path: Path
) -> None:
    """In one message, before anything is written, and nothing that is there already is lost."""
    given = {"--base": str(base), "--adapter": str(adapter), "--out": str(tmp_path / "out"),
             "--set": f"run.cache={tmp_path}/cache"}  # fmt: skip
    change(given)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    outcome = job("merge", *(part for pair in given.items() for part in pair))

    assert (outcome.returncode, outcome.stderr.count("error: ")) == (64, 1), outcome.stderr
    assert told in outcome.stderr
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert not [name for name in files(tmp_path) - before.keys() if name.endswith((".safetensors", "manifest.json"))]


def test_only_the_sums_are_checked_where_nothing_else_is_wanted(
    base: Path, adapter: Path, job: Job, tmp_path: Path
) -> None:
    """No model is opened, no program is started for it, and the card says so."""
    given = ["--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--set", f"run.cache={tmp_path}/cache"]

    outcome = job("merge", *given, "--verify", "sums", "--json")

    assert outcome.returncode == 0, outcome.stderr
    events = [json.loads(line) for line in outcome.stderr.splitlines() if line.startswith("{")]
    assert {"merge.checked", "examine.sums"} <= {each["event"] for each in events}
    assert "examine.merged" not in {each["event"] for each in events}
    written = (tmp_path / "out" / "README.md").read_text()
    assert "are the sum in float64, rounded" in written
    assert "- the merged model: only its sums were checked" in written
    assert "Opened" not in written


def test_what_is_to_be_verified_in_full_needs_time(base: Path, adapter: Path, job: Job, tmp_path: Path) -> None:
    """Before anything is read."""
    given = ["--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--set", f"run.cache={tmp_path}/cache"]

    outcome = job("merge", *given, "--verify", "full", "--set", "examine.minutes=0")

    assert outcome.returncode == 64
    assert "--verify full opens the result, and examine.minutes is 0: set examine.minutes above 0" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_starts_of_one_merge_do_not_write_the_same_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The second waits for the first, and finds its result."""
    (base / "LICENSE").write_text("as you like")
    line = [*command("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out"),
            "--set", f"run.cache={tmp_path}/cache", "--set", "examine.minutes=0"]  # fmt: skip
    both = [subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]

    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("merged model:" in each for each in said) == [False, True]
    sealed = manifest.sealed(tmp_path / "out")
    assert sealed
    assert all(manifest.sha256(tmp_path / "out" / name) == file.sha256 for name, file in sealed.files.items())
    (tmp_path / "out" / manifest.NAME).unlink()  # as a start that was killed leaves it: it goes on, and is no stranger
    assert subprocess.run(list(map(str, line)), check=False).returncode == 0


@pytest.mark.slow
def test_another_model_is_not_overwritten(base: Path, adapter: Path, job: Job, tmp_path: Path) -> None:
    """A place that holds a merged model is that model's, until its owner removes it."""
    given = ["--base", base, "--out", tmp_path / "out", "--set", f"run.cache={tmp_path}/cache"]
    assert job("merge", *given, "--adapter", adapter).returncode == 0
    there = (tmp_path / "out" / "model.safetensors").read_bytes()
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in held.items()}, adapter / "adapter_model.safetensors")

    outcome = job("merge", *given, "--adapter", adapter)

    assert outcome.returncode == 64
    assert "holds something else already" in outcome.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == there


@pytest.mark.slow
def test_a_model_of_three_gigabytes_is_merged_within_half_of_that(base: Path, tmp_path: Path) -> None:
    """The process may not have more than 1.5 GB of address space, its libraries included."""
    width, rows, layers = 2048, 8192, 20
    described = json.loads((base / "config.json").read_text())
    described |= {
        "hidden_size": width, "intermediate_size": rows, "num_hidden_layers": layers, "vocab_size": 64_000,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(described))
    shapes = {
        "model.embed_tokens.weight": (64_000, width),
        "lm_head.weight": (64_000, width),
        "model.norm.weight": (width,),
    }
    held = {}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (rows, width) for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (width, rows)}
        shapes |= {f"{start}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        held[f"base_model.model.{start}.mlp.down_proj.lora_A.weight"] = torch.randn(2, rows)
        held[f"base_model.model.{start}.mlp.down_proj.lora_B.weight"] = torch.randn(width, 2)
    outlines = {name: shard.Outline(torch.bfloat16, shape) for name, shape in shapes.items()}
    noise = torch.randn(1 << 20).to(torch.bfloat16)
    shard.write(
        base / "model.safetensors",
        outlines,
        (noise.repeat(-(-o.size // 2 >> 20))[: o.size // 2] for o in outlines.values()),
    )
    size = (base / "model.safetensors").stat().st_size
    (tmp_path / "adapter").mkdir()
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]})
    )

    given = ["--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    merging = command("merge", *given, "--set", f"run.cache={tmp_path}/cache", "--set", "merge.max_shard_size=1GB")
    limited = ["bash", "-c", f'ulimit -v {int(1.5 * GIGABYTE) // 1024} && exec "$@"', "limited", *map(str, merging)]
    outcome = subprocess.run(
        limited, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False
    )

    assert size > 3 * GIGABYTE
    assert outcome.returncode == 0, outcome.stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes.keys()
    assert index["metadata"]["total_size"] == sum(outline.size for outline in outlines.values())
