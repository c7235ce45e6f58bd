"""What kind of model a base is, as its config.json and the headers of its files tell."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import errors, storage
from job.config import Config
from job.model import footprint, legacy, prequantized, vision
from job.pull import verified
from job.pull.look import PICKLED, WEIGHTS, Found

_ASIDE = ("quantize_config.json", "quant_config.json")  # where AutoGPTQ and AutoAWQ first told what they did
_CODE = re.compile(r"[^/]+\.py")
_LENGTH = 8  # bytes at the start of a safetensors file: the length of its header
_HEADER = 100_000_000  # bytes: safetensors takes no more


@dataclass(frozen=True)
class Kind:
    """What config.json and the names of its files tell of a base model."""

    converts: bool
    """Whether it has to be converted before transformers loads it."""
    sees: bool
    """Whether it takes images."""
    context: int | None
    """Tokens that it was made for, if anybody says."""
    scheme: str
    """How it is quantized already, if it is."""
    config: Mapping[str, Any]
    """What config.json says, in the layout that the base is trained in."""
    tensors: Mapping[str, tuple[str, list[int]]]
    """Dtype and shape of each tensor in its files, if it is quantized already."""


def kind(found: Found) -> Kind:
    """What the base is, told before gigabytes move; raises `errors.ModelError` if it cannot be used."""
    try:
        told = dict(json.loads(verified.read_file(found, "config.json")))
    except (ValueError, TypeError) as e:
        raise errors.ModelError(f"model.base: {found.source.url}/config.json cannot be read ({e})") from e
    called = told.get("architectures") or []
    if told.get("is_encoder_decoder") and not any(str(each).endswith("ForCausalLM") for each in called):
        raise errors.ModelError(
            f"model.base: {found.source.url} is an encoder with a decoder ({', '.join(called) or 'see config.json'}): "
            "the job trains and merges language models, which are decoders alone"
        )
    layout = legacy.recognise(told, found.source.url)
    aside = [entry.key for entry in found.entries if entry.key in _ASIDE]
    if aside and not told.get("quantization_config"):
        raise errors.ModelError(
            f"model.base: {found.source.url} has {aside[0]} beside a config.json that says nothing of it, as old "
            "quantized models do: put it into config.json as quantization_config, with quant_method gptq or awq"
        )
    scheme = prequantized.recognise(told, found.source.url)
    tensors = _tensors(found) if scheme else {}
    if scheme:
        prequantized.check(tensors.keys(), scheme, found.source.url)
    if scheme and layout:
        raise errors.ModelError(
            f"model.base: {found.source.url} is a {layout.NAMES} model that is quantized already ({scheme}), which the "
            "job does not convert: use the original weights"
        )
    converts = layout is not None or all(PICKLED.match(e.key) for e in found.entries if WEIGHTS.search(e.key))
    context = layout.context if layout else _context(told)
    described = layout.config() if layout else told
    return Kind(converts, vision.sees(told), context, str(scheme or ""), described, tensors)


def outline(found: Found, kind: Kind, folder: Path, *, code: bool) -> None:
    """Write to `folder` what tells how large the base is: config.json, and dtypes and shapes.

    With `code` also the Python files that it comes with, which are run there: so they and
    config.json are first compared with the base's manifest.json, if the job made it. Raises
    `errors.ModelError` if they differ.
    """
    sources = {entry.key for entry in found.entries if code and _CODE.fullmatch(entry.key)}
    content = verified.read_sealed(found, {"config.json", *sources}, "model.base")
    (folder / "config.json").write_text(json.dumps(kind.config), encoding="utf-8")
    (folder / footprint.TENSORS).write_text(json.dumps(kind.tensors), encoding="utf-8")
    for name in sources:
        (folder / name).write_bytes(content[name])


def suits(config: Config, kind: Kind, where: str) -> None:
    """Raise `errors.ConfigError` if a base of that `kind`, which is at `where`, cannot be trained as `config` says."""
    if kind.context and config.data.max_length > kind.context:
        raise errors.ConfigError(
            f"data.max_length {config.data.max_length} is more than the {kind.context} tokens that {where} was "
            "made for (in its config.json): lower it"
        )
    if kind.scheme and config.distributed.strategy not in ("auto", "ddp"):
        raise errors.ConfigError(
            f"distributed.strategy {config.distributed.strategy} cannot share out a base that is quantized already "
            f"({where}: {kind.scheme}): use ddp, or the original weights"
        )
    if config.data.images and not kind.sees:
        raise errors.ConfigError(f"data.images: the base {where} sees no images: leave it out, or use a base that does")


def _tensors(found: Found) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of the tensors in the safetensors files of a base, from their headers."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for entry in found.entries:
        if entry.key.endswith(".safetensors"):
            try:
                header = json.loads(_read_header(found.source, entry))
                header.pop("__metadata__", None)
                tensors |= {name: (told["dtype"], told["shape"]) for name, told in header.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                raise errors.ModelError(
                    f"model.base: {found.source.url}/{entry.key} is no safetensors file ({e}): upload it again"
                ) from e
    return tensors


def _read_header(source: storage.Source, entry: storage.Entry) -> bytes:
    """Return the header of a safetensors file; raises `ValueError` if the file has none."""
    if entry.size < _LENGTH:
        raise ValueError(f"it has {entry.size} bytes")
    size = int.from_bytes(storage.read_range(source, entry, 0, _LENGTH), "little")
    if size > min(_HEADER, entry.size - _LENGTH):
        raise ValueError(f"its header would have {size} bytes, the file has {entry.size}")
    return storage.read_range(source, entry, _LENGTH, _LENGTH + size)


def _context(told: Mapping[str, Any]) -> int | None:
    """How many tokens the model takes, with what its config.json says of stretching them; None if it says nothing."""
    told = told["text_config"] if isinstance(told.get("text_config"), dict) else told
    context = told.get("max_position_embeddings")
    if not isinstance(context, int):
        return None
    stretched = told.get("rope_scaling") or told.get("rope_parameters")
    if not isinstance(stretched, dict) or not isinstance(stretched.get("factor"), int | float):
        return context
    return max(context, int(stretched.get("original_max_position_embeddings", context) * stretched["factor"]))
