"""Bytes that a loaded model takes, counted on its modules before a weight is read; where they fit.

Sizes are in bytes. Nothing here touches a GPU: a machine's choice can be computed on another one.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import (
    compute_module_sizes,
    get_balanced_memory,
    infer_auto_device_map,
)

from job import cluster, errors, log
from job.model import parts, pieces

CONTEXT = 10**9
"""On each GPU for the CUDA context, cuBLAS and fragments, before a process has any of it."""
ROOM = 1.05
"""For each byte of weights: what the allocator rounds up."""
_BLOCK = 64  # weights that share one scale in 4 bits
_SCALE = 4  # a scale in float32
_DOUBLE_QUANT = 1 + 4 / 256  # a scale that is quantized to 8 bits itself, in blocks of 256
_HALF = 2  # a number in 16 bits
_AT_ONCE = 12  # tensors as wide as a layer's widest that exist while it is computed
_PROMPT = 512  # tokens that a model must at least be able to read and answer with
HOST_SHARE = 0.8  # of the free host memory, for weights that do not fit on the GPUs
_VISION = 2 * 10**9  # for the activations of a vision tower, whose images we do not know here


@dataclass(frozen=True)
class LoadSize:
    """What a model takes once it is loaded."""

    numbers: int
    """Weights, whatever each takes."""
    weights: float
    unpacked: float
    """The largest quantized weight in 16 bits, as it is to be quantized and to be used."""
    token: float
    """Activations for each token of a forward pass, as wide as the widest layer."""
    cache: float
    """Keys and values of all layers for each token."""
    vocabulary: int
    """Rows of the embedding: logits for each position."""
    fixed: float
    """For what does not depend on the text."""

    def passing(self, tokens: int) -> float:
        """Return what a forward pass needs besides weights and logits."""
        return tokens * (self.token + self.cache) + 2 * self.unpacked + self.fixed


def outline(
    model_config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    **kwargs: object,
) -> PreTrainedModel:
    """Build the modules on the meta device, with bitsandbytes' layers where it will quantize."""
    network = pieces.skeleton(model_config, dtype, **kwargs)
    if quantization is not None:
        pieces.quantize(network, quantization, dtype)
    return network


def measure(
    network: PreTrainedModel,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
) -> LoadSize:
    """Count an `outline`: tied weights once, and modules as they will really be quantized."""
    packed = {
        id(module.weight): module
        for module in network.modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }
    double = quantization is not None and bool(quantization.bnb_4bit_use_double_quant)
    weights, numbers, largest = 0.0, 0, 0
    for parameter in network.parameters():
        numbers += parameter.numel()
        module = packed.get(id(parameter))
        if module is None:
            weights += parameter.numel() * parameter.element_size()
            continue
        largest = max(largest, parameter.numel())
        weights += _packed_size(parameter, module, double=double)
    text = network.config.get_text_config()
    return LoadSize(
        numbers=numbers,
        weights=weights,
        unpacked=float(largest * _HALF),
        token=float(_AT_ONCE * _widest(network, text) * dtype.itemsize),
        cache=_cache(text, dtype),
        vocabulary=_rows(network),
        fixed=_VISION if parts.sees(network.config) else 0,
    )


def spread(
    network: PreTrainedModel,
    size: LoadSize,
    gpus: Sequence[float],
    host: float = 0,
) -> dict[str, int | str] | None:
    """Return the device of each module if the weights fit into `gpus` and `host`, else None.

    `gpus` are the bytes for weights on each of them, in CUDA's order; what does not fit there goes
    to the host, which transformers allows only for weights that are not quantized. Layers stay
    whole. ``device_map="auto"`` would choose the same with these limits, but too late.
    """
    quantizer = getattr(network, "hf_quantizer", None)
    counted = compute_module_sizes(network, quantizer)[0][""]
    scale = counted / size.weights  # transformers does not count the scales of quantized weights
    rooms: list[tuple[int | str, float]] = [*enumerate(gpus), ("cpu", host)]
    limits: dict[int | str, int | str] = {
        device: max(0, int(room * scale)) for device, room in rooms
    }  # fmt: skip
    whole = set(network._no_split_modules or ())  # noqa: SLF001 - it is told nowhere else
    with _quiet(
        "accelerate.utils.modeling",
    ):  # it warns of GPUs that the machine that computes this has not
        balanced = get_balanced_memory(network, limits, whole, hf_quantizer=quantizer)
        found: dict[str, int | str] = infer_auto_device_map(
            network,
            balanced,
            whole,
            hf_quantizer=quantizer,
        )
    return None if "disk" in found.values() else dict(found)


def place(
    network: PreTrainedModel,
    size: LoadSize,
    quantization: str,
    free: Sequence[int],
    host: int | None = None,
) -> dict[str, int | str]:
    """Return the device of each module of a model that is to answer, on GPUs with `free` bytes.

    What does not fit there goes to the host, of which `host` bytes are free, unless quantized.
    Raises `errors.ConfigError` with both sizes if that is not enough.
    """
    besides = size.passing(_PROMPT) + CONTEXT
    need = size.weights * ROOM + besides
    largest = max(range(len(free)), key=free.__getitem__)
    if need <= free[largest]:
        return {"": largest}
    limits = [(each - besides) / ROOM for each in free]
    room = cluster.free_memory() if host is None else host
    if quantization != "none":
        room = 0
    found = spread(network, size, limits, room * HOST_SHARE)
    if found is None or set(found.values()) == {"cpu"}:
        raise errors.ConfigError(too_small(need, quantization, free))
    if "cpu" in found.values():
        log.warn(
            "model.offloaded",
            f"the model needs about {log.size(need)} in 16 bits, and {_describe(free)} free: "
            f"{log.size(offloaded(network, found))} of weights stay in host memory and are sent to "
            "the GPU for each token, which is slow; --quantization nf4 takes a quarter of it",
        )
    return found


def check_packed(base: Path, scheme: str, free: int) -> None:
    """Raise `errors.ConfigError` if a base that comes quantized does not fit on one GPU."""
    need = sum(path.stat().st_size for path in pieces.weight_files(base)) * ROOM + CONTEXT
    if need > free:
        raise errors.ConfigError(too_small(need, scheme, [free]))


def too_small(need: float, quantization: str, free: Sequence[int]) -> str:
    """Return what to say and to do where a model does not fit on the GPUs."""
    smaller = "use --quantization nf4, " if quantization in ("none", "int8") else "use "
    return (
        f"{_describe(free)} free, and the model needs about {log.size(need)} ({quantization}): "
        f"{smaller}a larger GPU, or set CUDA_VISIBLE_DEVICES to nothing to answer on the CPU"
    )


def _describe(free: Sequence[int]) -> str:
    if len(free) == 1:
        return f"the GPU has {log.size(free[0])}"
    return f"the {len(free)} GPUs together have {log.size(sum(free))}"


def offloaded(network: PreTrainedModel, device_map: Mapping[str, int | str]) -> float:
    """Return the bytes of the modules that `device_map` leaves in host memory."""
    sizes = compute_module_sizes(network)[0]
    return float(sum(sizes[name] for name, device in device_map.items() if device == "cpu"))


def _rows(network: PreTrainedModel) -> int:
    weight = network.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def _packed_size(weight: nn.Parameter, module: nn.Module, *, double: bool) -> float:
    if isinstance(module, bnb.nn.Linear8bitLt):
        return weight.numel() + weight.shape[0] * _SCALE
    scale = _DOUBLE_QUANT if double else _SCALE
    return weight.numel() * (0.5 + scale / _BLOCK)


def _widest(network: PreTrainedModel, text: PretrainedConfig) -> int:
    """Return the numbers of the widest activation of one token, logits aside."""
    hidden = parts.largest(getattr(text, "hidden_size", None))
    wide = parts.largest(getattr(text, "intermediate_size", None)) or 4 * hidden
    experts = parts.largest(getattr(text, "num_experts_per_tok", None))
    expert = parts.largest(getattr(text, "moe_intermediate_size", None)) or wide
    found = max(hidden, wide, experts * expert)
    return found or max(parameter.shape[-1] for parameter in network.parameters())


def _cache(text: PretrainedConfig, dtype: torch.dtype) -> float:
    heads = parts.largest(getattr(text, "num_attention_heads", None))
    groups = parts.largest(getattr(text, "num_key_value_heads", None)) or heads
    hidden = parts.largest(getattr(text, "hidden_size", None))
    head = parts.largest(getattr(text, "head_dim", None)) or hidden // max(1, heads)
    layers = parts.largest(getattr(text, "num_hidden_layers", None))
    return float(2 * layers * groups * head * dtype.itemsize)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
