"""Two processes that share one device, and the clock that finds the slower of them.

NCCL refuses two processes on one GPU. gloo does not: it copies CUDA tensors through host memory. So
FSDP2's own kernels and streams run here as with two GPUs, and only the transport differs.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from gpu_scale import Scale
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from job import errors
from job.train import packed_weights
from job.train.pace import Pace

_PROCESSES = 2
_TOKENS = 64
_STORAGES = (torch.uint8, torch.bfloat16)  # ours, and the one that CUDA's copies damage
_DELAY_SECONDS = 0.1
_LEAST_SECONDS = _DELAY_SECONDS / 5  # of a delay: a GPU that raises its clock spins for less
_WAITED = 0.7  # of the slow layers' seconds: not for the last, and both do not begin at once
_SLACK = 1.05  # between the GPU's clock and the host's
_LAYERS = 6  # on a GPU the gather of the fourth is the first that waits for the first to compute
_SHORT_PASSES = 5000  # more passes than `Pace` keeps before it adds them up
_CALIBRATION_CYCLES = 20_000_000


class _Block(nn.Module):
    """A norm and a 4-bit layer, as in a decoder block."""

    def __init__(self, scale: Scale, storage: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(scale.hidden, dtype=torch.bfloat16))
        self.linear = bnb.nn.Linear4bit(
            scale.hidden, scale.intermediate, bias=False, compute_dtype=torch.bfloat16,
            quant_type="nf4", quant_storage=storage,
        )  # fmt: skip
        self.linear.support_avx512bf16_for_cpu = False  # it would repack the weights
        self.requires_grad_(requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(hidden * self.norm)
        return result


class _Layer(nn.Module):
    """A frozen linear layer that keeps its device busy for some more seconds."""

    def __init__(self, scale: Scale, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(scale.hidden, scale.hidden, bias=False, device=scale.device)
        self.requires_grad_(requires_grad=False)
        self._seconds = seconds
        on_gpu = scale.device == "cuda" and seconds > 0
        self._cycles = int(seconds * _measure_cycles_per_second()) if on_gpu else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(hidden)
        if self._cycles:
            torch.cuda._sleep(self._cycles)  # noqa: SLF001 - a kernel that only spins
        elif self._seconds:
            time.sleep(self._seconds)
        return result


def check_two_processes(scale: Scale, work: Path) -> dict[str, Any]:
    """Shard 4-bit weights between two processes on one device; bytes and results must stay.

    Then one of them is slow: the time that the other one waits for it must not count as its own.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        torch.multiprocessing.spawn(_run_rank, (scale, Path(folder)), nprocs=_PROCESSES)
        ranks = [_read_figures(Path(folder), rank) for rank in range(_PROCESSES)]
    stored = {str(dtype): ranks[0]["stored"][str(dtype)] for dtype in _STORAGES}
    figures = {
        "backend": "gloo",
        "stored": stored,
        "premise_confirmed": stored["torch.bfloat16"] != "same output",
        "layer_seconds": [rank["layer_seconds"] for rank in ranks],
        "pass_seconds": [rank["pass_seconds"] for rank in ranks],
    }
    if any(rank["stored"]["torch.uint8"] != "same output" for rank in ranks):
        raise RuntimeError(f"bytes or results changed between two processes: {figures}")
    require_straggler(figures["layer_seconds"], figures["pass_seconds"])
    return figures


def require_straggler(layer_seconds: list[float], pass_seconds: list[float]) -> None:
    """Raise RuntimeError unless rank 0 waited for rank 1, and only rank 1's layers took long.

    Without the wait, clocks that count it would look right too.
    """
    fast, slow = layer_seconds
    figures = f"seconds of layers {layer_seconds}, of the whole pass {pass_seconds}"
    if not slow > _LEAST_SECONDS or pass_seconds[0] < slow * _WAITED:
        raise RuntimeError(f"rank 0 did not wait for rank 1, so nothing was tested: {figures}")
    if fast >= slow / 2:
        raise RuntimeError(f"the clocks do not show that only rank 1 is slow: {figures}")


def check_pace(scale: Scale, work: Path) -> dict[str, Any]:  # noqa: ARG001 - called as all checks
    """Compare the clock of a forward pass with the host's; on a GPU the host must not wait."""
    slow = _Layer(scale, _DELAY_SECONDS)
    hidden = torch.zeros(_TOKENS, scale.hidden, device=scale.device)
    slow(hidden)  # the first pass loads kernels
    _synchronize(scale)
    pace = Pace(slow)
    begun = time.monotonic()
    slow(hidden)
    returned = time.monotonic() - begun
    _synchronize(scale)
    ended = time.monotonic() - begun
    taken, again = pace.taken(), pace.taken()
    figures = {"taken": taken, "host_returned": returned, "host_ended": ended}
    if not (ended > _LEAST_SECONDS and ended / 2 < taken <= ended * _SLACK) or again:
        raise RuntimeError(f"the clock is wrong, or {again} s are left in it: {figures}")
    if scale.device == "cuda" and returned > ended / 2:
        raise RuntimeError(f"measuring makes the host wait: {figures}")
    return {**figures, **_measure_short_passes(scale, hidden)}


def _measure_short_passes(scale: Scale, hidden: torch.Tensor) -> dict[str, float]:
    """Return seconds per pass without and with the clock, and those that the clock counts."""
    layer = _Layer(scale, 0.0)
    without = _time_passes(scale, layer, hidden)
    pace = Pace(layer)
    measured = _time_passes(scale, layer, hidden)
    counted = pace.taken() / _SHORT_PASSES
    figures = {"pass_seconds": without, "measured_pass_seconds": measured, "counted": counted}
    if not 0 < counted <= measured * _SLACK:
        raise RuntimeError(f"the clock counts more than passed: {figures}")
    return figures


def _time_passes(scale: Scale, layer: nn.Module, hidden: torch.Tensor) -> float:
    layer(hidden)
    _synchronize(scale)
    begun = time.monotonic()
    for _ in range(_SHORT_PASSES - 1):
        layer(hidden)
    _synchronize(scale)
    return (time.monotonic() - begun) / _SHORT_PASSES


def _run_rank(rank: int, scale: Scale, folder: Path) -> None:
    """Do the part of one of the two processes, and write its figures into the `folder`."""
    torch.set_num_threads(1)
    if scale.device == "cuda":
        torch.zeros(1, device="cuda")  # or the mesh chooses a GPU by the rank
    meeting = (folder / "meeting").as_uri()
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=_PROCESSES)
    with torch.no_grad():
        stored = {str(storage): _shard_block(scale, storage) for storage in _STORAGES}
        layers, whole = _time_layers(scale, slow=rank == 1)
    figures = {"stored": stored, "layer_seconds": layers, "pass_seconds": whole}
    (folder / f"{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _read_figures(folder: Path, rank: int) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
    return figures


def _shard_block(scale: Scale, storage: torch.dtype) -> str:
    """Return whether a sharded block computes what the whole one did, or why it was refused."""
    torch.manual_seed(0)
    block = _Block(scale, storage).to(scale.device)
    hidden = torch.randn(_TOKENS, scale.hidden).to(scale.device, torch.bfloat16)
    expected = block(hidden)
    recorded = packed_weights.record_packed_block("block", block)
    assert recorded is not None
    fully_shard(block, mesh=init_device_mesh(scale.device, (_PROCESSES,)))
    try:
        packed_weights.check_packed_block(block, recorded)
    except errors.PermanentError as e:
        return str(e)
    return "same output" if torch.equal(block(hidden), expected) else "other output"


def _time_layers(scale: Scale, *, slow: bool) -> tuple[float, float]:
    """Return the seconds of this process's own sharded layers in a pass, and of the whole pass.

    Only the first layer is slow. Gathers run on streams of their own: each waits until the weights
    of the layer before the last were copied, which follows the computing of the one before that.
    """
    seconds = _DELAY_SECONDS if slow else 0.0
    layers = nn.Sequential(_Layer(scale, seconds), *(_Layer(scale, 0.0) for _ in range(1, _LAYERS)))
    distributed.barrier()  # the cycles of a second are counted while the other one is idle
    mesh = init_device_mesh(scale.device, (_PROCESSES,))
    for module in (*layers, layers):
        fully_shard(module, mesh=mesh)
    pace = Pace(layers)
    hidden = torch.zeros(_TOKENS, scale.hidden, device=scale.device)
    layers(hidden)  # the first pass sets FSDP2 up
    _synchronize(scale)
    pace.taken()
    distributed.barrier()  # both begin together: rank 0 can only wait inside the pass
    begun = time.monotonic()
    layers(hidden)
    _synchronize(scale)
    whole = time.monotonic() - begun
    return pace.taken(), whole


def _measure_cycles_per_second() -> float:
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # noqa: SLF001 - until the GPU has raised its clock
    torch.cuda.synchronize()
    begun = time.monotonic()
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # noqa: SLF001
    torch.cuda.synchronize()
    return _CALIBRATION_CYCLES / (time.monotonic() - begun)


def _synchronize(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.synchronize()
