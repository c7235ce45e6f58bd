"""The parts of a model that sees images, and numbers in a config that may differ from layer to layer."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def sees(described: PretrainedConfig) -> bool:
    """Whether the model that `described` is the config of takes images."""
    return getattr(described, "vision_config", None) is not None


def largest(value: object) -> int:
    """Return the number in a config, or the largest of those that some families list for each layer; 0 for None."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return max(map(largest, value), default=0)
    return int(value) if isinstance(value, int | float) else 0


def language(network: PreTrainedModel) -> str:
    """With what the names of the language model's modules begin, its head's aside; with nothing if that is all."""
    if not sees(network.config):
        return ""
    decoder = network.get_decoder()  # type: ignore[no-untyped-call]
    return next(f"{name}." for name, module in network.named_modules() if module is decoder)


def others(network: PreTrainedModel) -> list[str]:
    """The names of the largest modules that have nothing of the language model in them: the head is one of them."""
    return list(_others(network, "", language(network).rstrip(".")))


def _others(module: nn.Module, name: str, kept: str) -> Iterator[str]:
    for leaf, child in module.named_children():
        inner = f"{name}.{leaf}".lstrip(".")
        if kept != inner and not kept.startswith(f"{inner}."):
            yield inner
        elif kept != inner:
            yield from _others(child, inner, kept)
