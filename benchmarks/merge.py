"""Our merge beside PEFT's: seconds, memory, and how far each result is from the exact sum.

    python benchmarks/merge.py [--gigabytes 3] [--rank 16] [--rounds 3] [--keep benchmarks/results/merge.md]

A Llama with random weights in bfloat16 and a LoRA adapter on all of its linear layers, merged into bfloat16 by both, in
turns, each in a process of its own: ours as the job does it, checks and SHA-256 of the result included; PEFT's
``merge_and_unload`` and ``save_pretrained``, which check nothing. The files of the base are in the page cache for both.
Memory is the largest that the process had at once, with what is mapped from files and without. The error is that of
rows of every merged weight against W + scale x B A in float64, as a share of what rounding to bfloat16 alone costs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lab
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job.model import shard  # noqa: E402 - after the path

LAYER = {
    "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}  # fmt: skip
WORDS, WIDTH = 32_000, 2048
ALPHA = 32
SHARD = "1GB"
OURS = """
import sys
from pathlib import Path
from job import config, inputs, merge
base, adapter, out = map(Path, sys.argv[1:4])
model, wanted = config.Model(base=base.as_uri()), config.Merge(max_shard_size=sys.argv[4])
merge.folder(inputs.Base(base.as_uri(), base, "known"), adapter, model, wanted, out / "merged")
"""
PEFTS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
network.merge_and_unload().save_pretrained(out + "/merged", max_shard_size=sys.argv[4])
"""


@dataclass(frozen=True)
class Took:
    """Seconds, and the most memory in bytes: all of it, and what is not mapped from files."""

    seconds: float
    resident: int
    own: int


def main() -> None:
    """Make the model, merge it in turns, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / ".smoke" if (ROOT / ".smoke").is_dir() else None) as place:
        folder = Path(place)
        layers = make(folder, given.gigabytes, given.rank)
        took: dict[str, list[Took]] = {"ours": [], "PEFT": []}
        errors: dict[str, float] = {}
        for _ in range(given.rounds):
            for name, program in (("PEFT", PEFTS), ("ours", OURS)):
                out = folder / "out"
                out.mkdir()
                took[name].append(run(program, folder, out))
                errors[name] = error(folder, next(path for path in out.iterdir() if path.is_dir()), layers)
                shutil.rmtree(out)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    lab.tell(told(given, size, took, errors), given.keep)


def make(folder: Path, gigabytes: float, rank: int) -> int:
    """A base of that size and an adapter for it, in the `folder`; returns how many layers it has."""
    each = sum(rows * columns for rows, columns in LAYER.values()) * 2
    layers = max(1, round((gigabytes * 1e9 - 4 * WORDS * WIDTH) / each))
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    described = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=WORDS, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    described.save_pretrained(folder / "base")
    shapes = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "lm_head.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.{name}.weight": shape for name, shape in LAYER.items()}
        shapes |= {f"{start}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    outlines = {name: shard.Outline(torch.bfloat16, shape) for name, shape in shapes.items()}
    drawn = torch.Generator().manual_seed(0)
    shard.write(folder / "base" / "model.safetensors", outlines, random(outlines, drawn))
    held = {}
    for layer in range(layers):
        for name, (rows, columns) in LAYER.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            held[f"{start}.lora_A.weight"] = torch.randn(rank, columns, generator=drawn) / columns**0.5
            held[f"{start}.lora_B.weight"] = torch.randn(rows, rank, generator=drawn) * 0.02
    save_file(held, folder / "adapter" / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in LAYER]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": targets,
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return layers


def random(outlines: dict[str, shard.Outline], drawn: torch.Generator) -> Iterator[torch.Tensor]:
    """A tensor for each of the `outlines`, one in memory at a time."""
    for outline in outlines.values():
        yield (torch.randn(outline.shape, generator=drawn) * 0.02).to(torch.bfloat16)


def run(program: str, folder: Path, out: Path) -> Took:
    """Run it in a process of its own, and watch how large that becomes."""
    command = [sys.executable, "-c", program, str(folder / "base"), str(folder / "adapter"), str(out), SHARD]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        most, said = [0, 0], []
        listener = threading.Thread(target=lambda: said.append(process.stderr.read() if process.stderr else ""))
        listener.start()
        while process.poll() is None:
            most = [max(pair) for pair in zip(most, lab.read_memory(process.pid), strict=True)]
            time.sleep(0.01)
        seconds = time.monotonic() - started
        listener.join()
    if process.returncode:
        sys.exit(said[0])
    return Took(seconds, *most)


def error(folder: Path, made: Path, layers: int) -> float:
    """The mean distance from the exact sum, as a share of the mean that correct rounding alone would leave."""
    placed = {}
    for path in made.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            placed |= dict.fromkeys(file.keys(), path)
    off = rounding = 0.0
    with (
        safe_open(folder / "base" / "model.safetensors", "pt") as base,
        safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter,
    ):
        for layer in range(layers):
            for name in LAYER:
                start = f"model.layers.{layer}.{name}"
                first, second = (adapter.get_tensor(f"base_model.model.{start}.lora_{x}.weight").double() for x in "AB")
                exact = base.get_slice(f"{start}.weight")[:16].double() + ALPHA / len(first) * second[:16] @ first
                with safe_open(placed[f"{start}.weight"], "pt") as file:
                    got = file.get_slice(f"{start}.weight")[:16].double()
                off += float((got - exact).abs().mean())
                rounding += float((exact.to(torch.bfloat16).double() - exact).abs().mean())
    return off / rounding


def told(given: argparse.Namespace, size: int, took: dict[str, list[Took]], errors: dict[str, float]) -> list[str]:
    """Return the result in Markdown."""
    seconds = {name: lab.take_median(costs, "seconds") for name, costs in took.items()}
    memory = {name: lab.format_memory(costs) for name, costs in took.items()}
    off = {name: f"{share:.3f}" for name, share in errors.items()}
    rows = [f"| {name} | {seconds[name]:.1f} s | {memory[name]} | {off[name]} |" for name in took]
    ratios = [
        f"{lab.take_median(took['PEFT'], field) / lab.take_median(took['ours'], field):.1f}"
        for field in ("seconds", "resident", "own")
    ]
    of = f"{size / 1e9:.1f} GB of random weights in bfloat16, rank {given.rank} on all linear layers; "
    of += f"medians of {given.rounds} rounds in turns."
    return [
        "# Merging an adapter into its base, beside PEFT",
        "",
        of,
        "",
        "| | time | memory | without mapped files | error / rounding |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        f"| PEFT / ours | {ratios[0]} | {ratios[1]} | {ratios[2]} | |",
        "",
        lab.format_rounds(took, digits=1),
        "",
        f"`python benchmarks/merge.py --gigabytes {given.gigabytes:g} --rank {given.rank} --rounds {given.rounds}` on "
        + lab.machine("torch", "transformers", "peft", "safetensors"),
    ]


if __name__ == "__main__":
    main()
