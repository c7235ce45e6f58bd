"""What ``adapter_config.json`` says of an adapter, checked before anything is computed with it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, ValidationError

from job import errors

# What PEFT 0.21 writes into its settings and the merge knows, or that changes nothing in what was trained.
_KNOWN = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights",
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is
_TURNED_BACK = ("pissa", "corda", "olora", "lora_ga")  # ways of which PEFT can take out again what they did to the base
_SHOWN = 4  # names in one line


class _Shape(BaseModel):
    """Those that are computed with, as PEFT writes them."""

    model_config = ConfigDict(extra="allow")

    r: StrictInt
    lora_alpha: StrictInt | StrictFloat
    rank_pattern: dict[str, StrictInt] | None = None
    alpha_pattern: dict[str, StrictInt | StrictFloat] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: StrictInt | list[StrictInt] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[StrictInt] | dict[str, list[StrictInt]] | None = None


def read(path: Path) -> Mapping[str, Any]:
    """The settings in the file at `path`; raises `errors.ModelError` if they are of no adapter that can be merged."""
    try:
        told = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise errors.ModelError(f"{path} cannot be read ({e}): bring the adapter again") from e
    kind = told.get("peft_type")
    if kind != "LORA":
        raise errors.ModelError(f"the adapter is of the kind {kind}, where LORA can be merged: merge it with PEFT")
    begun = told.get("init_lora_weights")
    if (begun.lower() if isinstance(begun, str) else begun) not in _PLAIN:
        way_out = "merge it with PEFT into the base that this left"
        if str(begun).lower().startswith(_TURNED_BACK):
            way_out = "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        raise errors.ModelError(
            f"the adapter began with init_lora_weights {begun}, which changed the base as well: {way_out}"
        )
    strange = sorted(key for key, value in told.items() if value and key not in _KNOWN)
    if strange:
        raise errors.ModelError(
            f"the adapter was made with {some(strange)} ({path.name}), which cannot be merged here: merge it with "
            "PEFT, if it can be at all"
        )
    _check(told, path)
    return told


def some(names: list[str]) -> str:
    """A few of them, for one line."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check(told: Mapping[str, Any], path: Path) -> None:
    """Raise `errors.ModelError` if something is of another kind than PEFT writes."""
    if told.get("r") is None or told.get("lora_alpha") is None:
        raise errors.ModelError(f"{path} does not say r and lora_alpha: it is not what PEFT writes")
    try:
        shape = _Shape.model_validate(told)
        key = ""
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            patterns = getattr(shape, key) or ()
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                re.compile(pattern)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"][:1]))
        raise errors.ModelError(f"{path}: {key}: {first['msg']}, not {told[key]!r}: it is not what PEFT writes") from e
    except re.error as e:
        raise errors.ModelError(f"{path}: {key}: {pattern!r} is no regular expression ({e}): correct it") from e
