"""The base model: quantized and frozen to train on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from job import config, errors, log
from job.model import load_size, parts, pieces, prequantized
from job.model.pieces import Pieces
from job.model.prequantized import Scheme, linear

_BLOCK = 64  # a side of the tiles in which 4-bit weights are repacked
# What transformers raises for a model that it cannot load.
# Parts of its RuntimeErrors about weights that are not those of the config.
_MISFITS = ("automatic conversion of the weights", "ignore_mismatched_sizes")
_UNUSABLE = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError)


def compute_dtype(wanted: str) -> torch.dtype:
    """The number format of activations: as given, or the best that this machine has hardware for."""
    if wanted != "auto":
        return cast("torch.dtype", getattr(torch, wanted))
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def for_training(base: Path, settings: config.Model) -> PreTrainedModel:
    """Load the model at `base` as `settings` ask: quantized, on this process's GPU (or the CPU).

    One that comes quantized stays as it is.

    Raises `errors.ModelError` if transformers cannot load it.
    """
    dtype = compute_dtype(settings.compute_dtype)
    described, scheme = describe(base, settings)
    if scheme:
        log.event(
            "model.prequantized",
            f"the base is quantized already ({scheme}) and stays so, whatever model.quantization says",
        )
        return _prequantized(base, described, scheme, settings, dtype, torch.device(_device()))
    quantized = _quantization(settings, described, dtype)
    loaded = _load(
        base, described, settings, dtype=dtype, quantization_config=quantized,
        device_map=None if is_deepspeed_zero3_enabled() else {"": _device()},  # type: ignore[no-untyped-call]
    )  # fmt: skip
    _keep_plain(_packed(loaded))
    return loaded


def for_answering(base: Path, settings: config.Model) -> PreTrainedModel:
    """Load the same to answer with, not to train: on all GPUs together, or on the CPU if there is none.

    Weights in 16 bits that the GPUs do not hold are in host memory. Raises `errors.ConfigError` if the GPUs are too
    small for quantized ones, of which transformers leaves none there, and `errors.ModelError` if it cannot load them.
    """
    described, scheme = describe(base, settings)
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    if scheme:
        if free:
            load_size.check_packed(base, str(scheme), free[torch.cuda.current_device()])
        return for_training(base, settings)
    dtype = compute_dtype(settings.compute_dtype)
    how = _quantization(settings, described, dtype)
    where: dict[str, int | str] = {"": "cpu"}
    if free:
        network = load_size.outline(described, how, dtype, trust_remote_code=settings.trust_remote_code)
        where = load_size.place(network, load_size.measure(network, how, dtype), settings.quantization, free)
    loaded = _load(base, described, settings, dtype=dtype, quantization_config=how, device_map=where)
    odd = (layer for layer in _packed(loaded) if layer.in_features % _BLOCK or layer.out_features % _BLOCK)
    _keep_plain(odd)  # which the kernels for AVX512-BF16 cannot compute
    return loaded


def outline(base: Path, settings: config.Model) -> tuple[PreTrainedModel, Pieces] | None:
    """The same without its weights, and where they are, to be shared out; None if transformers must load it whole."""
    dtype = compute_dtype(settings.compute_dtype)
    described, _ = describe(base, settings)
    files = Pieces(base, torch.device(_device()), dtype)
    how = {"attn_implementation": _attention(settings), "trust_remote_code": settings.trust_remote_code}
    found = pieces.outline(described, dtype, _quantization(settings, described, dtype), **how)
    files.call_as(found)
    if not files.fit(found):
        return None
    _keep_plain(_packed(found))
    return found, files


def _load(base: Path, described: PretrainedConfig, settings: config.Model, **how: Any) -> PreTrainedModel:  # noqa: ANN401 - the border to transformers
    loaded: PreTrainedModel
    told: dict[str, Any]
    try:
        loaded, told = pieces.kind(described).from_pretrained(
            base,
            config=described,
            attn_implementation=_attention(settings),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **how,
        )
    except _UNUSABLE as e:
        raise errors.ModelError(f"model.base: the model in {base} cannot be loaded: {e}") from e
    except RuntimeError as e:
        if not any(text in str(e) for text in _MISFITS):  # such as too little memory
            raise
        raise errors.ModelError(
            f"model.base: the weights in {base} are not those of the model that its config.json "
            f"describes ({e}): upload the model again"
        ) from e
    if lacking := sorted(told["missing_keys"]):  # which transformers draws at random
        raise errors.ModelError(
            f"model.base: the model in {base} lacks {len(lacking)} weights, the first is {lacking[0]}: it is not "
            "whole, or of another architecture than its config.json says"
        )
    return loaded


def _prequantized(
    base: Path, described: PretrainedConfig, scheme: Scheme, settings: config.Model, dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:  # fmt: skip
    how = {"attn_implementation": _attention(settings), "trust_remote_code": settings.trust_remote_code}
    try:
        files = Pieces(base, device, dtype)
        network = pieces.outline(described, dtype, None, **how)
        files.call_as(network)
        linear.replace(network, scheme, files, dtype)
        odd = _odd(network, files)
        told = base / "generation_config.json"
        if told.is_file():
            network.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
    except _UNUSABLE as e:
        raise errors.ModelError(f"model.base: the model in {base} cannot be loaded: {e}") from e
    if odd:
        raise errors.ModelError(
            f"model.base: the files in {base} ({scheme}) do not fit the model that its config.json tells of: "
            f"{len(odd)} weights lack or have no place in it, the first is {odd[0]}: use the original weights"
        )
    if _kept_apart(network):
        raise errors.ModelError(
            f"model.base: parts of {described.model_type} models are kept in float32, which is not done for those that "
            "come quantized: use the original weights"
        )
    files.fill(network, "")
    network.tie_weights()
    linear.settle(network)
    return network


def _kept_apart(network: PreTrainedModel) -> bool:
    return bool(network._keep_in_fp32_modules or network._keep_in_fp32_modules_strict)  # noqa: SLF001 - transformers' names


def _odd(network: PreTrainedModel, files: Pieces) -> list[str]:
    """Names of weights that the files lack, that have no place in the network, or that are not tied after all."""
    tied: dict[str, str] = network.all_tied_weights_keys
    wanted = network.state_dict().keys()
    return [
        *sorted(files.changed),
        *sorted(wanted - files.names - tied.keys()),
        *sorted(name for name in files.names - wanted if not name.endswith((".bias", ".inv_freq"))),
        *(name for name, other in tied.items() if name in files.names and not files.same(name, other)),
    ]


def quantized(described: PretrainedConfig, settings: config.Model, dtype: torch.dtype) -> frozenset[str]:
    """The names of the layers that are quantized to train on, in a base that is not quantized already."""
    how = _quantization(settings, described, dtype)
    if how is None:
        return frozenset()
    network = pieces.skeleton(described, dtype, trust_remote_code=settings.trust_remote_code)
    pieces.quantize(network, how, dtype)
    small = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return frozenset(name for name, module in network.named_modules() if isinstance(module, small))


def kept_whole(described: PretrainedConfig, dtype: torch.dtype) -> list[str]:
    """Modules of a base that sees images that are never quantized: what sees is small, and loses most by it."""
    return parts.others(pieces.outline(described, dtype, None)) if parts.sees(described) else []


def describe(base: Path, settings: config.Model) -> tuple[PretrainedConfig, Scheme | None]:
    """What its config.json says, without how it comes quantized, and that."""
    how = {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
    try:
        described = AutoConfig.from_pretrained(base, **how)
    except _UNUSABLE as e:
        raise errors.ModelError(f"model.base: the model in {base} cannot be loaded: {e}") from e
    scheme = prequantized.recognise(vars(described), str(base))
    if scheme:
        del described.quantization_config
    return cast("PretrainedConfig", described), scheme


def _attention(settings: config.Model) -> str | None:
    return None if settings.attention == "auto" else settings.attention


def _packed(network: PreTrainedModel) -> list[bnb.nn.Linear4bit]:
    return [module for module in network.modules() if isinstance(module, bnb.nn.Linear4bit)]


def _keep_plain(layers: Iterable[bnb.nn.Linear4bit]) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights for inference at the first evaluation on an AVX512-BF16 CPU.

    A layer then computes with an operator that has no gradient, and training goes on with a part of its gradients
    silently missing (bitsandbytes/nn/modules.py, Linear4bit.forward; autograd/_functions.py, matmul_4bit).
    """
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def _device() -> int | str:
    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"


def _quantization(
    settings: config.Model, model_config: PretrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    arguments = describe_quantization(settings, model_config, dtype)
    return BitsAndBytesConfig(**arguments) if arguments else None  # type: ignore[no-untyped-call]


def describe_quantization(settings: config.Model, model_config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `BitsAndBytesConfig` to train on a base; none if it stays whole."""
    if settings.quantization == "none":
        return {}
    arguments: dict[str, Any] = {"load_in_8bit": True}
    if settings.quantization != "int8":
        arguments = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": settings.quantization,
            "bnb_4bit_use_double_quant": settings.double_quant,
            "bnb_4bit_compute_dtype": dtype,
            # Bytes, never a float type: FSDP2 copies sharded weights by torch._foreach_copy_, which
            # on CUDA rewrites what looks like a NaN of bfloat16 or float16 (pytorch issue 159333).
            "bnb_4bit_quant_storage": torch.uint8,
        }
    if kept := kept_whole(model_config, dtype):
        arguments["llm_int8_skip_modules"] = kept
    return arguments
