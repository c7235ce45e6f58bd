"""What there is memory and time for."""

from dataclasses import dataclass
from pathlib import Path

from job import cluster, config, log
from job.model.shard import Shard

_SHARE = 0.1  # of the time for what is computed; the rest is for starting, and loading
_ROOM, _SPARE = 1.2, 2 * 10**9  # for each byte of weights, and bytes besides
_LOGITS = 3 * 2048 * 4  # bytes for each word: logits at all places of the longest example, and what is made of them
_USABLE = 0.9  # of a GPU's memory
# Of the slowest machines: numbers that a GPU or a core computes with in a second, and bytes that it reads.
_FLOPS, _READ = {"cuda": 3e13, "cpu": 2e10}, {"cuda": 1e12, "cpu": 1e10}


@dataclass(frozen=True)
class Means:
    """What a machine has for it."""

    device: str
    dtype: str
    read: int
    """Tokens of examples that every model reads."""
    answered: int
    """Tokens of each answer."""


def of(base: Path, wanted: config.Examine, gpus: tuple[str, ...], models: int) -> Means | None:
    """The best that so many `models` of the size of `base` can be looked at with, on the `gpus` if there are any.

    None if there is not enough memory, which is said.
    """
    shards = [Shard(path) for path in base.glob("*.safetensors")]
    outlines = [outline for shard in shards for outline in shard.tensors.values()]
    numbers = sum(outline.rows * outline.row for outline in outlines)
    spare = _SPARE + _LOGITS * max(outline.rows for outline in outlines)  # the embedding has most
    free, there = float(cluster.free_memory()), len(gpus) * (cluster.memory(gpus) or 0) * _USABLE
    for device, room in (("cuda", there), ("cpu", free)):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            if numbers * size * _ROOM + spare <= room:
                seconds = wanted.minutes * 60 * _SHARE / models
                cores = cluster.cpus() if device == "cpu" else 1
                read = seconds * _FLOPS[device] * cores / (2 * numbers)
                answered = seconds * _READ[device] / (numbers * size) / max(1, wanted.prompts)
                return Means(device, dtype, int(read), max(1, min(int(answered), wanted.tokens)))
    log.warn(
        "examine.memory",
        f"the result is not opened on this machine: {numbers / 1e9:.1f} billion weights take "
        f"{log.size(numbers * 2 * _ROOM + spare)} of memory, and {log.size(max(free, there))} are free",
    )
    return None
