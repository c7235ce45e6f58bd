"""How large the GPU checks are, and the rows that a part keeps while it runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRESS = "progress.jsonl"  # in the work folder: rows of a part that is not done yet


@dataclass(frozen=True)
class Scale:
    """How large the checks are: shapes of a 7B model on a GPU, seconds of work on a CPU."""

    device: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    """Of the model whose speed and memory are measured; with `few_layers` it gives those of any number of layers."""
    few_layers: int
    """Of the models whose bits are compared."""
    preset_layers: int
    """Of the model that a preset trains."""
    lengths: tuple[int, ...]
    """Tokens of the sequences."""
    micro_batches: tuple[int, ...]
    steps: int
    stop_at: int
    """The step after which the run is stopped."""


SCALES = {  # on the GPU the shape of Qwen2.5-7B
    "cuda": Scale("cuda", 3584, 18944, 28, 4, 152064, 8, 4, 28, (512, 2048), (2, 8, 16), 30, 12),
    "cpu": Scale("cpu", 64, 128, 4, 2, 512, 2, 2, 3, (48, 160), (1, 2), 6, 2),
}


def keep_row(work: Path, row: dict[str, Any]) -> None:
    """Write a row down at once, so that it is kept if the part is killed before it ends."""
    with (work / PROGRESS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
