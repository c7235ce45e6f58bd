"""How the processes share the model: chosen by what it needs and what a GPU has, both known before it is loaded."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import config, errors, log
from job.inputs import Team
from job.model import prequantized

_USABLE = 0.9  # of a GPU's memory; the rest goes to CUDA itself and to what lies between the tensors
_BITS = {"nf4": (4.0, 0.5), "fp4": (4.0, 0.5), "int8": (8.0, 0.1), "none": (16.0, 0.0)}
# of each weight of a linear layer, and of the constants that it is unpacked with; the latter with double quantization:
_DOUBLE_QUANT_BITS = 0.127  # QLoRA, arXiv 2305.14314, section 3
_OPTIMIZER_BYTES = {"adamw_torch": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
_TRAINED_BYTES = 8  # a weight of the adapter and its gradient, in float32
_HALF = 2  # bytes of a number in bfloat16 or float16
_AT_ONCE = 12  # tensors of the size of a layer's widest activation that are in memory while it is computed
_ENDS = ("embed", "lm_head", "wte", "wpe")


_WHOLE = ("ddp", "zero1", "zero2")  # have the whole base on each GPU


@dataclass(frozen=True)
class Need:
    """Estimated bytes of what lies on a GPU."""

    base: float
    """The frozen base, which can be shared out."""
    constants: float
    """What quantized weights are unpacked with; every GPU has all of them."""
    layer: float
    """One layer of the base: two are whole at a time where it is shared out."""
    ends: float
    """Its embeddings and its head, which are whole then while a step is computed."""
    adapter: float
    """What is trained, with gradients and optimizer."""
    activations: float

    def on_each(self, shares: int) -> float:
        """All of it for each of `shares` GPUs that share the base."""
        gathered = 2 * self.layer + self.ends if shares > 1 else 0.0
        return self.base / shares + self.constants + gathered + self.adapter + self.activations


def choose(settings: config.Config, base: Path, team: Team, memory: int | None) -> str:
    """The strategy for `team`, and a line that says why where the config says auto.

    `memory` is that of the smallest GPU in bytes, None on a CPU. Raises `errors.ConfigError` if the frozen base cannot
    be where the strategy wants it.
    """
    scheme = prequantized.recognise(_told(base), str(base))
    wanted = "ddp" if scheme else settings.distributed.strategy
    if memory is None:
        return "ddp" if wanted == "auto" else wanted
    need = estimate(settings, base)
    alone, shared = need.on_each(1), need.on_each(team.size)
    if scheme and need.base + need.constants > memory:
        raise errors.ConfigError(
            f"the base, which is quantized already ({scheme}), takes {log.size(need.base + need.constants)}, and each "
            f"GPU of {log.size(memory)} needs all of it: use larger GPUs, or the original weights and strategy fsdp"
        )
    chosen = wanted
    if wanted == "auto":
        chosen = "ddp" if alone <= memory * _USABLE or team.size == 1 else "fsdp"
        log.event(
            "launch.strategy",
            f"{team.size} GPU(s) of {log.size(memory)}: a whole copy of the model on each takes about "
            f"{log.size(alone)}, a share of it {log.size(shared)}, so the strategy is {chosen}",
            strategy=chosen,
            memory=memory,
        )
    _refuse(settings, chosen, team, need.base + need.constants, memory)
    each = alone if chosen in _WHOLE else shared
    if each > memory * _USABLE and not settings.distributed.offload:
        log.warn(
            "launch.tight",
            f"about {log.size(each)} for each GPU of {log.size(memory)} may be too much: lower train.micro_batch_size "
            "(the result stays the same) or data.max_length",
        )
    return chosen


def _refuse(settings: config.Config, chosen: str, team: Team, base: float, memory: int) -> None:
    """Raise `errors.ConfigError` if not even the base finds its place."""
    quantization = settings.model.quantization
    takes = f"the frozen base takes about {log.size(base)} with model.quantization {quantization}"
    if chosen in _WHOLE and base > memory:
        raise errors.ConfigError(
            f"{takes}, and {chosen} has all of it on each GPU of {log.size(memory)}: use nf4, larger GPUs, or several "
            "and distributed.strategy fsdp"
        )
    if chosen == "zero3" and quantization != "none" and base > memory:
        raise errors.ConfigError(
            f"{takes}, and zero3 shares quantized weights out only when all of them are on each GPU of "
            f"{log.size(memory)}: use distributed.strategy fsdp, which does it while it loads them"
        )
    if chosen == "fsdp" and settings.lora.dora and base > memory:
        raise errors.ConfigError(
            f"{takes}, and lora.dora needs all of it on each GPU of {log.size(memory)} to begin with: leave dora out"
        )
    if not settings.distributed.offload and base / team.size > memory:
        raise errors.ConfigError(
            f"{takes}, and {team.size} GPUs of {log.size(memory)} cannot hold it together: use more of them, nf4, or "
            "distributed.offload"
        )


def estimate(settings: config.Config, base: Path) -> Need:
    """What training `base` needs, from the shapes that its files name; right within some tenths."""
    told = _told(base)
    scheme = prequantized.recognise(told, str(base))
    text = told.get("text_config", told)
    layers, hidden = int(text.get("num_hidden_layers", 1)), int(text.get("hidden_size", 1))
    wide, words = int(text.get("intermediate_size", 4 * hidden)), int(text.get("vocab_size", 1))
    bits, constant = _BITS[settings.model.quantization]
    if constant and settings.model.double_quant:
        constant = _DOUBLE_QUANT_BITS
    inside, constants, ends, trained = 0.0, 0.0, 0.0, 0
    for name, shape in _shapes(base).items():
        count = math.prod(shape)
        if any(part in name for part in _ENDS):
            ends += count * _HALF
        elif scheme and name.endswith(".qweight"):
            inside += count * 4
            trained += settings.lora.r * sum(scheme.unpacked(*shape))
        elif scheme and name.endswith((".scales", ".qzeros")):
            constants += count * (_HALF if name.endswith(".scales") else 4)
        elif len(shape) == 2:  # noqa: PLR2004 - a matrix
            inside += count * (_HALF if scheme else bits / 8)
            constants += count * (0 if scheme else constant / 8)
            trained += settings.lora.r * sum(shape)
        else:
            inside += count * _HALF
    tokens = settings.train.micro_batch_size * settings.data.max_length
    kept = layers if settings.train.gradient_checkpointing else layers * _AT_ONCE
    activations = tokens * _HALF * (kept * hidden + _AT_ONCE * max(wide, hidden) + 2 * words)
    adapter = trained * (_TRAINED_BYTES + _OPTIMIZER_BYTES[settings.train.optimizer])
    return Need(inside + ends, constants, inside / layers, ends, adapter, activations)


def _told(base: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return told


def _shapes(base: Path) -> dict[str, list[int]]:
    """The shapes of all tensors, from the headers of the safetensors files: a length in 8 bytes, then JSON."""
    found: dict[str, list[int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: told["shape"] for name, told in header.items() if name != "__metadata__"}
    return found
