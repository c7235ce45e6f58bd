"""The parts of a model that sees images: the one that is a language model, and the others."""

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def sees(described: PretrainedConfig) -> bool:
    """Whether the model that `described` is the config of takes images."""
    return getattr(described, "vision_config", None) is not None


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
