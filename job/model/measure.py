"""Sizing a base and its adapter up without weights, from the modules that training would make."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job import config, errors
from job.model import footprint, lora, parts, pieces, weights
from job.model.footprint import Footprint
from job.model.prequantized import PACKED, Scheme

# Of bitsandbytes 0.50, functional.py: weights that share a constant, constants that share one of
# their own when they are quantized too, and the bytes of the tables that both are looked up in.
_BLOCK, _NESTED_BLOCK, _TABLE, _NESTED_TABLE = 64, 256, 16 * 4, 256 * 4
_FLOAT = 4  # bytes
_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}  # of the dtypes of safetensors
_ORDER = "g_idx"  # a number for each input: less than a thousandth of a layer, and mostly dropped
_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
_UNKNOWN = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # of a size that cannot be read
_UNUSABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    AttributeError,
    TypeError,
)  # what transformers raises


def main(folder: str) -> None:
    """Write the footprint of the model whose config.json is in `folder`, or why it has none."""
    place = Path(folder)
    tree = json.loads((place / footprint.SETTINGS).read_text(encoding="utf-8"))
    try:
        footprint.write(place, measure(place, config.check(tree, config.Places("the job", {}))))
    except errors.PermanentError as e:
        footprint.write(place, e)
    except _UNKNOWN as e:  # a config in a form that nobody has seen is no reason to refuse a run
        footprint.write(place, f"{type(e).__name__}: {e}")


def measure(base: Path, settings: config.Config) -> Footprint:
    """Return the sizes of the model whose config.json is in `base`, as a GPU will hold it.

    Raises `errors.ModelError` if transformers cannot make it, or `lora.targets` does not fit it.
    """
    wanted = settings.model.compute_dtype
    dtype: torch.dtype = torch.bfloat16 if wanted == "auto" else getattr(torch, wanted)
    described, scheme = weights.describe(base, settings.model)
    try:
        network = pieces.skeleton(described, dtype, trust_remote_code=settings.model.trust_remote_code)
        quantized = frozenset() if scheme else weights.quantized(described, settings.model, dtype)
    except _UNUSABLE as e:
        raise errors.ModelError(f"model.base: transformers cannot make a model of this config.json: {e}") from e
    sizes = _measure_modules(network, quantized, settings.model, dtype.itemsize)
    if scheme:
        sizes = _measure_files(base, sizes, scheme, dtype.itemsize)
    targets = lora.find_targets(network, settings.lora.targets)
    shapes = [_linear_shape(network.get_submodule(name)) for name in targets]
    trained = sum(settings.lora.r * (inputs + outputs) for inputs, outputs in shapes)
    if settings.lora.dora:
        trained += sum(outputs for _, outputs in shapes)
    text = described.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", None) or len(sizes.blocks) or 1)
    hidden = int(getattr(text, "hidden_size", None) or _linear_shape(network.get_input_embeddings())[0])
    wide, experts = _active_width(text, hidden)
    largest = max(
        shapes,
        key=lambda shape: footprint.count_dora_matrices(shape[0], shape[1], dtype.itemsize),
        default=(0, 0),
    )
    return Footprint(
        weights=sizes.weights, unquantized=dict(sizes.unquantized) if sizes.largest else {}, scheme=str(scheme or ""),
        blocks=sum(sizes.blocks.values()), block=max(sizes.blocks.values(), default=0), ends=sizes.ends,
        constants=sizes.constants, unpacked=sizes.largest * dtype.itemsize, trained=trained,
        inputs=sum(inputs for inputs, _ in shapes) / layers,
        outputs=sum(outputs for _, outputs in shapes) / layers,
        adapted=sum(inputs * outputs for inputs, outputs in shapes) / layers,
        dora_inputs=largest[0], dora_outputs=largest[1],
        layers=layers, hidden=hidden, wide=wide, experts=experts,
        vocabulary=int(getattr(text, "vocab_size", None) or 1), width=dtype.itemsize,
    )  # fmt: skip


@dataclass
class _Sizes:
    """Sums over the modules of a model, in bytes but for those that count weights."""

    weights: int = 0
    unquantized: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    """By the name of the decoder layer."""
    ends: int = 0
    constants: int = 0
    largest: int = 0
    """Weights of the largest quantized layer."""


def _measure_modules(
    network: PreTrainedModel, quantized: Collection[str], settings: config.Model, width: int
) -> _Sizes:
    """Add up what each module holds: weights that bitsandbytes packs, `width` bytes for others."""
    sizes, homes = _Sizes(), _find_blocks(network)
    each = 1 if settings.quantization == "int8" else 0.5
    for name, leaf, parameter in _parameters(network):
        count = parameter.numel()
        packed = name in quantized and leaf == "weight"
        size = math.ceil(count * each) if packed else count * width
        home = next((block for block in homes if f"{name}.".startswith(f"{block}.")), None)
        sizes.weights += count
        if home is None:
            sizes.ends += size
        else:
            sizes.blocks[home] += size
        if packed:
            outputs = _linear_shape(network.get_submodule(name))[1]
            sizes.constants += _constants(count, outputs, settings)
            sizes.largest = max(sizes.largest, count)
        else:
            sizes.unquantized[_kind(name, leaf)] += count
    return sizes


def _measure_files(base: Path, plain: _Sizes, scheme: Scheme, width: int) -> _Sizes:
    """Return the sizes of a base that comes quantized: linear layers are as large as in its files.

    `plain` are those of the same model unpacked. What the files hold besides is loaded in the
    compute dtype.
    """
    tensors: Mapping[str, Any] = json.loads((base / footprint.TENSORS).read_text(encoding="utf-8"))
    sizes = _Sizes(weights=plain.weights, ends=plain.ends)
    rest = 0
    for name, (dtype, shape) in tensors.items():
        stem, _, leaf = name.rpartition(".")
        count = math.prod(shape)
        if leaf == PACKED[0]:
            sizes.blocks["all"] += count * _BYTES[dtype]
            sizes.largest = max(sizes.largest, math.prod(scheme.unpacked(*shape)))
        elif leaf == _ORDER:
            continue
        elif leaf in PACKED:
            sizes.constants += count * _BYTES[dtype]
        else:
            rest += count
            sizes.unquantized[_kind(stem, leaf)] += count
    sizes.blocks["all"] += max(0, rest * width - sizes.ends)
    return sizes


def _parameters(network: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield module name, own name and parameter, each parameter once however many names it has."""
    seen: set[int] = set()
    for name, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, leaf, parameter


def _find_blocks(network: PreTrainedModel) -> list[str]:
    """Return the names of the modules that FSDP shards one by one, as in `train.placement`."""
    classes = network._no_split_modules or ()  # noqa: SLF001 - transformers' own name for them
    return [name for name, module in network.named_modules() if type(module).__name__ in classes]


def _constants(count: int, outputs: int, settings: config.Model) -> int:
    """Return the bytes that bitsandbytes keeps to unpack a layer of `count` weights."""
    if settings.quantization == "int8":
        return outputs * _FLOAT
    scales = math.ceil(count / _BLOCK)
    if not settings.double_quant:
        return scales * _FLOAT + _TABLE
    return scales + math.ceil(scales / _NESTED_BLOCK) * _FLOAT + _FLOAT + _NESTED_TABLE + _TABLE


def _kind(module: str, leaf: str) -> str:
    return lora.kind_of(module) if leaf == "weight" else f"{lora.kind_of(module)}.{leaf}"


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a linear layer has."""
    rows, columns = cast("nn.Parameter", layer.weight).shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def _active_width(text: PretrainedConfig, hidden: int) -> tuple[int, int]:
    """Return the width inside the MLP that a token passes through, and how many experts it is."""
    dense = parts.largest(getattr(text, "intermediate_size", None)) or 4 * hidden
    experts = max(parts.largest(getattr(text, name, None)) for name in _CHOSEN)
    if not experts:
        return dense, 0
    width = parts.largest(getattr(text, "moe_intermediate_size", None)) or dense
    shared = parts.largest(getattr(text, "shared_expert_intermediate_size", None))
    shared = shared or parts.largest(getattr(text, "n_shared_experts", None)) * width
    return max(dense, experts * width + shared), experts
