"""How PEFT calls what it saves of an adapter, in which files, and which layers its settings mean."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

SETTINGS = "adapter_config.json"
FILE = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""What PEFT wrote before 0.7, and writes with safe_serialization=False."""
PREFIX = "base_model.model."  # what PEFT adds to a name
WRAPPED = ".base_layer"
_TOKENS = ".token_adapter"
EMBEDDING = ".lora_embedding_A"
_KEPT = ".modules_to_save."
_REPLACED = ".original_module."  # what was there before, which PEFT saves too where the vocabulary has grown
_PARTS = {
    ".lora_A.weight": "first",
    EMBEDDING: "first",
    ".lora_B.weight": "second",
    ".lora_embedding_B": "second",
    ".lora_B.bias": "bias",
    f"{_TOKENS}.trainable_tokens_delta": "tokens",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_SHAPE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def parsed(key: str) -> tuple[str, str]:
    """The module that the tensor `key` belongs to, and which part of it that is; "whole" of a parameter itself."""
    name = key.removeprefix(PREFIX)
    for suffix, part in _PARTS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), part
    if _REPLACED in name:
        return name, "replaced"
    return name.replace(WRAPPED, "").replace(_TOKENS, "").replace(_KEPT, "."), "whole"


def of(settings: Mapping[str, Any], pattern: str, module: str, usual: object) -> Any:  # noqa: ANN401 - a number of PEFT's
    """The rank or alpha of a module: what the setting `pattern` says of it, or else the `usual` one."""
    special = settings.get(pattern) or {}
    return special.get(get_pattern_key(special.keys(), module), usual)


def meant(settings: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Which of the `modules` have a LoRA by the settings; none if those do not say."""
    told = {key: settings[key] for key in _SHAPE if settings.get(key)}
    if not told.get("target_modules"):
        return set()
    shape = LoraConfig(**told)
    return {name for name in modules if bool(check_target_module_exists(shape, name))}
