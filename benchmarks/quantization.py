"""What each way of holding the frozen base costs: memory, and loss after the same training.

    python benchmarks/quantization.py [--rounds 2] [--steps 60] [--keep benchmarks/results/quantization]

The real 135M model of the smoke run, trained by the whole job with each way in turn: the same dialogues in the same
order, the same first values of the adapter. A quarter of them is held out. A round has a seed of its own, so another
split: within a round the figures compare, and between rounds they show how much of a difference is chance. Memory is
counted, not measured: the bytes of the weights and of what unpacks them, with bfloat16 as compute dtype, which are the
same on a GPU. --keep writes NAME.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lab
import torch
import transformers
from datasets import Dataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job import config  # noqa: E402 - after the path
from job.model import weights  # noqa: E402

MODEL, DATA = ROOT / ".smoke" / "SmolLM2-135M-Instruct", ROOT / ".smoke" / "data"
WAYS = {
    "none": {"quantization": "none"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4", "double_quant": False},
    "nf4, double_quant": {"quantization": "nf4", "double_quant": True},
    "fp4": {"quantization": "fp4", "double_quant": False},
    "fp4, double_quant": {"quantization": "fp4", "double_quant": True},
}
HELD_OUT = 0.25


@dataclass(frozen=True)
class Size:
    """Bytes of the whole base, and bits for each weight of its linear layers."""

    bytes: int
    bits: float


@dataclass(frozen=True)
class Losses:
    """On held-out dialogues: of the base as it is held, of that with the adapter, and of the merged model."""

    before: float
    after: float
    merged: float


def size(way: Mapping[str, object]) -> Size:
    """Count the base as the job loads it."""
    settings = config.Model.model_validate({"base": MODEL.as_uri(), "compute_dtype": "bfloat16", **way})
    network = weights.for_training(MODEL, settings)
    head = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    leaves = [module for module in network.modules() if not list(module.children())]
    held = {tensor.data_ptr(): tensor.nbytes for module in leaves for tensor in tensors(module)}  # tied ones once
    linear = [module for module in leaves if isinstance(module, torch.nn.Linear) and module is not head]
    count = sum(module.in_features * module.out_features for module in linear)
    return Size(sum(held.values()), 8 * sum(tensor.nbytes for module in linear for tensor in tensors(module)) / count)


def tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What `module` holds, with what its weights are unpacked with."""
    return (value for value in module.state_dict().values() if isinstance(value, torch.Tensor))


def train(folder: Path, way: Mapping[str, object], seed: int, steps: int) -> Losses:
    """Run the whole job in `folder`; its training computes in float32, as it does on a CPU."""
    told = {
        "run.url": folder / "run",
        "run.cache": folder / "cache",
        "run.seed": seed,
        "model.base": MODEL,
        **{f"model.{key}": json.dumps(value) for key, value in way.items()},
        "data.train": json.dumps([str(DATA / "train.jsonl"), str(DATA / "eval.jsonl")]),
        "data.eval": "[]",
        "data.eval_fraction": HELD_OUT,
        "train.max_steps": steps,
        "train.micro_batch_size": 8,
        "train.eval_every": steps,
        "train.keep_best": "false",
        "train.gradient_checkpointing": "false",
        "checkpoint.every_steps": steps,
        "merge.dtype": "float32",
    }
    overrides = [part for name, value in told.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(ROOT / "configs" / "smoke.yaml"), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = json.loads((folder / "run" / "done.json").read_text(encoding="utf-8"))["training"]
    held_out = next((folder / "cache").glob("**/eval.arrow"))
    return Losses(done["loss_before"], done["loss_after"], loss(folder / "run" / "merged", held_out))


@torch.inference_mode()
def loss(model: Path, held_out: Path) -> float:
    """Cross-entropy for each trained token of `held_out`, by plain transformers."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in Dataset.from_file(str(held_out)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] >= 0).sum())
        total += float(network(input_ids=ids, labels=labels).loss) * trained
        count += trained
    return total / count


def table(sizes: Mapping[str, Size], rounds: Sequence[Mapping[str, Losses]]) -> list[str]:
    """One line for each way; in brackets the lowest and the highest of the rounds."""
    plain = sizes["none"].bytes
    columns = "model.quantization", "base in memory", "of bfloat16", "bits per linear weight", "before", "after"
    columns += "after, less that of none", "merged"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, counted in sizes.items():
        each = [measured[name] for measured in rounds]
        above = [measured[name].after - measured["none"].after for measured in rounds]
        lines.append(
            f"| {name} | {counted.bytes / 1e6:.1f} MB | {counted.bytes / plain:.0%} | {counted.bits:.2f} "
            f"| {spread([one.before for one in each])} "
            f"| {spread([one.after for one in each])} | {spread(above)} | {spread([one.merged for one in each])} |"
        )
    return lines


def spread(values: Sequence[float]) -> str:
    """The mean, and the lowest and the highest."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """Measure, and show the table."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--rounds", type=int, default=2)
    told.add_argument("--steps", type=int, default=60)
    told.add_argument("--keep", type=Path)
    given = told.parse_args()
    sizes = {name: size(way) for name, way in WAYS.items()}
    rounds = []
    for seed in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(
                {
                    name: train(Path(folder) / name.replace(", ", "-"), way, seed, given.steps)
                    for name, way in WAYS.items()
                }
            )
        lab.tell(table(sizes, rounds), None)
    lines = [
        "# What holding the base in fewer bits costs",
        "",
        f"`python benchmarks/quantization.py --rounds {given.rounds} --steps {given.steps}`",
        "",
        f"SmolLM2-135M-Instruct, {given.steps} steps of 8 dialogues each, {given.rounds} rounds (mean, lowest to "
        "highest). Loss is cross-entropy per trained token on the same held-out quarter of the dialogues. Before: the "
        "base as it is held; after: with the adapter trained on it; merged: that adapter added to the original "
        "weights. " + lab.machine("torch", "transformers", "peft", "bitsandbytes"),
        "",
        *table(sizes, rounds),
    ]
    lab.tell(lines, given.keep and given.keep.with_suffix(".md"))


if __name__ == "__main__":
    main()
