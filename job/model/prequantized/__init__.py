"""Bases that come quantized, by GPTQ (arXiv 2210.17323) or AWQ (arXiv 2306.00978): recognised by their config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from job import errors

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
        return cls("gptq", _bits(told, _BITS), _group(told), int(version == "gptq"))

    @classmethod
    def awq(cls, told: Mapping[str, Any]) -> Self:
        """As AutoAWQ and llm-compressor's successors write it for its GEMM kernels."""
        version = str(told.get("version") or told.get("format") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version {version}, where gemm can be read")
        return cls("awq", _bits(told, (4,)), _group(told), 0)


def recognise(told: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme that the config.json of the base `where` tells of; None if it is not quantized.

    Raises `errors.ModelError` if its weights cannot be trained on.
    """
    quantized = told.get("quantization_config")
    if not quantized:
        return None
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method not in ("gptq", "awq"):
        raise errors.ModelError(
            f"model.base: {where} is quantized already ({method or 'in its own way'}), where gptq and awq can be "
            f"trained on: {_INSTEAD}"
        )
    try:
        return (Scheme.gptq if method == "gptq" else Scheme.awq)(quantized)
    except ValueError as e:
        raise errors.ModelError(f"model.base: {where} is quantized by {method} with {e}: {_INSTEAD}") from e


def _bits(told: Mapping[str, Any], readable: tuple[int, ...]) -> int:
    bits = told.get("bits", told.get("w_bit"))
    if bits not in readable:
        raise ValueError(f"{bits} bits, where {', '.join(map(str, readable))} can be read")
    return int(bits)


def _group(told: Mapping[str, Any]) -> int:
    group = told.get("group_size", told.get("q_group_size"))
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or group > 0):
        raise ValueError(f"group_size {group}, which is no size")
    return group
