"""The adapter's shape: which layers of a loaded model get one, found in the model and never in a list of names."""

import copy
import math
from collections import Counter
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job import config, errors, log
from job.model import parts
from job.model.footprint import describe_unquantized
from job.model.prequantized.linear import QuantizedLinear

_ATTENTION = ("attn", "attention")
_WRAPPED = "base_model.model."  # what PEFT adds to a name
_QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, QuantizedLinear)
_SHOWN = 8  # names in one line
_FIRST, _SECOND = ".lora_A.", ".lora_B."  # the factors, in the order in which the inputs meet them


def adapted(network: PreTrainedModel, lora: config.Lora) -> PeftModel:
    """Freeze `network` and add a LoRA adapter in float32, which `draw` gives its first values.

    Raises `errors.ModelError` if the targets match no layer, one of the given names does not, or PEFT refuses them.
    """
    _tell_unquantized(network)
    targets = find_targets(network, lora.targets)
    bare = _bare(network, targets, lora.targets) if lora.targets in ("auto", "all-linear") else Counter()
    shape = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_rslora=lora.rslora, use_dora=lora.dora, bias="none", task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(network.get_submodule(name), Conv1D) for name in targets),
    )  # fmt: skip
    try:
        wrapped = get_peft_model(network, shape)
    except (ValueError, TypeError, NotImplementedError) as e:
        raise errors.ModelError(f"lora.targets: PEFT cannot add an adapter to these layers: {e}") from e
    given = {name.removeprefix(_WRAPPED) for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    if given != set(targets):
        raise errors.ModelError(
            f"lora.targets: PEFT added the adapter to other layers than asked ({_some(sorted(given ^ set(targets)))}): "
            "name other layers"
        )
    in_float32(wrapped)
    _tell(wrapped, targets, bare)
    return wrapped


def _tell(wrapped: PeftModel, targets: Sequence[str], bare: Counter[str]) -> None:
    """Say which layers get how many parameters, and which weights of the model get none."""
    trainable, total = wrapped.get_nb_trainable_parameters()
    total += sum(m.in_features * m.out_features for m in wrapped.modules() if isinstance(m, QuantizedLinear))
    layers = Counter(kind_of(name) for name in targets)
    parameters: Counter[str] = Counter()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameters[kind_of(name.partition(".lora_")[0])] += parameter.numel()
    each = ", ".join(f"{kind} x{count} {parameters[kind]:,}" for kind, count in layers.items())
    log.event(
        "lora.matched",
        f"LoRA on {len(targets)} layers ({each}): {trainable:,} of {total:,} parameters are trained",
        layers=len(targets), trainable=trainable, total=total, kinds=dict(parameters),
    )  # fmt: skip
    if bare:
        kinds = _some([f"{kind} ({count:,})" for kind, count in bare.most_common()])
        log.warn(
            "lora.bare",
            f"no adapter for {kinds}: {sum(bare.values()):,} weights stay as they are, which are no linear layers of "
            "their own, as the experts of a mixture, or layers that PEFT takes for those",
            kinds=dict(bare),
        )


def _tell_unquantized(network: PreTrainedModel) -> None:
    """Log how many weights of a quantized base stay in 16 bits.

    Those of experts do: transformers has all of a layer in one tensor, which bitsandbytes does not
    quantize.
    """
    packed, plain, seen = 0, Counter[str](), set[int]()
    for name, module in network.named_modules():
        if isinstance(module, _QUANTIZED):
            packed += module.in_features * module.out_features
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                kind = kind_of(name) if leaf == "weight" else f"{kind_of(name)}.{leaf}"
                # DeepSpeed's, of which this process may hold a part
                plain[kind] += getattr(parameter, "ds_numel", parameter.numel())
    if packed:
        message = describe_unquantized(packed + sum(plain.values()), plain)
        log.event("model.unquantized", message, quantized=packed, kinds=dict(plain))


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


def without_dropout(network: nn.Module) -> None:
    """Switch off every dropout, the base's too, to compare results with the adapter and without.

    Those of the adapter are removed: where one is left, PEFT's DoRA computes the base's result
    twice and keeps its weights until the backward pass (peft/tuners/lora/variants.py).
    """
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.update({name: nn.Identity() for name in module.lora_dropout})
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def in_float32(network: nn.Module) -> None:
    """Keep the trained weights in float32, whatever made them smaller.

    TRL casts the adapter of a quantized model to bfloat16 and PEFT loads it as float32, so a resumed run would differ;
    and small updates are lost in bfloat16.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def find_targets(network: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    """Return the names of the layers that get an adapter.

    Raises `errors.ModelError` if `wanted` does not fit the model.
    """
    linear, misread = _linear(network)
    inside = [name for name in linear if name.startswith(parts.language(network))]
    if isinstance(wanted, str):
        among = linear if wanted == "all-linear" else inside
        chosen = [name for name in among if wanted != "attention" or any(part in name for part in _ATTENTION)]
        lacking = [] if chosen else [wanted]
    else:
        chosen = [name for name in linear if name in wanted or (name in inside and _matches(name, wanted))]
        lacking = [target for target in wanted if not any(_matches(name, [target]) for name in chosen)]
    if strange := misread.intersection(map(kind_of, lacking)):
        raise errors.ModelError(
            f"lora.targets: PEFT takes layers called {', '.join(sorted(strange))} for others in this model, and would "
            "put their adapter elsewhere: name other layers"
        )
    if lacking:
        there = ", ".join(sorted({kind_of(name) for name in inside})) or "none"
        raise errors.ModelError(
            f"lora.targets: {', '.join(lacking)} match{'es' if len(lacking) == 1 else ''} no linear layer "
            f"of the model; it has: {there}"
        )
    return chosen


def _linear(network: PreTrainedModel) -> tuple[list[str], set[str]]:
    """The names of all linear layers but the head, and the kinds left out, which PEFT takes for something else."""
    head = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in network.named_modules() if _is_linear(module) and module is not head]
    misread = {kind for kind in {kind_of(name) for name in names} if _misread(network, kind)}
    return [name for name in names if kind_of(name) not in misread], misread


def _misread(network: PreTrainedModel, kind: str) -> bool:
    """Whether PEFT puts the adapter of layers called `kind` elsewhere, here and wherever the adapter is loaded.

    In some mixtures of experts it takes dense layers for the experts, which once had these names; in Mamba the output
    projection is computed without the layer (peft 0.21, utils/transformers_weight_conversion.py, tuners_utils.py).
    """
    probe = LoraConfig(target_modules=[kind])
    try:
        convert_peft_config_for_transformers(probe, network, None)
        _check_lora_target_modules_mamba(probe, network, kind)
    except ValueError:
        return True
    return kind not in (probe.target_modules or ())


def _bare(network: PreTrainedModel, targets: Sequence[str], wanted: object) -> Counter[str]:
    """How many weights the layers hold, by kind, that get no adapter: matrices outside of `targets` and embeddings."""
    head, found, chosen = network.get_output_embeddings(), Counter[str](), set(targets)  # type: ignore[no-untyped-call]
    inside = parts.language(network)
    for name, module in network.named_modules():
        if name in chosen or module is head or isinstance(module, nn.Embedding):
            continue
        if wanted == "auto" and not name.startswith(inside):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed keeps a part, and what it is of
            if isinstance(module, nn.Linear) and leaf == "weight":
                shape = (module.out_features, module.in_features)  # packed over 4 bits
            if len(shape) > 1:
                found[kind_of(name) if leaf == "weight" else f"{kind_of(name)}.{leaf}"] += math.prod(shape)
    return found


def kind_of(name: str) -> str:
    """Return the last part of a module's name, which all modules of its kind share."""
    return name.rpartition(".")[2]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or isinstance(module, _QUANTIZED):
        return isinstance(module, nn.Linear | Conv1D)
    return type(module) is nn.Linear or _maps(module)


def _maps(module: nn.Linear) -> bool:
    """Whether a subclass of Linear gives what Linear does: a router returns scores besides."""
    tried = copy.copy(module)  # on the device without memory: under ZeRO-3 each process has a part of the weights
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    tried._parameters = {  # noqa: SLF001 - torch has no other way to exchange them
        name: None if held is None else nn.Parameter(torch.empty(shapes[name], device="meta"), requires_grad=False)
        for name, held in module._parameters.items()  # noqa: SLF001
    }
    made = tried(torch.empty(1, module.in_features, device="meta"))
    return isinstance(made, torch.Tensor) and made.shape == (1, module.out_features)
