"""Bases that come quantized, by GPTQ (arXiv 2210.17323) or AWQ (arXiv 2306.00978): recognised by their config.json."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from job import errors

PACKED = ("qweight", "qzeros", "scales", "g_idx")  # what a layer has in place of its weight
_EXPERT = re.compile(r"\.experts?\.\d+\.")
_BITS = (2, 4, 8)
_INSTEAD = "use the original weights, which model.quantization makes small"


@dataclass(frozen=True)
class Scheme:
    """How the weights of linear layers are packed into 32-bit integers."""

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    """Weights of a row that share a scale and a zero point; -1: all of them."""
    offset: int
    """What was taken off the zero points before they were packed: 1 in the first format of GPTQ."""

    def __str__(self) -> str:
        return f"{self.method}, {self.bits} bits, groups of {self.group if self.group > 0 else 'a row'}"

    def packed(self, inputs: int, outputs: int) -> tuple[int, int]:
        """The shape of a layer's packed weights."""
        each = 32 // self.bits
        return (inputs // each, outputs) if self.method == "gptq" else (inputs, outputs // each)

    def unpacked(self, rows: int, columns: int) -> tuple[int, int]:
        """The inputs and the outputs of a layer whose packed weights have that shape."""
        each = 32 // self.bits
        return (rows * each, columns) if self.method == "gptq" else (rows, columns * each)

    @classmethod
    def gptq(cls, told: Mapping[str, Any]) -> Self:
        """As AutoGPTQ and GPTQModel write it."""
        version = str(told.get("checkpoint_format") or told.get("format") or "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise ValueError(f"format {version}, where gptq and gptq_v2 can be read")
        if told.get("dynamic"):
            raise ValueError("layers that are quantized in different ways (dynamic)")
        if told.get("is_marlin_format"):
            raise ValueError("format marlin, where gptq and gptq_v2 can be read")
        return cls("gptq", _bits(told, _BITS), _group(told), int(version == "gptq"))

    @classmethod
    def awq(cls, told: Mapping[str, Any]) -> Self:
        """As AutoAWQ and llm-compressor's successors write it for its GEMM kernels."""
        version = str(told.get("version") or told.get("checkpoint_format") or told.get("format") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version {version}, where gemm can be read")
        return cls("awq", _bits(told, (4,)), _group(told), 0)


def recognise(told: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme that the config.json of the base `where` tells of; None if it is not quantized.

    Raises `errors.ModelError` if its weights cannot be trained on.
    """
    quantized = told.get("quantization_config")
    if not quantized and not _elsewhere(told):
        return None
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if not isinstance(quantized, dict) or method not in ("gptq", "awq"):
        raise errors.ModelError(
            f"model.base: {where} is quantized already ({method or 'in its own way'}), where gptq and awq can be "
            f"trained on: {_INSTEAD}"
        )
    try:
        return (Scheme.gptq if method == "gptq" else Scheme.awq)(quantized)
    except ValueError as e:
        raise errors.ModelError(f"model.base: {where} is quantized by {method} with {e}: {_INSTEAD}") from e


def check(names: Collection[str], scheme: Scheme, where: str) -> None:
    """Raise `errors.ModelError` if the tensors called `names`, in the files of the base, cannot be used so."""
    packed = [name for name in names if name.endswith(f".{PACKED[0]}")]
    if names and not packed:
        raise errors.ModelError(
            f"model.base: the config.json of {where} tells of quantized weights ({scheme}), and its files hold none: "
            "take quantization_config out of it"
        )
    experts = [name for name in packed if _EXPERT.search(name)]
    if experts:
        raise errors.ModelError(
            f"model.base: the experts of {where} are quantized one by one ({experts[0]}), where transformers keeps all "
            f"of a layer in one: {_INSTEAD}"
        )


def _elsewhere(told: Mapping[str, Any]) -> bool:
    """Whether it says so in a place that we do not read."""
    parts = (told, *(each for each in told.values() if isinstance(each, dict)))
    return any(part.get("compression_config") or part.get("quantization_config") for part in parts)


def _bits(told: Mapping[str, Any], readable: tuple[int, ...]) -> int:
    bits = told.get("bits", told.get("w_bit"))
    bits = int(bits) if isinstance(bits, str) and bits.isdecimal() else bits
    if bits not in readable:
        raise ValueError(f"{bits} bits, where {', '.join(map(str, readable))} can be read")
    return int(bits)


def _group(told: Mapping[str, Any]) -> int:
    group = told.get("group_size", told.get("q_group_size"))
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or group > 0):
        raise ValueError(f"group_size {group}, which is no size")
    return group
