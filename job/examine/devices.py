"""Chooses device and number format for each model that is verified, from sizes and free memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from job.model import load_size
from job.model.load_size import LoadSize

FORMATS = ("float32", "bfloat16")
"""From the one that shows the smaller fault to the smaller one."""
PROCESS = 10**9
"""Host memory of the program that verifies, before it loads a model."""
_FLOAT32_SHARE = 0.5
"""Of the free host memory: where float32 would need more, a CPU computes in bfloat16."""
_LOGIT = 10  # bytes of a logit while a loss is computed: in 16 bits, in float32, and its softmax
_FEWEST, _MOST = 64, 1024  # positions whose logits are computed at once
# In a second, of slow machines (a T4 in float32, an A10 in bfloat16, one core of a CPU): operations,
# and bytes over PCI Express. They only decide how many examples are read.
_GPU_FLOPS, _CORE_FLOPS, _BUS = {"float32": 4e12, "bfloat16": 3e13}, 2e10, 1e10

Outlined = tuple[PreTrainedModel, LoadSize]


@dataclass(frozen=True)
class Machine:
    """What is free, in bytes."""

    gpus: tuple[int, ...]
    """Of each GPU, in CUDA's order."""
    host: int
    cores: int


@dataclass(frozen=True)
class Work:
    """What a model is asked to do, as far as it costs memory."""

    longest: int
    """Tokens of the longest example."""
    prompts: int
    prompt: int
    """Tokens of the longest prompt with its answer."""
    adapter: int
    """Bytes of the adapter's weights in float32."""


@dataclass(frozen=True)
class Placement:
    """Where a model is and what it computes with."""

    device_map: Mapping[str, int | str]
    """As transformers takes it."""
    dtype: str
    positions: int
    """At which logits are computed at once: more would take more memory."""
    batch: int
    """Prompts that are answered at once."""
    offloaded: float = 0
    """Bytes of weights that are sent to a GPU again for each forward pass."""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return any(isinstance(device, int) for device in self.device_map.values())

    @property
    def fast(self) -> bool:
        """Whether all weights are where the computing happens, on GPUs."""
        return self.on_gpu and not self.offloaded

    def __str__(self) -> str:
        gpus = {device for device in self.device_map.values() if isinstance(device, int)}
        where = f"{len(gpus)} GPUs" if len(gpus) > 1 else "the GPU"
        if not gpus:
            where = "the CPU"
        if self.offloaded:
            where += f", {self.offloaded / 1e9:.0f} GB of weights in host memory"
        return f"{where} in {self.dtype}"

    def seconds(self, size: LoadSize, tokens: int, trained: int, machine: Machine) -> float:
        """Return about how long it takes to measure the loss of an example.

        The example has so many `tokens`, of which so many are `trained`: each chunk of their
        positions takes a forward pass.
        """
        passes = max(1, math.ceil(trained / self.positions))
        speed = _GPU_FLOPS[self.dtype] if self.on_gpu else _CORE_FLOPS * machine.cores
        return passes * (2 * size.numbers * tokens / speed + self.offloaded / _BUS)


def find_placements(
    outline: Callable[[str], Outlined],
    machine: Machine,
    work: Work,
    formats: Sequence[str] = FORMATS,
    *,
    quantized: bool = False,
) -> list[Placement]:
    """Return the placements that fit into the free memory of `machine`, the best first.

    `outline` returns the model without weights in one of the `formats`. Several GPUs share a model
    by layers. Weights that are not quantized may be in host memory where the GPUs are too small;
    for quantized ones transformers refuses that.
    """
    known = {dtype: outline(dtype) for dtype in formats}
    found = [_on_gpus(*known[dtype], dtype, machine, work) for dtype in formats]
    if not quantized and "bfloat16" in known and not any(found):
        found.append(_offloaded(*known["bfloat16"], machine, work))
    found += [_on_cpu(known[dtype][1], dtype, machine, work) for dtype in formats]
    return [each for each in found if each]


def least_memory(size: LoadSize, work: Work) -> float:
    """Return the bytes of host memory without which a model is not opened at all."""
    return size.weights * load_size.ROOM + _besides(size, work) + PROCESS


def _on_gpus(
    network: PreTrainedModel,
    size: LoadSize,
    dtype: str,
    machine: Machine,
    work: Work,
) -> Placement | None:
    if not machine.gpus:
        return None
    limits = _limit_weights(size, work, machine)
    largest = max(range(len(limits)), key=limits.__getitem__)
    left = (limits[largest] - size.weights) * load_size.ROOM
    if left >= 0:
        return Placement({"": largest}, dtype, *_at_once(size, work, left))
    if len(limits) == 1 or sum(limits) < size.weights:
        return None
    device_map = load_size.spread(network, size, limits)
    if not device_map:
        return None
    # The GPUs are not filled alike, so only half of what is left is counted on.
    unused = (sum(limits) - size.weights) * load_size.ROOM / len(limits) / 2
    return Placement(device_map, dtype, *_at_once(size, work, unused))


def _offloaded(
    network: PreTrainedModel,
    size: LoadSize,
    machine: Machine,
    work: Work,
) -> Placement | None:
    """Return a placement partly in host memory.

    Every forward pass sends those weights to a GPU again, which takes seconds. So logits at many
    positions are computed at once, if need be at the cost of a few more weights in host memory.
    """
    host = (machine.host * load_size.HOST_SHARE - PROCESS) / load_size.ROOM
    for positions in (_MOST, _FEWEST) if machine.gpus else ():
        limits = _limit_weights(size, work, machine, positions)
        device_map = load_size.spread(network, size, limits, host)
        if device_map and set(device_map.values()) != {"cpu"}:
            offloaded = load_size.offloaded(network, device_map)
            return Placement(device_map, "bfloat16", positions, 1, offloaded)
    return None


def _on_cpu(size: LoadSize, dtype: str, machine: Machine, work: Work) -> Placement | None:
    share = _FLOAT32_SHARE if dtype == "float32" else 1
    left = machine.host * share - least_memory(size, work)
    return Placement({"": "cpu"}, dtype, *_at_once(size, work, left)) if left >= 0 else None


def _limit_weights(size: LoadSize, work: Work, machine: Machine, positions: int = _FEWEST) -> list[float]:
    """Return the bytes of weights that each GPU can hold."""
    besides = _besides(size, work, positions) + load_size.CONTEXT
    return [(free - besides) / load_size.ROOM for free in machine.gpus]


def _besides(size: LoadSize, work: Work, positions: int = _FEWEST) -> float:
    """Return what a forward pass needs besides the weights, with logits at so many `positions`."""
    tokens = max(work.longest, work.prompt)
    return size.passing(tokens) + work.adapter + positions * size.vocabulary * _LOGIT


def _at_once(size: LoadSize, work: Work, left: float) -> tuple[int, int]:
    """Return how many positions and prompts fit into half of the memory that is `left` each."""
    positions = _FEWEST + int(left / 2 / (size.vocabulary * _LOGIT))
    more = int(left / 2 / max(1.0, work.prompt * (size.token + size.cache)))
    return min(positions, _MOST), max(1, min(work.prompts, 1 + more))
