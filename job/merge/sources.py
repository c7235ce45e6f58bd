"""What a tensor of the merged model is made of, row by row, so that no more of it is in memory than a few rows.

Each is a thing with an outline and rows, made of another such thing: stored numbers, with a low-rank update, and so on.
Numbers that are computed with are float32 from the beginning to the end.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from job.merge.adapter import LowRank
from job.model.shard import Outline, Shard

_BLOCK = 1 << 20  # numbers: 2 MiB of a base in 16 bits, which stay in the cache of a processor
_RANKS = 4  # rows for each rank of an adapter at least, so that its other half is not read again for every few


class Source(Protocol):
    """A tensor that can be asked for rows."""

    @property
    def outline(self) -> Outline:
        """Its shape, and the numbers that it consists of."""

    @property
    def step(self) -> int:
        """How many rows are best asked for at once."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Those from `first` to before `last`, [last - first, …]."""


@dataclass(frozen=True)
class Stored:
    """As it is in a file."""

    file: Shard
    name: str

    @property
    def outline(self) -> Outline:
        return self.file.tensors[self.name]

    @property
    def step(self) -> int:
        return max(1, _BLOCK // max(1, self.outline.row))

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.file.rows(self.name, first, last)


@dataclass(frozen=True)
class Added:
    """The weight of a layer with what LoRA adds to it.

    DoRA (arXiv 2402.09353, equation 5) gives the weights that lead to an output the norm that it has learned.
    """

    of: Source
    update: LowRank
    turned: bool
    """Whether the rows of the weight are inputs, as in embeddings and GPT-2, and not outputs."""

    @property
    def outline(self) -> Outline:
        return Outline(torch.float32, self.of.outline.shape)

    @property
    def step(self) -> int:
        if self.turned and self.update.magnitude is not None:  # whose norms run over all rows
            return self.outline.rows
        return max(self.of.step, _RANKS * self.update.rank)

    def rows(self, first: int, last: int) -> torch.Tensor:
        update = self.update
        weight = self.of.rows(first, last).float()
        if self.turned:
            left, right = _whole(update, update.first)[:, first:last].T, update.read(update.second).T
        else:
            left, right = update.file.rows(update.second, first, last).float(), update.read(update.first)
        made = weight.addmm_(left, right, alpha=update.scale)
        if update.magnitude is None:
            return made
        magnitude = update.read(update.magnitude).view(-1)
        if self.turned:
            return made.mul_(magnitude / torch.linalg.vector_norm(made, dim=0))
        return made.mul_((magnitude[first:last] / torch.linalg.vector_norm(made, dim=1)).unsqueeze(1))


@functools.lru_cache(maxsize=2)
def _whole(update: LowRank, name: str) -> torch.Tensor:
    """A matrix of which columns are wanted, block by block, that lie all over its place in the file."""
    return update.read(name)


@dataclass(frozen=True)
class Trained:
    """An embedding of which some rows are new, at its end perhaps more than it had."""

    of: Source
    indices: Sequence[int]
    values: Source

    @property
    def step(self) -> int:
        return self.of.step

    @property
    def outline(self) -> Outline:
        old = self.of.outline
        return Outline(torch.float32, (max(old.rows, *(index + 1 for index in self.indices)), *old.shape[1:]))

    def rows(self, first: int, last: int) -> torch.Tensor:
        old, width = self.of.outline.rows, self.of.outline.shape[1:]
        made = torch.empty(last - first, *width, dtype=torch.float32)
        if first < old:
            made[: min(last, old) - first] = self.of.rows(first, min(last, old))
        for place, index in enumerate(self.indices):
            if first <= index < last:
                made[index - first] = self.values.rows(place, place + 1)[0]
        return made


@dataclass(frozen=True)
class Shifted:
    """The bias of a layer with what LoRA adds to it."""

    of: Source
    update: LowRank

    @property
    def outline(self) -> Outline:
        return Outline(torch.float32, self.of.outline.shape)

    @property
    def step(self) -> int:
        return self.of.step

    def rows(self, first: int, last: int) -> torch.Tensor:
        added = self.update.file.rows(self.update.bias or "", first, last).float()
        return self.of.rows(first, last).float() + self.update.scale * added
