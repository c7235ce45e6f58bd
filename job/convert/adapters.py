"""An adapter in pickled files, or for a base in an old layout, becomes one for what that base has become."""

import importlib.metadata
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from job import errors, log, manifest, paths
from job.convert import once
from job.inputs import Base
from job.model import files, legacy, saved

_WEIGHT, _BIAS = ".weight", ".bias"
_NAMED = ("exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping")  # of the old layout, if anything
_SOURCES = (*Path(__file__).parent.glob("*.py"), *Path(legacy.__file__).parent.glob("*.py"), Path(saved.__file__))
Weights = Mapping[str, torch.Tensor]


def translated(adapter: Path, base: Base, cache: paths.Cache, keep: ExitStack) -> Path:
    """The folder `adapter` itself if PEFT loads it on what `base` becomes, otherwise what it becomes, in the cache.

    `base` is as it was published. A layer that holds several in one there, such as queries, keys and values, gives
    each of them the same A, and B's rows of its own: their product stays what it was. Raises `errors.ModelError` if
    the adapter is broken, or was not trained on this base.
    """
    layout = legacy.recognise(once.described(base.path / "config.json"), base.url)
    weights = next((path for name in (saved.FILE, saved.PICKLED) if (path := adapter / name).is_file()), None)
    if weights is None or not (adapter / saved.SETTINGS).is_file():
        return adapter  # what it lacks, the merge says
    if layout is None or not _old(weights, layout):
        if weights.name == saved.FILE:
            return adapter
        layout = None
    whole = manifest.of(adapter)
    made_by = paths.digest(" ".join([*map(manifest.sha256, sorted(_SOURCES)), importlib.metadata.version("peft")]))
    target = cache.converted(f"adapter-{paths.digest(f'{whole.digest} {base.digest}')}", made_by)
    return once.made(
        target, f"the adapter in {adapter}", whole.digest, lambda folder: _write(weights, base, layout, folder), keep
    )


def _old(weights: Path, layout: legacy.Layout) -> bool:
    """Whether any of it is called as in the old layout."""
    for key, _ in files.inside(weights, "--adapter"):
        module, part = saved.parsed(key)
        try:
            layout.called(module if part == "whole" else module + _WEIGHT)
        except KeyError:
            continue
        return True
    return False


def _write(source: Path, base: Base, layout: legacy.Layout | None, target: Path) -> None:
    settings = once.described(source.with_name(saved.SETTINGS))
    weights: Weights = dict(files.inside(source, "--adapter"))
    if layout is None:
        log.event("convert.start", f"the adapter in {source.parent} is pickled: writing it as safetensors")
        for path in source.parent.iterdir():
            if path.is_file() and path.name not in (manifest.NAME, source.name):
                shutil.copyfile(path, target / path.name)
    else:
        log.event("convert.start", f"the adapter in {source.parent} is for {layout.NAMES} as published: renaming it")
        _check(settings, weights, base, layout)
        settings, weights = _settings(settings, weights, layout), _weights(weights, layout)
        (target / saved.SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    alone = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
    save_file(alone, target / saved.FILE, metadata={"format": "pt"})


def _check(settings: Mapping[str, Any], weights: Weights, base: Base, layout: legacy.Layout) -> None:
    """Raise `errors.ModelError` if something that the settings mean is not among the `weights`."""
    held: dict[str, set[str]] = defaultdict(set)
    for name, part in map(saved.parsed, weights):
        held[part].add(name)
    there = {name for name in files.names(base.path) if _called(layout, name)}
    layers = {name.removesuffix(_WEIGHT) for name in there if name.endswith(_WEIGHT)}
    lacking = saved.meant(settings, layers) - held["first"] - {name.removesuffix(_WEIGHT) for name in held["whole"]}
    for kept in settings.get("modules_to_save") or ():
        lacking |= {name for name in there if f".{name.rpartition('.')[0]}".endswith(f".{kept}")} - held["whole"]
    if (kind := settings.get("bias")) in ("all", "lora_only"):
        biases = {name for name in there if name.endswith(_BIAS)}
        lacking |= {n for n in biases if kind == "all" or n.removesuffix(_BIAS) in held["first"]} - held["whole"]
    tokens = settings.get("trainable_token_indices")
    for module in tokens if isinstance(tokens, Mapping) else ():
        if not any(name.endswith(module) for name in held["tokens"]):
            lacking.add(module)
    if lacking:
        raise errors.ModelError(
            f"the adapter is not whole: by its settings it was trained on {min(lacking)}, of which it holds no weights "
            f"({len(lacking)} such): save or bring it again"
        )


def _weights(weights: Weights, layout: legacy.Layout) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        module, part = saved.parsed(key)
        if part == "replaced":
            continue
        name = module if part == "whole" else module + _WEIGHT
        called = _called(layout, name)
        if part == "first":
            pieces = dict.fromkeys(called, tensor)
        else:
            try:
                pieces = layout.weights(name, tensor)
            except RuntimeError as e:
                raise errors.ModelError(
                    f"the adapter's {key} has the shape {list(tensor.shape)}, which does not fit the base: {e}: it "
                    "was trained on another one"
                ) from e
        for new, piece in pieces.items():
            made[_key(key, module, part, new)] = piece
    return made


def _key(key: str, module: str, part: str, new: str) -> str:
    """What PEFT calls the part of `module` that `key` is, of the weight `new`."""
    if part != "whole":
        return saved.PREFIX + new.removesuffix(_WEIGHT) + key.removeprefix(saved.PREFIX + module)
    owner, _, leaf = new.rpartition(".")
    return f"{saved.PREFIX}{owner}{saved.WRAPPED if saved.WRAPPED in key else ''}.{leaf}"


def _settings(settings: Mapping[str, Any], weights: Weights, layout: legacy.Layout) -> dict[str, Any]:
    """The settings by the new names: each layer by its whole one, with its own rank and alpha."""
    layers, kept, tokens = (_modules(weights, layout, part) for part in ("first", "whole", "tokens"))
    made: dict[str, Any] = dict(settings) | dict.fromkeys(_NAMED) | {"target_modules": sorted(layers)}
    for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        each = {new: saved.of(settings, pattern, old, settings.get(key)) for new, old in layers.items()}
        made[pattern] = {new: value for new, value in each.items() if value != settings.get(key)}
    if named := tuple(settings.get("modules_to_save") or ()):
        made["modules_to_save"] = sorted(new for new, old in kept.items() if old.endswith(named))
    if isinstance(told := settings.get("trainable_token_indices"), Mapping):
        made["trainable_token_indices"] = {
            new: rows for new, old in tokens.items() for name, rows in told.items() if old.endswith(name)
        }
    return made


def _modules(weights: Weights, layout: legacy.Layout, part: str) -> dict[str, str]:
    """The modules of which there is such a part, by their new names, and what each was called."""
    found = {}
    for name, what in map(saved.parsed, weights):
        if what == part:
            weight = name if what == "whole" else name + _WEIGHT
            found.update({new.rpartition(".")[0]: weight.rpartition(".")[0] for new in _called(layout, weight)})
    return found


def _called(layout: legacy.Layout, name: str) -> list[str]:
    try:
        return layout.called(name)
    except KeyError as e:
        raise errors.ModelError(
            f"the adapter has weights for {name}, which no {layout.NAMES} model has: it was trained on another base"
        ) from e
