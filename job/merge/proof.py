"""A sample of what was written, computed once more in float64, straight from the formulas."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from job import errors, log
from job.merge.plan import Tensor
from job.merge.shards import Shards
from job.merge.sources import Added, Shifted, Source, Trained
from job.model.shard import Shard

_ROWS = 8  # of each weight
_WHOLE = 8  # large weights of which no part can be had without the rest
_LARGE = 1 << 24  # bytes
_FLOAT32 = 2e-6  # error of a sum in float32, as a share of what is summed


@dataclass(frozen=True)
class Proof:
    """What was looked at, and how much of it the adapter changed."""

    weights: int
    numbers: int
    changed: int

    def __str__(self) -> str:
        return (
            f"{self.numbers:,} numbers of {self.weights} weights are the sum in float64, rounded; "
            f"{self.changed / self.numbers:.0%} of them differ from the base's"
        )


def check(shards: Shards, folder: Path) -> Proof:
    """Compare rows of every weight that changed, as they are in `folder`, with what they should be.

    Raises `errors.ModelError` if one is not, or if after rounding nothing has changed at all.
    """
    weights = numbers = changed = whole = 0
    for name, tensors in shards.items():
        file = Shard(folder / name)
        for tensor in tensors:
            costly = tensor.source.step >= tensor.outline.rows and tensor.outline.size > _LARGE
            if tensor.before is None or (costly and whole >= _WHOLE):
                continue
            weights, whole = weights + 1, whole + costly
            for row in _sample(tensor):
                got = file.rows(tensor.name, row, row + 1)
                _compare(tensor, got, row)
                changed += int((got != _row(tensor.before, row).to(got.dtype)).sum())
                numbers += got.numel()
    if not changed and not any(
        _differs(tensor, Shard(folder / name)) for name, held in shards.items() for tensor in held
    ):
        raise errors.ModelError(
            f"the adapter changes nothing: what it adds is too small for the merged model's number format, in all "
            f"{weights} weights: set merge.dtype float32, or train longer"
        )
    made = Proof(weights, numbers, changed)
    log.event("merge.checked", f"checked: {made}", weights=weights, numbers=numbers, changed=changed)
    return made


def _differs(tensor: Tensor, file: Shard) -> bool:
    """Whether the adapter changed any number at all of it: of an embedding it may be a few rows."""
    if tensor.before is None:
        return False
    if tensor.before.outline.rows != tensor.outline.rows:
        return True
    starts = range(0, tensor.outline.rows, tensor.before.step)
    ends = (min(start + tensor.before.step, tensor.outline.rows) for start in starts)
    return any(
        not torch.equal(file.rows(tensor.name, start, end), tensor.before.rows(start, end).to(tensor.dtype))
        for start, end in zip(starts, ends, strict=True)
    )


def _compare(tensor: Tensor, got: torch.Tensor, row: int) -> None:
    exact, size = _exact(tensor.source, row)
    allowed = torch.finfo(got.dtype).eps / 2 * exact.abs() * 1.01 + _FLOAT32 * size + torch.finfo(got.dtype).tiny
    off = (got.double() - exact).abs() - allowed
    if not bool((off <= 0).all()):  # NaN too
        raise errors.ModelError(
            f"{tensor.name} of the merged model is not what it should be: in row {row} it is off by "
            f"{float((got.double() - exact).abs().max()):.3g}, where rounding allows {float(allowed.max()):.3g}: the "
            "disk or the memory of this machine is damaged, or the job has a fault"
        )


def _exact(source: Source, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of `source` in float64, [1, …], and how large the numbers are that it is the sum of."""
    if isinstance(source, Trained) and row in source.indices:
        return _exact(source.values, len(source.indices) - 1 - list(reversed(source.indices)).index(row))
    if isinstance(source, Trained):
        return _exact(source.of, row)
    if isinstance(source, Shifted):
        exact, size = _exact(source.of, row)
        added = source.update.scale * source.update.read(source.update.bias or "").double()[row : row + 1]
        return exact + added, size + added.abs()
    if not isinstance(source, Added):
        stored = source.rows(row, row + 1).double()
        return stored, stored.abs()
    first, second = (source.update.read(key).double() for key in (source.update.first, source.update.second))
    if source.turned and source.update.magnitude:
        before = source.of.rows(0, source.outline.rows).double()
    else:
        before, _ = _exact(source.of, row)
    place = slice(None) if len(before) > 1 else slice(row, row + 1)
    factors = (first[:, place].T, second.T) if source.turned else (second[place], first)
    exact = before + source.update.scale * (factors[0] @ factors[1])
    size = before.abs() + abs(source.update.scale) * (factors[0].abs() @ factors[1].abs())
    if source.update.magnitude:
        magnitude = source.update.read(source.update.magnitude).double().view(-1)
        factor = magnitude / exact.norm(dim=0) if source.turned else magnitude[row] / exact.norm()
        exact, size = exact * factor, size * factor.abs()
    return (exact[row : row + 1], size[row : row + 1]) if len(exact) > 1 else (exact, size)


def _row(before: Source, row: int) -> torch.Tensor:
    """What it was, which is equal to nothing where there was none."""
    return before.rows(row, row + 1) if row < before.outline.rows else torch.full((1, before.outline.row), torch.nan)


def _sample(tensor: Tensor) -> Iterable[int]:
    rows = range(tensor.outline.rows)
    if isinstance(tensor.source, Trained):
        rows_changed = sorted(set(tensor.source.indices))
        return rows_changed[:_ROWS]
    return sorted({rows[0], rows[-1], *random.Random(tensor.name).choices(rows, k=_ROWS - 2)})  # noqa: S311 - a sample
