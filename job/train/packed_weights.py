"""Packed 4-bit weights keep their bytes while they are sharded: checked before the first step.

Two 4-bit weights are one byte, and any 16 bits of them may look like a NaN. CUDA's kernel behind
`torch._foreach_copy_`, which FSDP2 gathers with, converts bfloat16 and float16 to float32 and back, and that
rewrites NaNs (pytorch issue 159333, bitsandbytes issue 1945). So packed weights are stored as bytes, and this
module refuses to train if any of them still changes.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from job import errors, log

_PATTERNS = 2**16  # of the bits of a bfloat16 or a float16


@dataclass(frozen=True)
class PackedBlock:
    """SHA-256 of each packed weight of one block of the base, before it was sharded."""

    name: str
    """The block's name in the model."""
    digests: Mapping[str, str]
    """By the weight's name in the block."""


def record_packed_block(name: str, block: nn.Module) -> PackedBlock | None:
    """Return the digests of the packed weights in `block`, or None if it has none."""
    digests = {
        key: _digest(parameter)
        for key, parameter in block.named_parameters()
        if isinstance(parameter, bnb.nn.Params4bit)
    }
    return PackedBlock(name, digests) if digests else None


def find_changed_patterns(dtype: torch.dtype, device: torch.device) -> int:
    """Return how many of all 65,536 patterns of 16 bits the kernels that FSDP2 gathers with change.

    `dtype` is the one in which packed weights are stored.
    """
    patterns = torch.arange(_PATTERNS, dtype=torch.int32).to(torch.uint16).to(device)
    source = patterns.view(dtype)
    gathered, unpacked = torch.empty_like(source), torch.empty_like(source)
    torch._foreach_copy_([gathered], [source])
    torch.split_with_sizes_copy(gathered.view(1, -1), [gathered.numel()], 1, out=[unpacked.view(1, -1)])
    return int((unpacked.view(torch.uint16).int() != patterns.int()).sum())


class PackedWeightsCheck(TrainerCallback):
    """Raises `errors.PermanentError` before the first step if sharding changed packed weights."""

    def __init__(self, trainer: Trainer, block: PackedBlock) -> None:
        self._trainer, self._block = trainer, block

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        model: Any = self._trainer.model
        check_packed_block(model.get_submodule(self._block.name), self._block)


def check_packed_block(block: nn.Module, recorded: PackedBlock) -> None:
    """Gather the sharded `block` and compare its packed weights with those that were `recorded`.

    A collective: all processes that share the block call it. Raises `errors.PermanentError` if a byte differs.
    """
    with _gathered(block, recorded.digests):
        weights = dict(block.named_parameters())
        changed = [name for name, digest in recorded.digests.items() if _digest(weights[name]) != digest]
        stored = next(weights[name] for name in recorded.digests)
        patterns = find_changed_patterns(stored.dtype, stored.device)
    if changed or patterns:
        raise errors.PermanentError(
            f"torch {torch.__version__} changes 4-bit weights while it gathers them: {len(changed)} of "
            f"{len(recorded.digests)} weights of {recorded.name} and {patterns} of {_PATTERNS} bit patterns "
            "differ. Training would use wrong weights. Set distributed.strategy to ddp, or model.quantization to "
            "none, or install the torch version that requirements.txt names"
        )
    log.event(
        "train.packed",
        f"gathered 4-bit weights are the bytes that were quantized ({recorded.name}, all bit patterns)",
        block=recorded.name,
        weights=len(recorded.digests),
    )


@contextlib.contextmanager
def _gathered(block: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
    """Let this process have the whole weights called `names` of `block` for the length of the `with`."""
    if isinstance(block, FSDPModule):
        block.unshard()
        try:
            yield
        finally:
            block.reshard()
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([block.get_parameter(name) for name in names]):
        yield


def _digest(parameter: torch.Tensor) -> str:
    # A copy, for memory that numpy has looked at cannot be given back, as FSDP2 does after a gather.
    content = parameter.detach().contiguous().view(torch.uint8).to("cpu", copy=True)
    return hashlib.sha256(content.numpy().data).hexdigest()
