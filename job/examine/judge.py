"""What the figures say: is the merged model what was trained, which base is nearer to it, and what has it learned."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file

from job import errors, log
from job.card import CALLED
from job.examine.devices import FORMATS

# How far the merged model's logits may be from those of the base with the adapter, as a share of
# their size. Measured on tiny random models of 14 families: 0.004 to 0.017 in float32, 0.01 to 0.04
# in bfloat16, and 0.17 where bfloat16 makes a mixture choose other experts. More is allowed only for
# an adapter that makes so many times as much.
# A base in int8 rounds activations as well: 0.24 on SmolLM2-135M.
_ALLOWED = {"float32": (0.05, 4), "bfloat16": (0.3, 2), "int8": (0.5, 2)}
# An adapter whose effect is larger than this can be told from rounding: it must be there, once,
# give or take a half. Random adapters on SmolLM2-135M, merged in bfloat16 (effect in float32, and
# how much of it the good merge, one without the adapter and one with it twice seemed to have):
#   effect 0.148: 1.01, 0.00, 2.17 computed in float32, and 0.98, 0.00, 1.99 in bfloat16
#   effect 0.047: 1.00, 0.00, 2.05                      and 0.71, 0.00, 1.28
#   effect 0.005: 0.73, 0.00, 1.88                      and 0.51, 0.00, 0.50, all of it rounding
_SHOWS, _LACK = {"float32": 0.01, "bfloat16": 0.1, "int8": 0.1}, 0.5
_USUAL = 0.1
"""In bfloat16, of a dense model (0.05 in the measurements above): what is off by more is compared in float32."""


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


@dataclass(frozen=True)
class Difference:
    """How the merged model's logits differ from those of the base with the adapter."""

    off: float
    """Distance between both, as a share of how much logits differ among each other."""
    effect: float
    """The same between the base with and without the adapter."""
    share: float
    """How much of that way the merged model has gone: 0 is the base, 1 all of it."""
    numbers: str
    """What both were computed with: a number format, or int8."""

    @property
    def allowed(self) -> float:
        """Return the largest distance of a good merge."""
        most, times = _ALLOWED[self.numbers]
        return max(most, self.effect / times)

    @property
    def has_adapter(self) -> bool:
        """Return True if the merged model seems to have the adapter, once."""
        return abs(self.share - 1) <= _LACK

    @property
    def shows(self) -> bool:
        """Return True if the adapter's effect can be told from rounding."""
        return self.effect > _SHOWS[self.numbers]

    @property
    def is_good(self) -> bool:
        """Return True if this may be a good merge; NaN is none."""
        return self.off <= self.allowed and (self.has_adapter or not self.shows)

    @property
    def is_certain(self) -> bool:
        """Return True if a comparison in float32 would tell no more."""
        if self.numbers != FORMATS[1]:
            return True
        return self.shows and self.has_adapter and self.off <= _USUAL


def are_compared(found: Found, like: Standard) -> bool:
    """Return whether both models that `check` compares were measured."""
    return {"merged", like.name} <= _measured(found).keys()


def is_certain(found: Found, scratch: Path, like: Standard) -> bool:
    """Return whether `check` can rely on the format that both models were computed in."""
    if not are_compared(found, like):
        return True
    difference = _measure_difference(found, scratch, like)
    finite = math.isfinite(difference.effect) and math.isfinite(difference.off)
    return not finite or difference.is_certain  # what is no number is none in float32 either


def order_by_difference(found: Found, scratch: Path, like: Standard) -> list[int]:
    """Return the numbers of the examples, those first in which both models differ most."""
    read, rows = _count_common([found["merged"], found[like.name]])
    sizes = list(found["merged"]["positions"][:read])
    merged, adapted = (torch.split(_logits(scratch, name, rows), sizes) for name in ("merged", like.name))
    distances = [_distance(one, other) for one, other in zip(merged, adapted, strict=True)]
    known = [each if math.isfinite(each) else 0.0 for each in distances]  # NaN: no position was compared
    return sorted(range(read), key=lambda number: -known[number])


def check(found: Found, scratch: Path, like: Standard, coarse: str = "") -> dict[str, Any]:
    """Return for the report how near the merged model is to what it should be `like`.

    `coarse` is why no finer format could be used, if the one in use may not suffice. Raises
    `errors.ModelError` if it is something else.
    """
    for name, each in found.items():
        if "error" in each and name == "merged":
            raise errors.ModelError(f"the merged model cannot be opened by plain transformers: {each['error']}")
    for name, fault in find_faults(found).items():
        log.warn("examine.failed", f"{CALLED[name]}: could not be verified ({fault})")
    _sized(found.get("merged", {}), short=like.short)
    if not are_compared(found, like):
        return {}
    _compare_tokenizers(found["merged"]["tokenizer"], found[like.name]["tokenizer"])
    return _compare(found["merged"]["class"], _measure_difference(found, scratch, like), coarse)


def summarize(
    found: Found, split: str, prompts: Sequence[Mapping[str, Any]], scratch: Path, like: Standard
) -> dict[str, Any]:
    """Return losses, distances and answers for the report, and of which models there are none and why."""
    good = _measured(found)
    read, rows = _count_common(good.values())
    told: dict[str, Any] = {
        "left": find_faults(found),
        "on": split,
        "read": read,
        "loss": {name: _average(each["losses"][:read]) for name, each in good.items()},
    }
    reference = good.get("trained") or good.get("adapted")
    if reference and "losses_before" in reference:
        told["loss"]["base"] = _average(reference["losses_before"][:read])
    if "trained" in good:
        told["from_trained"] = {
            name: _distance(_logits(scratch, name, rows), _logits(scratch, "trained", rows))
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
    return {name: each for name, each in found.items() if "losses" in each}


def _average(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean loss of a token, of sums and counts."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def find_faults(found: Found) -> dict[str, str]:
    """Return why models were not measured; a lack of memory or a GPU's fault says nothing of them."""
    measured = _measured(found)
    return {name: _explain_fault(each) for name, each in found.items() if name not in measured}


def _explain_fault(answer: Mapping[str, Any]) -> str:
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


def _compare_tokenizers(merged: Mapping[str, Any], adapted: Mapping[str, Any]) -> None:
    """Raise `errors.ModelError` if the merged model's tokenizer is not the adapter's."""
    for what, shown in (
        ("ids", "splits text into other tokens"),
        ("texts", "makes other text of tokens"),
        ("chat", "writes another chat format"),
    ):
        if merged[what] != adapted[what] and adapted[what]:
            raise errors.ModelError(f"the merged model's tokenizer {shown} than the adapter's: {merged[what]}")


def _count_common(measured: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Return how many examples all these models read, and how many logits are of those."""
    models = list(measured)
    counts = [len(each[key]) for each in models for key in ("losses", "losses_before") if key in each]
    read = min(counts, default=0)
    return read, sum(models[0]["positions"][:read]) if models else 0


def _measure_difference(found: Found, scratch: Path, like: Standard) -> Difference:
    _, rows = _count_common([found["merged"], found[like.name]])
    merged = _logits(scratch, "merged", rows)
    adapted, before = (_logits(scratch, like.name, rows, which) for which in ("logits", "before"))
    return Difference(
        off=_distance(merged, adapted),
        effect=_distance(before, adapted),
        share=_share(merged, adapted, before),
        numbers=like.numbers,
    )


def _compare(kind: str, difference: Difference, coarse: str) -> dict[str, Any]:
    """Raise `errors.ModelError` unless the merged model, of class `kind`, may be a good one."""
    off, effect, share = difference.off, difference.effect, difference.share
    numbers = difference.numbers
    if not math.isfinite(effect):
        log.warn("examine.nan", "the base with the adapter computes NaN or infinity itself: nothing can be compared")
        return {}
    if not difference.is_good:
        raise errors.ModelError(
            f"the merged model does not compute what the base with the adapter does: in {numbers} its logits are "
            f"off by {off:.1%}, where {difference.allowed:.1%} is allowed; of what the adapter makes, which "
            f"is {effect:.1%}, it has {share:.0%}"
        )
    if not difference.has_adapter or coarse:
        log.warn("examine.faint", _explain_faint(difference, coarse))
    log.event(
        "examine.merged",
        f"transformers alone opens the merged model ({kind}): its logits are within {off:.2%} of those of "
        f"the base with the adapter, which differ from the base's by {effect:.2%} ({numbers})",
        off=off,
        effect=effect,
    )
    return {"class": kind, "off": off, "effect": effect, "dtype": numbers}


def _explain_faint(difference: Difference, coarse: str) -> str:
    """Return what to say where it is not certain that the merged model has the adapter, once."""
    measured = (
        f"the adapter changes the logits by {difference.effect:.2%}, and the merged model seems to "
        f"have {difference.share:.0%} of that"
    )
    if difference.numbers == FORMATS[0]:
        return (
            f"{measured}: rounding the weights to merge.dtype hides how much of so small a change "
            "is there; merge.dtype float32 keeps all of it"
        )
    uncertain = f"{measured}, which rounding in {difference.numbers} may hide or feign"
    if not coarse:
        return uncertain
    return (
        f"{uncertain}; {coarse}. To be certain, run `merge` on a machine with more host memory, or "
        "raise examine.minutes"
    )


def _logits(scratch: Path, name: str, rows: int, which: str = "logits") -> torch.Tensor:
    return load_file(scratch / f"{name}.safetensors")[which][:rows].double()


def _cut_alike(*logits: torch.Tensor) -> list[torch.Tensor]:
    """Return these logits, [positions, vocabulary], cut to the tokens that all of them have."""
    tokens = min(each.shape[1] for each in logits)
    return [each[:, :tokens] for each in logits]


def _share(merged: torch.Tensor, adapted: torch.Tensor, before: torch.Tensor) -> float:
    """Return how far the merged logits went from those `before` to the `adapted` ones: 1 is all the way."""
    merged, adapted, before = _cut_alike(merged, adapted, before)
    way = adapted - before
    return float(((merged - before) * way).sum() / way.square().sum().clamp(min=1e-300))


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far logits are from others, as a share of what those differ among each other."""
    one, other = _cut_alike(one, other)
    return float((one - other).norm() / (other - other.mean(1, keepdim=True)).norm())
