"""Any number of processes and any way to share the model: the same training, also when they change in the middle."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import seeing
import torch
from conftest import command, tiny_config
from safetensors.torch import load_file
from test_families import random_model
from test_pairs import as_pairs

STEPS = 20
EXACT = {
    "train": {
        "max_steps": STEPS, "eval_every": 5, "log_every": 1, "global_batch_size": 12, "micro_batch_size": 1,
        "learning_rate": 0.002, "optimizer": "adamw_torch",
    },
    "lora": {"dropout": 0.0},
    "checkpoint": {"every_steps": 5, "keep": 2},
    "merge": {"enabled": False},
}  # fmt: skip
LOSS = 2e-4  # how far two runs' losses may be apart: float32 adds up in another order
NORM = 1e-3  # and the lengths of their gradients, as a share: AdamW hides a factor that is too large, this does not
WEIGHTS = 2e-2  # and their adapters, as a share of what training changed
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")

Leg = tuple[int, str]


def go(config: Path, leg: Leg, until: int = STEPS, *, stop: bool | None = None) -> None:
    """Train with so many processes and so, until the checkpoint of step `until` is safe."""
    stop = until < STEPS if stop is None else stop
    processes, strategy = leg
    more = ["--set", f"distributed.processes_per_node={processes}", "--set", f"distributed.strategy={strategy}"]
    with subprocess.Popen(
        command("run", config, "--json", *more),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            told = json.loads(line) if line.startswith("{") else {}
            if told.get("event") == "train.metrics" and told["step"] == until and stop:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == (75 if stop else 0), "".join(said)


def measured(config: Path, *names: str) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (config.parent / "run" / "report" / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def losses(config: Path) -> dict[tuple[int, str], float]:
    return measured(config, "loss", "eval_loss")


def adapter(config: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(config.parent / "run" / "adapter" / "adapter_model.safetensors")
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far two adapters are apart, as a share of the length of B, which begins at zero."""
    assert one.keys() == other.keys()
    trained = [name for name in one if "lora_B" in name]
    difference = sum(float((one[name] - other[name]).square().sum()) for name in trained)
    return (difference / sum(float(one[name].square().sum()) for name in trained)) ** 0.5


def share(config: Path, attempt: int) -> float:
    """Of the frozen base, that rank 0 held."""
    lines = map(json.loads, (config.parent / "run" / "attempts" / f"{attempt}.jsonl").read_text().splitlines())
    return next((float(line["held"] / line["whole"]) for line in lines if line["event"] == "train.shared"), 1.0)


def checked_packed_weights(config: Path, attempt: int) -> bool:
    """Whether an attempt compared gathered 4-bit weights with those that were quantized."""
    log = config.parent / "run" / "attempts" / f"{attempt}.jsonl"
    return any(json.loads(line)["event"] == "train.packed" for line in log.read_text().splitlines())


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Path]:
    """The undisturbed run of one process, for each way to hold the base."""
    made: dict[str, Path] = {}

    def run(quantization: str) -> Path:
        if quantization not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[quantization] = tiny_config(folder, tiny_model, **EXACT, model={"quantization": quantization})
            go(made[quantization], (1, "ddp"))
        return made[quantization]

    return run


def is_as(config: Path, other: Path) -> None:
    mine, theirs = losses(config), losses(other)
    assert mine.keys() == theirs.keys()
    assert max(abs(mine[at] - theirs[at]) for at in mine) < LOSS
    norms, usual = measured(config, "grad_norm"), measured(other, "grad_norm")
    assert len(norms) == STEPS
    assert norms == pytest.approx(usual, rel=NORM)
    assert apart(adapter(other), adapter(config)) < WEIGHTS


@pytest.mark.parametrize(
    ("legs", "quantization"),
    [
        pytest.param(
            [(2, "fsdp"), (3, "zero3"), (1, "ddp")], "nf4", marks=[pytest.mark.slow, pytest.mark.every_commit]
        ),
        pytest.param([(1, "ddp"), (2, "fsdp"), (3, "zero3"), (4, "zero2"), (2, "ddp")], "nf4", marks=pytest.mark.slow),
        pytest.param(
            [(4, "fsdp"), (1, "zero2"), (3, "zero1"), (2, "zero3"), (4, "ddp")], "none", marks=pytest.mark.slow
        ),
        pytest.param([(2, "zero3"), (3, "fsdp"), (1, "zero3"), (3, "ddp"), (1, "fsdp")], "fp4", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_changes_its_processes_in_the_middle_ends_the_same(
    legs: Sequence[Leg], quantization: str, alone: Callable[[str], Path], tiny_run: Callable[..., Path]
) -> None:
    """A checkpoint does not know how many processes wrote it, nor in which way they shared the model.

    That they share it is looked at too: on the CPU the trainer drops FSDP in silence, and then nothing would be tested.
    """
    config = tiny_run(**EXACT, model={"quantization": quantization})
    stops = [STEPS * (number + 1) // len(legs) for number in range(len(legs))]

    for leg, stop in zip(legs, stops, strict=True):
        go(config, leg, stop)

    is_as(config, alone(quantization))
    for attempt, (processes, strategy) in enumerate(legs, start=1):
        sharded = strategy in ("fsdp", "zero3")
        assert share(config, attempt) < 1.2 / (processes if sharded else 1)
        assert checked_packed_weights(config, attempt) == (sharded and quantization != "none")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_run_of_any_size_is_that_of_one_process(
    processes: int, strategy: str, quantization: str, alone: Callable[[str], Path], tiny_run: Callable[..., Path]
) -> None:
    """The global batch stays the same, and every token weighs the same."""
    config = tiny_run(**EXACT, model={"quantization": quantization})

    go(config, (processes, strategy))

    is_as(config, alone(quantization))


@pytest.mark.slow
def test_pairs_are_learned_alike_by_any_processes(tiny_model: Path, tmp_path: Path) -> None:
    """Every pair of the global batch weighs the same; that of the reference is shared out like the rest."""
    train = {"method": "dpo", "learning_rate": 5e-4}

    is_alike(tmp_path, lambda folder: of(folder, tiny_model, as_pairs, train=train))


@pytest.mark.slow
def test_packed_examples_are_learned_alike_by_any_processes(tiny_model: Path, tmp_path: Path) -> None:
    """And the model is asked in each way to share it, before the first step, if it keeps them apart."""
    is_alike(tmp_path, lambda folder: of(folder, tiny_model, in_plenty, data={"packing": True}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_images_are_learned_alike_by_any_processes(family: str, tmp_path: Path) -> None:
    """Also where a process has a micro batch without any image."""
    base = seeing.base(family, tmp_path / "base")

    is_alike(tmp_path, lambda folder: of(folder, base, seeing.records, data={"max_length": 160}))


@pytest.mark.slow
def test_an_offloaded_base_trains_as_one_that_is_not(
    alone: Callable[[str], Path], tiny_run: Callable[..., Path]
) -> None:
    """A CPU has nowhere else to keep it, but FSDP2 takes the same path as with a GPU."""
    config = tiny_run(**EXACT, model={"quantization": "nf4"}, distributed={"offload": True, "strategy": "fsdp"})

    go(config, (2, "fsdp"))

    is_as(config, alone("nf4"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe"])
def test_a_mixture_of_experts_is_learned_alike_by_any_processes(family: str, tiny_model: Path, tmp_path: Path) -> None:
    """Under fsdp too its experts are converted and sharded layer by layer, and no process loads it whole."""
    base = random_model(family, tmp_path / "base")
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, base)

    is_alike(tmp_path, lambda folder: of(folder, base, lambda _: None))

    log = (tmp_path / "changing" / "run" / "attempts" / "1.jsonl").read_text()
    assert "train.whole" not in log
    assert share(tmp_path / "changing" / "job.yaml", attempt=1) < 0.6


def of(folder: Path, model: Path, write: Callable[[Path], None], **more: dict[str, object]) -> Path:
    """The config of a run on what `write` makes of the data in `folder`."""
    sections = {name: {**EXACT.get(name, {}), **more.get(name, {})} for name in (*EXACT, "data")}
    config = tiny_config(folder, model, **sections, model={"quantization": "nf4"})
    write(folder)
    return config


def in_plenty(folder: Path) -> None:
    """So many short examples that packing leaves enough for a batch."""
    for split in ("train", "eval"):
        path = folder / f"{split}.jsonl"
        path.write_text(path.read_text() * 4)


def is_alike(folder: Path, make: Callable[[Path], Path]) -> None:
    """One process and any that follow one another make the same of the runs that `make` describes."""
    made = []
    for name, legs in {
        "alone": [(1, "ddp")],
        "changing": [(2, "fsdp"), (3, "zero3"), (4, "zero2"), (2, "ddp")],
    }.items():
        (folder / name).mkdir()
        made.append(make(folder / name))
        for number, leg in enumerate(legs, start=1):
            go(made[-1], leg, STEPS * number // len(legs))

    is_as(made[1], made[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "processes", "optimizer", "dtype"),
    [
        *((strategy, 2, "adamw_torch", "float32") for strategy in STRATEGIES),
        *((strategy, 2, "adamw_torch", "bfloat16") for strategy in STRATEGIES),
        ("ddp", 3, "adamw_8bit", "bfloat16"),
        ("ddp", 3, "adamw_torch", "float32"),  # from three on, DDP's order of adding up could change after a step
        ("ddp", 4, "adamw_torch", "float32"),
        ("fsdp", 4, "adamw_torch", "float32"),
        ("fsdp", 3, "adamw_8bit", "float32"),
        ("zero3", 3, "adamw_torch", "bfloat16"),  # whose shares are filled up
        ("fsdp", 1, "paged_adamw_8bit", "bfloat16"),
    ],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    strategy: str, processes: int, optimizer: str, dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Where nothing changed, with dropout on."""
    made = []
    for name, stops in (("whole", [STEPS]), ("stopped", [7, 13, STEPS])):
        (tmp_path / name).mkdir()
        how = {**EXACT, "train": {**EXACT["train"], "optimizer": optimizer}, "lora": {"dropout": 0.05, "r": 64}}
        made.append(tiny_config(tmp_path / name, tiny_model, **how, model={"compute_dtype": dtype}))
        for stop in stops:
            go(made[-1], (processes, strategy), stop)

    whole, stopped = made
    assert losses(whole) == losses(stopped)
    one, other = adapter(whole), adapter(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_last_evaluation_is_made_up_for(strategy: str, tiny_run: Callable[..., Path]) -> None:
    """When a request to stop cut it off, and nothing is left to be trained."""
    config = tiny_run(**EXACT)
    rows = (config.parent / "eval.jsonl").read_text()
    (config.parent / "eval.jsonl").write_text(rows * 40)

    go(config, (2, strategy), STEPS, stop=True)

    told = [json.loads(line) for line in (config.parent / "run" / "attempts" / "1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line["event"] == "checkpoint.saved"][-1] == STEPS
    assert not [line for line in told if line.get("step") == STEPS and "eval_loss" in line]
    go(config, (2, strategy))
    assert (STEPS, "eval_loss") in losses(config)
