"""The base model: quantized and frozen to train on, or in full to merge into."""

from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from job import config, errors


def compute_dtype(wanted: str) -> torch.dtype:
    """The number format of activations: as given, or the best that this machine has hardware for."""
    if wanted != "auto":
        return cast("torch.dtype", getattr(torch, wanted))
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def for_training(base: Path, settings: config.Model) -> PreTrainedModel:
    """Load the model at `base` as `settings` ask: quantized, on this process's GPU (or the CPU).

    Raises `errors.ModelError` if transformers cannot load it.
    """
    dtype = compute_dtype(settings.compute_dtype)
    loaded = _load(
        base, settings, dtype=dtype, quantization_config=_quantization(settings, dtype),
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    )  # fmt: skip
    _keep_differentiable(loaded)
    return loaded


def for_merging(base: Path, settings: config.Model, dtype: str) -> PreTrainedModel:
    """Load the original weights at `base` on the CPU in `dtype`. Raises `errors.ModelError` as above."""
    return _load(base, settings, dtype=getattr(torch, dtype), quantization_config=None, device_map="cpu")


def _load(base: Path, settings: config.Model, **how: Any) -> PreTrainedModel:  # noqa: ANN401 - the border to transformers
    attention = None if settings.attention == "auto" else settings.attention
    try:
        described = AutoConfig.from_pretrained(
            base, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
        if getattr(described, "quantization_config", None):
            raise ValueError(f"it is quantized already ({described.quantization_config}); use the original weights")  # noqa: TRY301 - same message for all
        loaded = AutoModelForCausalLM.from_pretrained(
            base,
            config=described,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            **how,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError) as e:
        raise errors.ModelError(f"model.base: the model in {base} cannot be loaded: {e}") from e
    return cast("PreTrainedModel", loaded)


def _keep_differentiable(network: PreTrainedModel) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights for inference at the first evaluation on an AVX512-BF16 CPU.

    The layer then computes with an operator that has no gradient, and training goes on with a part of its gradients
    silently missing (bitsandbytes/nn/modules.py, Linear4bit.forward; autograd/_functions.py, matmul_4bit).
    """
    for module in network.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization(settings: config.Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    how: dict[str, Any] = {"load_in_8bit": True}
    if settings.quantization != "int8":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": settings.quantization,
            "bnb_4bit_use_double_quant": settings.double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
    return BitsAndBytesConfig(**how)  # type: ignore[no-untyped-call]
