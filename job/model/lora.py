"""The adapter's shape: which layers of a loaded model get one, found in the model and never in a list of names."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job import config, errors, log

_ATTENTION = ("attn", "attention")
_FIRST, _SECOND = ".lora_A.", ".lora_B."  # the factors, in the order in which the inputs meet them


def adapted(network: PreTrainedModel, lora: config.Lora) -> PeftModel:
    """Freeze `network` and add a LoRA adapter in float32, which `draw` gives its first values.

    Raises `errors.ModelError` if the targets match no layer, or one of the given names does not.
    """
    targets = _targets(network, lora.targets)
    shape = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_rslora=lora.rslora, use_dora=lora.dora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(network, shape)
    in_float32(wrapped)
    trainable, total = wrapped.get_nb_trainable_parameters()
    kinds = Counter(name.rpartition(".")[2] for name in targets)
    log.event(
        "lora.matched",
        f"LoRA on {len(targets)} layers "
        f"({', '.join(f'{kind} x{count}' for kind, count in kinds.items())}): {trainable:,} of {total:,} "
        "parameters are trained",
        layers=len(targets), trainable=trainable, total=total,
    )  # fmt: skip
    return wrapped


def draw(network: nn.Module, seed: int) -> None:
    """Give a fresh adapter its first values: a function of `seed`, the same in every process and on every device.

    A is drawn evenly from -1/sqrt(n) to 1/sqrt(n) for n inputs, as PEFT does it (Kaiming with a = sqrt(5)); B is zero.
    """
    drawn = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        if _FIRST in name:
            values = torch.rand(parameter.shape, generator=drawn) * 2 - 1
            parameter.data.copy_(values / math.sqrt(parameter.shape[1]))
        elif _SECOND in name:
            parameter.data.zero_()


def in_float32(network: nn.Module) -> None:
    """Keep the trained weights in float32, whatever made them smaller.

    TRL casts the adapter of a quantized model to bfloat16 and PEFT loads it as float32, so a resumed run would differ;
    and small updates are lost in bfloat16.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _targets(network: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    head = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [name for name, module in network.named_modules() if _is_linear(module) and module is not head]
    if isinstance(wanted, str):
        chosen = [name for name in linear if wanted != "attention" or any(part in name for part in _ATTENTION)]
        lacking = [] if chosen else [wanted]
    else:
        chosen = [name for name in linear if _matches(name, wanted)]
        lacking = [target for target in wanted if not any(_matches(name, [target]) for name in linear)]
    if lacking:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise errors.ModelError(
            f"lora.targets: {', '.join(lacking)} match{'es' if len(lacking) == 1 else ''} no linear layer "
            f"of the model; it has: {there}"
        )
    return chosen


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes' quantized layers are subclasses of Linear
