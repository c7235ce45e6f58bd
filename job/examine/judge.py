"""What the figures say: is the merged model what was trained, which base is nearer to it, and what has it learned."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from job import errors, log
from job.card import CALLED

# How far the merged model's logits may be from those of the base with the adapter, as a share of their size. Measured
# on tiny random models of 14 families: 0.004 to 0.017 in float32, 0.01 to 0.04 in bfloat16, and 0.17 where bfloat16
# makes a mixture choose other experts. More is allowed only if it is nearer to them than half the way from the base.
_ALLOWED = {"float32": 0.05, "bfloat16": 0.3}


def judged(
    found: Mapping[str, Mapping[str, Any]], dtype: str, held: Mapping[str, Any] | None,
    prompts: Sequence[Mapping[str, Any]], scratch: Path,
) -> dict[str, Any]:  # fmt: skip
    """What is to be told; raises `errors.ModelError` if the merged model is not what it should be."""
    left: dict[str, str] = {}
    for name, each in found.items():
        if "error" in each and name == "merged":
            raise errors.ModelError(f"the merged model cannot be opened by plain transformers: {each['error']}")
        if why := each.get("error") or each.get("failed") or each.get("memory"):
            left[name] = f"memory: {why}" if "memory" in each else why
            log.warn("examine.failed", f"{CALLED[name]}: could not be looked at ({left[name]})")
    _sized(found)
    good = {name: each for name, each in found.items() if "loss" in each}
    told: dict[str, Any] = {
        "dtype": dtype,
        "left": left,
        "on": held["split"] if held else "some text",
        "loss": {name: each["loss"] for name, each in good.items()},
    }
    reference = good.get("trained") or good.get("adapted")
    if reference:
        told["loss"]["base"] = reference["loss_before"]
    if "merged" in good and "adapted" in good:
        told |= _compare(good["merged"], good["adapted"], dtype, scratch)
    if "trained" in good:
        told["from_trained"] = {
            name: _distance(_logits(scratch, name), _logits(scratch, "trained"))
            for name in ("merged", "other")
            if name in good
        }
    if reference and prompts:
        tuned = good.get("merged", reference)
        told["answers"] = [
            {"prompt": each["prompt"], "wanted": each["answer"], "base": before, "tuned": after}
            for each, before, after in zip(prompts, reference["answers_before"], tuned["answers"], strict=True)
        ]
    return told


def _sized(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `errors.ModelError` if the merged model has tokens without rows, and the base with the adapter has none."""

    def lacks(name: str) -> bool:
        each = found.get(name, {})
        return "rows" in each and each["tokenizer"]["tokens"] > each["rows"]

    if lacks("merged"):
        tokens, rows = found["merged"]["tokenizer"]["tokens"], found["merged"]["rows"]
        told = f"its tokenizer has {tokens} tokens, and its embedding {rows} rows"
        if not (lacks("adapted") or lacks("trained")):
            raise errors.ModelError(f"the merged model cannot be used: {told}")
        log.warn("examine.rows", f"the merged model is like its base, which cannot read all of its tokens: {told}")


def _compare(merged: Mapping[str, Any], adapted: Mapping[str, Any], dtype: str, scratch: Path) -> dict[str, Any]:
    """Hold the merged model against the base with the adapter."""
    for what, shown in (("ids", "splits text into other tokens"), ("chat", "writes another chat format")):
        if merged["tokenizer"][what] != adapted["tokenizer"][what] and adapted["tokenizer"][what]:
            raise errors.ModelError(
                f"the merged model's tokenizer {shown} than the adapter's: {merged['tokenizer'][what]}"
            )
    off, effect = (
        _distance(_logits(scratch, name, which), _logits(scratch, "adapted"))
        for name, which in (("merged", "logits"), ("adapted", "before"))
    )
    if not math.isfinite(effect):
        log.warn("examine.nan", "the base with the adapter computes NaN or infinity itself: nothing can be compared")
        return {}
    if not off <= max(_ALLOWED[dtype], effect / 2):  # NaN too
        raise errors.ModelError(
            f"the merged model does not compute what the base with the adapter does: in {dtype} its logits are off by "
            f"{off:.1%}, where {_ALLOWED[dtype]:.0%} is allowed and the adapter makes {effect:.1%}"
        )
    log.event(
        "examine.merged",
        f"transformers alone opens the merged model ({merged['class']}): its logits are within {off:.2%} of those of "
        f"the base with the adapter, which differ from the base's by {effect:.2%} ({dtype})",
        off=off,
        effect=effect,
    )
    return {"class": merged["class"], "off": off, "effect": effect}


def _logits(scratch: Path, name: str, which: str = "logits") -> torch.Tensor:
    return load_file(scratch / f"{name}.safetensors")[which].double()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far logits are from others, as a share of what those differ among each other."""
    width = min(one.shape[1], other.shape[1])
    one, other = one[:, :width], other[:, :width]
    return float((one - other).norm() / (other - other.mean(1, keepdim=True)).norm())
