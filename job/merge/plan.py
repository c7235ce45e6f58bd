"""Which tensor of the merged model is made of what: the adapter laid over the base's files, name by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from job import config, errors
from job.merge import fit
from job.merge.adapter import BIAS, WEIGHT, Adapter
from job.merge.bases import Returned, Rounded, Unpacked
from job.merge.sources import Added, Shifted, Source, Stored, Trained
from job.model import pieces, weights
from job.model.pieces import Pieces
from job.model.prequantized import PACKED, Scheme
from job.model.shard import Outline


@dataclass(frozen=True)
class Tensor:
    """One of the merged model: its name in the files, the number format that it gets, and what it is made of."""

    name: str
    dtype: torch.dtype
    source: Source
    before: Source | None = None
    """What it was before the adapter, if that changes it."""

    @property
    def outline(self) -> Outline:
        return Outline(self.dtype, self.source.outline.shape)


@dataclass(frozen=True)
class Plan:
    """The merged model."""

    tensors: list[Tensor]
    """In the order in which they are read fastest."""
    untied: bool
    """Whether the head is another matrix than the embedding now, which were one in the base."""
    vocabulary: int | None
    """Rows of the embedding, if they are others than the base's."""
    architecture: str
    """The class of the model, as transformers calls it."""


def of(base: Path, settings: config.Model, adapter: Adapter, dtype: torch.dtype, seen: torch.dtype | None) -> Plan:
    """The model that `adapter` and the base in the folder `base` make, its numbers in `dtype`.

    The adapter is added to the original weights, or to what model.quantization made of them in training, which
    computed in the format `seen`. Raises `errors.ModelError` if they do not fit.
    """
    described, scheme = weights.describe(base, settings)
    try:
        network = pieces.skeleton(described, dtype, trust_remote_code=settings.trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as e:
        raise errors.ModelError(
            f"model.base: transformers makes no language model of {base} ({type(described).__name__}: "
            f"{str(e).partition(chr(10))[0]})"
        ) from e
    files = Pieces(base, torch.device("cpu"), dtype)
    files.call_as(network)
    rounded = weights.quantized(described, settings, seen) if seen and not scheme else frozenset[str]()
    fit.check(adapter, network, files)
    untied = fit.untie(adapter, network, files)
    laid = _Laid(files, network, adapter, settings, scheme, dtype, seen, rounded)
    made = [*laid.tensors(), *laid.parted(untied)]
    laid.check()
    return Plan(made, bool(untied), laid.vocabulary(made), type(network).__name__)


@dataclass
class _Laid:
    """The adapter over the base."""

    files: Pieces
    network: PreTrainedModel
    adapter: Adapter
    settings: config.Model
    scheme: Scheme | None
    dtype: torch.dtype
    seen: torch.dtype | None
    rounded: frozenset[str]
    """Modules that were quantized in training."""
    held: set[str] = field(default_factory=set)
    """Weights of the model that were come by."""
    called: dict[str, str] = field(default_factory=dict)
    """How they are called in the files."""

    def tensors(self) -> Iterator[Tensor]:
        """What becomes of each tensor in the files."""
        at = {name: self.files.place(name) for name in self.files.names}
        packed = {name.removesuffix(f".{PACKED[0]}") for name in at if name.endswith(f".{PACKED[0]}")}
        returned = self._returned()
        for name in sorted(at, key=lambda name: (at[name][0].path, at[name][0].place(at[name][1]))):
            file, called = at[name]
            layer, _, leaf = name.rpartition(".")
            if name in returned:
                made = Returned(self.files, self.network, name, self._source)
                yield Tensor(called, self.dtype, made, Stored(file, called))
            elif layer in packed and leaf in PACKED:
                if leaf == PACKED[0] and self.scheme:
                    stem = called.removesuffix(leaf)
                    yield self._tensor(layer + WEIGHT, f"{stem}weight", Unpacked(self.files, layer, self.scheme))
            else:
                yield self._tensor(name, called, Stored(file, called))

    def parted(self, untied: Mapping[str, str | None]) -> Iterator[Tensor]:
        """Weights that were one with others in the base, and are not any more."""
        for name, other in untied.items():
            if other:
                called = next(iter(revert_weight_conversion(self.network, {name: torch.empty(0, device="meta")})))
                yield self._tensor(name, called, Stored(*self.files.place(other)))

    def check(self) -> None:
        """Raise `errors.ModelError` if something that there should be was not come by."""
        there = self.network.state_dict().keys() - self.network.all_tied_weights_keys.keys()
        if lacking := sorted({*there, *self.adapter.changed} - self.held):
            raise errors.ModelError(
                f"model.base: the model in {self.files.base} lacks {len(lacking)} weights, the first is {lacking[0]}: "
                "it is not whole, or of another architecture than its config.json says"
            )

    def vocabulary(self, made: list[Tensor]) -> int | None:
        """How many rows the embedding has, and the head, if they have others than in the base."""
        names = {self.called[name] for name in self._embeddings() & self.called.keys()}
        rows = {tensor.source.outline.rows for tensor in made if tensor.name in names}
        embedding: Any = self.network.get_input_embeddings()
        old = int(embedding.weight.shape[0])
        if rows <= {old}:
            return None
        if len(rows) > 1:
            raise errors.ModelError(
                f"the embedding and the head would have {' and '.join(map(str, sorted(rows)))} rows: the vocabulary "
                "was changed in training, and the adapter holds only one of the two (PEFT does not save the other "
                "where a LoRA is on one of them); train on a base that was saved after resize_token_embeddings, or "
                "with both in modules_to_save"
            )
        return rows.pop()

    def _returned(self) -> set[str]:
        """Tensors of which transformers makes weights that change."""
        wanted = {*self.adapter.changed, *(name + WEIGHT for name in self.rounded)}
        found: set[str] = set()
        for target in {each.target for each in self.files.changed.values()}:
            made = self.files.made(target, blank=True).keys()
            self.held |= made
            if wanted & made:
                found |= {name for name, each in self.files.changed.items() if each.target == target}
        return found

    def _tensor(self, name: str, called: str, stored: Source) -> Tensor:
        before = self._before(name, stored)
        kind = before.outline.dtype
        if name in self.adapter.changed and not (kind.is_floating_point and kind.itemsize > 1):
            raise errors.ModelError(
                f"model.base: {name} in {self.files.base} has numbers in {str(kind).removeprefix('torch.')}, which "
                "stand for others: use the weights as they were before they were quantized"
            )
        source = self._changed(name, before)
        self.held.add(name)
        self._sized(name, source)
        self.called[name] = called
        return Tensor(called, self._dtype(name, source), source, before if name in self.adapter.changed else None)

    def _source(self, name: str, stored: Source) -> Source:
        return self._changed(name, self._before(name, stored))

    def _before(self, name: str, stored: Source) -> Source:
        """What the adapter is added to in the weight that the model calls `name`, and that is `stored`."""
        if self.seen and name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in self.rounded:
            return Rounded(stored, self.settings, self.seen)
        return stored

    def _changed(self, name: str, before: Source) -> Source:
        adapter, layer = self.adapter, name.removesuffix(WEIGHT).removesuffix(BIAS)
        made, update = before, adapter.layers.get(layer)
        if name in adapter.whole:
            made = Stored(adapter.file, adapter.whole[name])
        if update and name.endswith(WEIGHT):
            made = Added(made, update, turned=not isinstance(self.network.get_submodule(layer), nn.Linear))
        if update and update.bias and name.endswith(BIAS):
            made = Shifted(made, update)
        if layer in adapter.tokens and name.endswith(WEIGHT):
            indices, key = adapter.tokens[layer]
            made = Trained(made, indices, Stored(adapter.file, key))
        return made

    def _sized(self, name: str, source: Source) -> None:
        """Raise `errors.ModelError` if it is not as large as the model says; embeddings may have got other rows."""
        there = self.network.state_dict().get(name)
        if there is None or name in self.files.changed:
            return
        seen, wanted = source.outline.shape, tuple(there.shape)
        if seen != wanted and not (
            name in self._embeddings() and seen[1:] == wanted[1:] and name in self.adapter.changed
        ):
            whose = "adapter" if name in self.adapter.whole else "base"
            raise errors.ModelError(
                f"{name} of the {whose} has the shape {list(seen)}, and {list(wanted)} in the model that config.json "
                "tells of: they do not belong together"
            )
        if isinstance(source, Trained) and not set(range(wanted[0], seen[0])) <= set(source.indices):
            raise errors.ModelError(
                f"the adapter was trained on a base with more tokens than the {wanted[0]} that {name} has rows for, "
                "and does not hold all of the new ones: enlarge the base first (resize_token_embeddings)"
            )

    def _embeddings(self) -> set[str]:
        held = (self.network.get_input_embeddings(), self.network.get_output_embeddings())  # type: ignore[no-untyped-call]
        layers = [name for name, module in self.network.named_modules() if module in held]
        return {name + part for name in layers for part in (WEIGHT, BIAS)}  # Phi's head has a bias

    def _dtype(self, name: str, source: Source) -> torch.dtype:
        """Numbers with a fraction become `dtype`, but those that the model wants in float32, and its constants."""
        there = source.outline.dtype
        if not there.is_floating_point or name in dict(self.network.named_buffers()):
            return there
        kept = self.network._get_dtype_plan(self.dtype)  # noqa: SLF001 - what transformers loads by
        if kept and build_glob_alternation(list(kept))[0].search(name):
            return torch.float32
        return self.dtype
