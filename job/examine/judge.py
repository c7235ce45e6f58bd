"""What the figures say: is the merged model what was trained, which base is nearer to it, and what has it learned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file

from job import errors, log
from job.card import CALLED

# How far the merged model's logits may be from those of the base with the adapter, as a share of their size. Measured
# on tiny random models of 14 families: 0.004 to 0.017 in float32, 0.01 to 0.04 in bfloat16, and 0.17 where bfloat16
# makes a mixture choose other experts. More is allowed only for an adapter that makes so many times as much.
# A base in int8 rounds activations as well: 0.24 on SmolLM2-135M.
_ALLOWED = {"float32": (0.05, 4), "bfloat16": (0.3, 2), "int8": (0.5, 2)}
# An adapter whose effect is larger than this can be told from rounding: it must be there, once, give or take a half.
# Of a random one on SmolLM2-135M, merged in bfloat16, there were in float32 1.00 of an effect of 0.036, 0.82 of 0.012,
# 0.78 of 0.0036, 0.5 of 0.0012 and nothing of 0.0004; in bfloat16 the figures are noise below an effect of 0.1.
_SHOWS, _LACK = {"float32": 0.01, "bfloat16": 0.1, "int8": 0.1}, 0.5


@dataclass(frozen=True)
class Standard:
    """What a merged model is held against."""

    name: str = "adapted"
    """The model that it should compute the same as."""
    numbers: str = "float32"
    """What that computes with: a number format, or int8."""
    short: bool = False
    """Whether its tokenizer has more tokens than its embedding rows, as some bases that are published have."""
    answered_by: tuple[str, str] = ("adapted", "merged")
    """Which models answer before (with the adapter off) and after training."""


Found: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What the program answered of each model."""


def check(found: Found, scratch: Path, like: Standard) -> dict[str, Any]:
    """Raise `errors.ModelError` if the merged model is not `like` what it should be; return how near it is."""
    for name, each in found.items():
        if "error" in each and name == "merged":
            raise errors.ModelError(f"the merged model cannot be opened by plain transformers: {each['error']}")
        if name not in _measured(found):
            log.warn("examine.failed", f"{CALLED[name]}: could not be looked at ({_fault(each)})")
    _sized(found.get("merged", {}), short=like.short)
    good = _measured(found)
    if "merged" in good and like.name in good:
        return _compare(good["merged"], good[like.name], like.numbers, scratch)
    return {}


def summarize(
    found: Found, split: str, prompts: Sequence[Mapping[str, Any]], scratch: Path, like: Standard
) -> dict[str, Any]:
    """Return losses, distances and answers for the report, and of which models there are none and why."""
    good = _measured(found)
    told: dict[str, Any] = {
        "dtype": like.numbers,
        "left": {name: _fault(each) for name, each in found.items() if name not in good},
        "on": split,
        "loss": {name: each["loss"] for name, each in good.items()},
    }
    reference = good.get("trained") or good.get("adapted")
    if reference and "loss_before" in reference:
        told["loss"]["base"] = reference["loss_before"]
    if "trained" in good:
        told["from_trained"] = {
            name: _distance(_logits(scratch, name), _logits(scratch, "trained"))
            for name in ("merged", "other")
            if name in good
        }
    if prompts:
        told |= _answers(found, prompts, like)
    return told


def _answers(found: Found, prompts: Sequence[Mapping[str, Any]], like: Standard) -> dict[str, Any]:
    """Return each answer before and after, and whether the time ended it."""
    before, after = (
        found.get(name, {}).get(key) for name, key in zip(like.answered_by, ("answers_before", "answers"), strict=True)
    )
    if not before or not after:
        log.warn("examine.answers", "there are no answers before and after: a model that was to answer could not")
        return {}
    told = []
    for prompt, base, tuned in zip(prompts, before, after, strict=True):
        each = {"prompt": prompt["prompt"], "wanted": prompt["answer"], "base": base["text"], "tuned": tuned["text"]}
        cut = {key: answer["tokens"] for key, answer in (("base", base), ("tuned", tuned)) if answer["cut"]}
        told.append({**each, "cut": cut} if cut else each)
    if count := sum(len(each.get("cut", {})) for each in told):
        log.warn(
            "examine.cut",
            f"{count} of {2 * len(told)} answers are shorter than examine.tokens, because the time was over: raise "
            "examine.minutes, or lower examine.prompts or examine.tokens",
            answers=count,
        )
    return {"answers": told}


def _measured(found: Found) -> Found:
    return {name: each for name, each in found.items() if "loss" in each}


def _fault(answer: Mapping[str, Any]) -> str:
    """Why nothing was measured: a lack of memory and a fault of a GPU say nothing about the model."""
    if "memory" in answer:
        return f"memory: {answer['memory']}"
    return str(answer.get("error") or answer.get("failed") or f"GPU: {answer.get('gpu')}")


def _sized(merged: Mapping[str, Any], *, short: bool) -> None:
    """Raise `errors.ModelError` if the merged model has tokens without rows, and its base has none."""
    if "rows" in merged and merged["tokenizer"]["tokens"] > merged["rows"]:
        told = f"its tokenizer has {merged['tokenizer']['tokens']} tokens, and its embedding {merged['rows']} rows"
        if not short:
            raise errors.ModelError(f"the merged model cannot be used: {told}")
        log.warn("examine.rows", f"the merged model is like its base, which cannot read all of its tokens: {told}")


def _compare(merged: Mapping[str, Any], adapted: Mapping[str, Any], numbers: str, scratch: Path) -> dict[str, Any]:
    """Hold the merged model against the base with the adapter, as it was merged into."""
    for what, shown in (
        ("ids", "splits text into other tokens"),
        ("texts", "makes other text of tokens"),
        ("chat", "writes another chat format"),
    ):
        if merged["tokenizer"][what] != adapted["tokenizer"][what] and adapted["tokenizer"][what]:
            raise errors.ModelError(
                f"the merged model's tokenizer {shown} than the adapter's: {merged['tokenizer'][what]}"
            )
    made, wanted, before = (
        _logits(scratch, *which) for which in (("merged",), (adapted["name"],), (adapted["name"], "before"))
    )
    off, effect = (_distance(each, wanted) for each in (made, before))
    if not math.isfinite(effect):
        log.warn("examine.nan", "the base with the adapter computes NaN or infinity itself: nothing can be compared")
        return {}
    allowed, times = _ALLOWED[numbers]
    share = _share(made, wanted, before)
    there = abs(share - 1) <= _LACK
    if not off <= max(allowed, effect / times) or (effect > _SHOWS[numbers] and not there):  # NaN too
        raise errors.ModelError(
            f"the merged model does not compute what the base with the adapter does: in {numbers} its logits are "
            f"off by {off:.1%}, where {max(allowed, effect / times):.1%} is allowed; of what the adapter makes, which "
            f"is {effect:.1%}, it has {share:.0%}"
        )
    if not there:
        log.warn(
            "examine.faint",
            f"the adapter changes so little ({effect:.2%}) that rounding hides whether the merged model has it "
            f"({share:.0%} of it is seen): merge.dtype float32 keeps all of it",
        )
    log.event(
        "examine.merged",
        f"transformers alone opens the merged model ({merged['class']}): its logits are within {off:.2%} of those of "
        f"the base with the adapter, which differ from the base's by {effect:.2%} ({numbers})",
        off=off,
        effect=effect,
    )
    return {"class": merged["class"], "off": off, "effect": effect}


def _logits(scratch: Path, name: str, which: str = "logits") -> torch.Tensor:
    return load_file(scratch / f"{name}.safetensors")[which].double()


def _share(made: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> float:
    """How much of the way from the logits `before` to those that are `wanted` was gone: 0 of the base, 1 of all."""
    width = min(made.shape[1], wanted.shape[1], before.shape[1])
    way = (wanted - before)[:, :width]
    return float(((made[:, :width] - before[:, :width]) * way).sum() / way.square().sum().clamp(min=1e-300))


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far logits are from others, as a share of what those differ among each other."""
    width = min(one.shape[1], other.shape[1])
    one, other = one[:, :width], other[:, :width]
    return float((one - other).norm() / (other - other.mean(1, keepdim=True)).norm())
