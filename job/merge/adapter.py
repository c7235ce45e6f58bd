"""The adapter to be merged: which weight each of its tensors changes, and how, as PEFT would compute it.

Everything that is not understood is an error: what a merge leaves out, nobody would notice.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from job import errors
from job.merge.settings import read as settings_in
from job.merge.settings import some
from job.model import saved
from job.model.saved import FILE, SETTINGS
from job.model.shard import Shard

WEIGHT, BIAS = ".weight", ".bias"  # how names of parameters end
_BLOCK = 1 << 22  # numbers looked at in one go

_ASKED = {"magnitude": "use_dora", "bias": "lora_bias"}  # parts of a layer, and the settings that ask for them


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to the weight of a layer: `scale` x B A, and with a magnitude what DoRA makes of the sum."""

    file: Shard
    first: str
    """Called A in the papers: [r, inputs]."""
    second: str
    """B: [outputs, r]."""
    scale: float
    embedding: bool
    """Whether it is of an embedding, whose inputs are the rows of its weight."""
    magnitude: str | None = None
    bias: str | None = None

    @property
    def rank(self) -> int:
        return self.file.tensors[self.first].shape[0]

    @property
    def inputs(self) -> int:
        return self.file.tensors[self.first].shape[1]

    @property
    def outputs(self) -> int:
        return self.file.tensors[self.second].shape[0]

    def same(self, other: "LowRank") -> bool:
        """Whether an embedding and a head, which is the other way round, are changed by the same numbers."""
        ours, theirs = (
            (self.read(self.first), self.read(self.second)),
            (other.read(other.first), other.read(other.second)),
        )
        if self.embedding != other.embedding:
            theirs = theirs[1].T, theirs[0].T
        equal = all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
        return equal and self.scale == other.scale and self.magnitude is None and other.magnitude is None

    def read(self, name: str) -> torch.Tensor:
        """One of its tensors, in float32."""
        return self.file.read(name).float()


@dataclass
class Adapter:
    """An adapter that is whole and finite, by the names that modules and parameters have in the trained model."""

    file: Shard
    settings: Mapping[str, Any]
    layers: dict[str, LowRank] = field(default_factory=dict)
    """By the name of the module."""
    whole: dict[str, str] = field(default_factory=dict)
    """Parameters that were trained or kept whole, and what they are called in the file."""
    tokens: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    """Embeddings of which some rows were trained: their numbers, and what the rows are called in the file."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The adapter in `folder`.

        Raises `errors.ModelError` if it is none that can be merged, is not whole, holds NaN or infinity, or changes
        nothing.
        """
        made = cls(Shard(_there(folder / FILE)), settings_in(_there(folder / SETTINGS)))
        parts: dict[str, dict[str, str]] = {}
        for key in made.file.tensors:
            module, kind = saved.parsed(key)
            if kind == "whole":
                made.whole[module] = key
            elif kind == "tokens":
                made.tokens[module] = (_indices(made.settings, module, made.file.tensors[key].rows), key)
            elif kind != "replaced":
                parts.setdefault(module, {})[kind] = key
        for module, named in parts.items():
            made.layers[module] = _layer(made.file, made.settings, module, named)
        made._check()
        return made

    @property
    def changed(self) -> set[str]:
        """The parameters that it changes."""
        biased = {name + BIAS for name, layer in self.layers.items() if layer.bias}
        return {*(name + WEIGHT for name in (*self.layers, *self.tokens)), *biased, *self.whole}

    def forget(self, names: Iterable[str]) -> None:
        """Leave these parameters as they are."""
        for name in names:
            self.whole.pop(name, None)
            self.layers.pop(name.removesuffix(WEIGHT), None)

    def shift(self, aliases: Mapping[str, str]) -> None:
        """Call modules and parameters by other names where `aliases` has some: those of another transformers."""
        for held in (self.layers, self.tokens):
            for name in [name for name in held if name + WEIGHT in aliases]:
                held[aliases[name + WEIGHT].removesuffix(WEIGHT)] = held.pop(name)  # type: ignore[assignment]
        for name in [name for name in self.whole if name in aliases]:
            self.whole[aliases[name]] = self.whole.pop(name)

    def _check(self) -> None:
        if not self.file.tensors:
            raise errors.ModelError(f"the adapter holds no weights at all: {self.file.path} is empty")
        broken = sorted(key for key in self.file.tensors if not all(torch.isfinite(p).all() for p in self._parts(key)))
        if broken:
            raise errors.ModelError(
                f"the adapter holds NaN or Inf in {len(broken)} weights ({some(broken)}): its training went wrong; "
                "lower train.learning_rate and train again"
            )
        moved = any(part.any() for layer in self.layers.values() for part in self._parts(layer.second))
        other = any(layer.magnitude or layer.bias for layer in self.layers.values())
        if self.layers and not moved and not self.whole and not self.tokens and not other:
            raise errors.ModelError(
                f"the adapter changes nothing: lora_B is zero in all {len(self.layers)} layers, so the merged model "
                "would be the base: it was not trained, or saved without its weights"
            )

    def _parts(self, key: str) -> Iterator[torch.Tensor]:
        outline = self.file.tensors[key]
        step = max(1, _BLOCK // max(1, outline.row))
        for first in range(0, outline.rows, step):
            yield self.file.rows(key, first, min(outline.rows, first + step)).float()  # of 8 bits torch tells nothing


def _layer(file: Shard, settings: Mapping[str, Any], module: str, named: Mapping[str, str]) -> LowRank:
    wanted = {"first", "second"} | {part for part, key in _ASKED.items() if settings.get(key)}
    letters = {"first": "lora_A", "second": "lora_B", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
    if lacking := wanted - named.keys():
        raise errors.ModelError(
            f"the adapter is not whole: {module} lacks {' and '.join(sorted(letters[each] for each in lacking))}: "
            "save or bring it again"
        )
    one, two = file.tensors[named["first"]], file.tensors[named["second"]]
    if len(one.shape) != 2 or len(two.shape) != 2 or one.shape[0] != two.shape[1]:  # noqa: PLR2004 - matrices
        raise errors.ModelError(
            f"the adapter's matrices for {module} are {list(one.shape)} and {list(two.shape)}, where [r, inputs] and "
            "[outputs, r] can be merged: other layers than linear ones and embeddings are merged by PEFT itself"
        )
    if more := sorted(named.keys() - wanted):
        raise errors.ModelError(
            f"the adapter has a {letters[more[0]]} for {module}, and {SETTINGS} does not say {_ASKED[more[0]]}: they "
            "do not belong together"
        )
    for part in sorted(named.keys() & _ASKED.keys()):
        numbers = math.prod(file.tensors[named[part]].shape)
        if numbers != two.shape[0]:
            raise errors.ModelError(
                f"the adapter's {letters[part]} for {module} has {numbers} numbers, and its lora_B {two.shape[0]} "
                "outputs: save or bring it again"
            )
    rank = int(saved.of(settings, "rank_pattern", module, settings["r"]))
    # A head that PEFT keeps tied has the matrices of its embedding, whatever their rank, and the scale of its own.
    others = (
        {settings["r"], *(settings.get("rank_pattern") or {}).values()} if settings.get("ensure_weight_tying") else ()
    )
    if one.shape[0] not in {rank, *others}:
        raise errors.ModelError(
            f"the adapter's matrices for {module} have rank {one.shape[0]}, and {SETTINGS} says {rank}: they do not "
            "belong together"
        )
    alpha = float(saved.of(settings, "alpha_pattern", module, settings["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)  # arXiv 2312.03732 for the root
    embedding = named["first"].endswith(saved.EMBEDDING)
    return LowRank(file, named["first"], named["second"], scale, embedding, named.get("magnitude"), named.get("bias"))


def _indices(settings: Mapping[str, Any], module: str, rows: int) -> list[int]:
    told = settings.get("trainable_token_indices")
    if isinstance(told, Mapping):
        only = next(iter(told.values())) if len(told) == 1 else None  # PEFT saves those of a tied head too
        told = next((each for name, each in told.items() if module.endswith(name)), only)
    if told is None:
        raise errors.ModelError(f"the adapter holds rows of {module}, and {SETTINGS} does not say which: save it again")
    made = list(told)
    if len(made) != rows or len(set(made)) != rows or min(made) < 0:
        raise errors.ModelError(
            f"the adapter holds {rows} rows of {module}, and {SETTINGS} names {len(set(made))} tokens for them"
            f"{', a negative one among them' if min(made, default=0) < 0 else ''}: they do not belong together"
        )
    return made


def _there(path: Path) -> Path:
    if not path.is_file():
        beside = sorted(each.name for each in path.parent.glob("adapter_*"))
        raise errors.ModelError(
            f"the adapter has no {path.name}{f', only {some(beside)}' if beside else ''}: give the folder that PEFT "
            "wrote"
        )
    return path
