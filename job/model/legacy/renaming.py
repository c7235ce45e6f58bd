"""From the names of an old layout to those of the class that it becomes: the weights themselves stay what they are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Renaming:
    """How the weights of a layout are called, and what they become."""

    outside: Mapping[str, str]
    """Of the layers: whole names."""
    layer: re.Pattern[str]
    """What a name in a layer is like: its number, and the rest."""
    inside: Mapping[str, str]
    """Of a layer: names without the layer."""
    mixed: str
    """The layer that holds queries, keys and values in one."""
    computed: re.Pattern[str]
    """What is computed from the config, and not needed."""

    def of(self, name: str, tensor: "torch.Tensor", rows: Sequence[int]) -> "dict[str, torch.Tensor]":
        """What the weight `name` becomes, where queries, keys and values have so many `rows`; nothing if not needed.

        Raises `KeyError` for a name that the layout does not have, and `RuntimeError` if the rows are others.
        """
        names = self.called(name)
        if len(names) != len(rows):
            return dict.fromkeys(names, tensor)
        return dict(zip(names, tensor.split(list(rows)), strict=True))  # type: ignore[no-untyped-call]

    def called(self, name: str) -> list[str]:
        """How that which the weight `name` becomes is called; raises `KeyError` if the layout has no such name."""
        if name in self.outside:
            return [self.outside[name]]
        if self.computed.search(name):
            return []
        found = self.layer.match(name)
        if not found:
            raise KeyError(name)
        layer, inside = f"model.layers.{found[1]}", found[2]
        kind, _, leaf = inside.rpartition(".")
        if kind == self.mixed:
            return [f"{layer}.self_attn.{part}_proj.{leaf}" for part in "qkv"]
        return [f"{layer}.{self.inside[inside]}"]
