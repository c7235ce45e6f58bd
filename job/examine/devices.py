"""Chooses device and number format for each model that is verified, from sizes and free memory."""

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
# Of the slowest machines: operations of a GPU or a core in a second, and bytes over PCI Express.
_FLOPS, _BUS = {"cuda": 3e13, "cpu": 2e10}, 1e10

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

    def seconds(self, size: LoadSize, tokens: int, machine: Machine) -> float:
        """Return about how long a forward pass over so many tokens takes."""
        speed = _FLOPS["cuda"] if self.on_gpu else _FLOPS["cpu"] * machine.cores
        return 2 * size.numbers * tokens / speed + self.offloaded / _BUS


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
    besides = _besides(size, work) + load_size.CONTEXT
    largest = max(range(len(machine.gpus)), key=machine.gpus.__getitem__)
    left = machine.gpus[largest] - besides - size.weights * load_size.ROOM
    if left >= 0:
        return Placement({"": largest}, dtype, *_at_once(size, work, left))
    limits = [(free - besides) / load_size.ROOM for free in machine.gpus]
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
    if not machine.gpus:
        return None
    besides = _besides(size, work) + load_size.CONTEXT
    limits = [(free - besides) / load_size.ROOM for free in machine.gpus]
    host = (machine.host * load_size.HOST_SHARE - PROCESS) / load_size.ROOM
    device_map = load_size.spread(network, size, limits, host)
    if not device_map or set(device_map.values()) == {"cpu"}:
        return None
    return Placement(device_map, "bfloat16", _FEWEST, 1, load_size.offloaded(network, device_map))


def _on_cpu(size: LoadSize, dtype: str, machine: Machine, work: Work) -> Placement | None:
    share = _FLOAT32_SHARE if dtype == "float32" else 1
    left = machine.host * share - least_memory(size, work)
    return Placement({"": "cpu"}, dtype, *_at_once(size, work, left)) if left >= 0 else None


def _besides(size: LoadSize, work: Work) -> float:
    """Return what one forward pass needs besides the weights, with the fewest logits."""
    tokens = max(work.longest, work.prompt)
    return size.passing(tokens) + work.adapter + _FEWEST * size.vocabulary * _LOGIT


def _at_once(size: LoadSize, work: Work, left: float) -> tuple[int, int]:
    """Return how many positions and prompts fit into half of the memory that is `left` each."""
    positions = _FEWEST + int(left / 2 / (size.vocabulary * _LOGIT))
    more = int(left / 2 / max(1.0, work.prompt * (size.token + size.cache)))
    return min(positions, _MOST), max(1, min(work.prompts, 1 + more))
