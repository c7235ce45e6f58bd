"""The step itself: everything that can be known is checked first, then the weights are written, then looked at."""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from job import card, errors, inputs, log, manifest, paths
from job import config as configs
from job.config import Config
from job.inputs import Base, facts
from job.merge import plan, proof, shards, sides
from job.merge.adapter import Adapter
from job.model import weights
from job.model.saved import FILE

_ROOM = 1.1  # bytes of the disk for each of the weights


def merged(config: Config, base: Base, adapter: Path, cache: paths.Cache) -> Path:
    """Merge the sealed `adapter` folder of a run into `base` and return the folder of the sealed result.

    Raises `errors.ModelError` as `folder` does, and `errors.ConfigError` if it is of a run with another config.
    """
    told = facts(adapter)
    if told["inputs"]["config"] != configs.digest(config):
        raise errors.ConfigError("the adapter was trained with another config: use another run.url")
    return folder(base, adapter, config.model, config.merge, cache.work("merged"))


def other(config: Config, base: Base, adapter: Path, cache: paths.Cache) -> Path | None:
    """What the merge into the other base than ``merge.base`` would give, not sealed; None if there is no other.

    It is made to be compared with, and takes as much of the disk once more; None if that is not free either.
    """
    _, scheme = weights.describe(base.path, config.model)
    if config.model.quantization == "none" or scheme:
        return None
    turned = "original" if config.merge.base == "dequantized" else "dequantized"
    wanted = config.merge.model_copy(update={"base": turned})
    laid, parts = _laid(base, Adapter.read(adapter), config.model, wanted, facts(adapter))
    out = cache.work("merged-other")
    shutil.rmtree(out, ignore_errors=True)
    if shutil.disk_usage(cache.root).free < _ROOM * sum(tensor.outline.size for tensor in laid.tensors):
        return None
    out.mkdir(parents=True)
    shards.write(parts, out, out / "written.shards")
    sides.write(base.path, adapter, out, laid, getattr(torch, wanted.dtype))
    return out


def folder(
    base: Base,
    adapter: Path,
    model: configs.Model,
    wanted: configs.Merge,
    place: Path,
    claim: Mapping[str, str] | None = None,
) -> Path:
    """Merge `adapter` into `base` and return the folder of the sealed result, whose name begins with `place`.

    What a `claim` tells of it to whom the result's place in the store is promised, the result holds too.

    The sum is taken in float32 and rounded once to ``merge.dtype``; of the weights no more is in memory than some
    rows. A merge that was killed goes on with the shards that are whole. Raises `errors.ModelError` when the adapter
    was trained on another base, does not fit, changes nothing, or makes the weights NaN or Inf.
    """
    given, made = manifest.of(adapter), facts(adapter)
    out = place.with_name(f"{place.name}-{_made_from(base.digest, given.digest, model, wanted)}")
    if manifest.sealed(out):
        if claim and not claim.items() <= facts(out).items():  # it was made for another place, or of another copy
            _put(out, paths.TRAINING, json.dumps({**facts(out), **claim}, indent=1))
        return out
    _belongs(base, adapter, manifest.sha256(adapter / FILE) if FILE in given.files else "")
    read, dtype = Adapter.read(adapter), getattr(torch, wanted.dtype)
    laid, parts = _laid(base, read, model, wanted, made)
    log.event(
        "merge.start",
        f"merging {len(read.changed)} weights of the adapter into the {wanted.base} base in {wanted.dtype}: "
        f"{len(parts)} shard(s)",
    )
    partial, journal = (out.with_name(out.name + end) for end in (".partial", ".shards"))
    partial.mkdir(parents=True, exist_ok=True)
    written = shards.write(parts, partial, journal)
    checked = proof.check(parts, partial)
    sides.write(base.path, adapter, partial, laid, dtype)
    told = {
        **made,
        "adapter": given.digest,
        "adapter_weights": given.files[FILE].sha256,
        **(claim or {}),
        "merge": {"base": wanted.base, "dtype": wanted.dtype, "checked": str(checked)},
    }
    (partial / paths.TRAINING).write_text(json.dumps(told, indent=1), encoding="utf-8")
    whole = manifest.seal(partial, written)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    journal.unlink()
    log.event("merge.done", f"merged model: {len(whole.files)} files, {log.size(whole.size)}", digest=whole.digest)
    return out


def readable(adapter: Path) -> None:
    """Raise `errors.ModelError` if the `adapter` cannot be merged into any base; a pickled one is not read."""
    if (adapter / FILE).is_file():
        Adapter.read(adapter)


def tell(folder: Path, text: str) -> None:
    """Put the card `text` into the sealed `folder` of a merged model, and seal it again."""
    _put(folder, card.NAME, text)


def _put(folder: Path, name: str, text: str) -> None:
    """Write a file of a sealed folder anew, and seal that again."""
    known = {name: file.sha256 for name, file in (manifest.sealed(folder) or manifest.of(folder)).files.items()}
    (folder / name).write_text(text, encoding="utf-8")
    known.pop(name, None)
    manifest.seal(folder, known)


def _laid(
    base: Base, adapter: Adapter, model: configs.Model, wanted: configs.Merge, facts: Mapping[str, Any]
) -> tuple[plan.Plan, shards.Shards]:
    seen = _seen(model, facts) if wanted.base == "dequantized" else None
    laid = plan.of(base.path, model, adapter, getattr(torch, wanted.dtype), seen)
    return laid, shards.layout(laid.tensors, wanted.max_shard_size)


def _made_from(base: str, adapter: str, model: configs.Model, wanted: configs.Merge) -> str:
    """What the shards depend on, this code included."""
    sources = [*Path(__file__).parent.glob("*.py"), *Path(weights.__file__).parent.rglob("*.py")]
    code = [manifest.sha256(path) for path in sorted(sources)]
    versions = map(importlib.metadata.version, ("torch", "transformers", "peft", "bitsandbytes"))
    return paths.digest(" ".join([base, adapter, model.model_dump_json(), wanted.model_dump_json(), *code, *versions]))


def _belongs(base: Base, adapter: Path, weights: str) -> None:
    known = inputs.belongs(base, adapter)
    before = facts(base.path)
    if weights and before.get("adapter_weights") == weights:
        raise errors.ModelError(
            f"model.base: {base.url} is a merged model already, and holds this very adapter: merge into "
            f"{before.get('base', 'the base that it was trained on')}"
        )
    if not known:
        log.warn(
            "merge.unknown",
            f"the adapter does not say by a digest which base it was trained on: that it was {base.url} is taken on "
            "trust",
        )


def _seen(model: configs.Model, facts: Mapping[str, Any]) -> torch.dtype:
    """The number format that training computed in."""
    return weights.compute_dtype(facts.get("compute_dtype") or model.compute_dtype)
