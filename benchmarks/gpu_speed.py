"""Speed and memory of single training steps on one device, and whether a preset fits its card."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from gpu_base import make_base
from gpu_scale import Scale, keep_row
from gpu_steps import (
    RECIPE,
    Batch,
    adapt,
    free_memory,
    load,
    make_batch,
    run_step,
    synchronize,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from job import config
from job.launch import strategy
from job.model import measure
from job.model.tokenizer import IGNORED

_PRESET = Path(__file__).parent.parent / "configs" / "qwen2.5-7b-instruct-qlora-24gb.yaml"
_PRESET_CARD = 24 * 2**30
_CONTEXT = 10**9  # bytes that `strategy.estimate` counts for CUDA, which torch does not allocate
_PRESET_STEPS = 2  # the optimizer makes its state in the first


def check_preset_fits(scale: Scale, work: Path) -> dict[str, Any]:
    """Train a preset of a 24 GB card for two steps within that much memory.

    The model has the preset's shape and random weights, the batch its size and length.
    """
    folder = work / "preset"
    folder.mkdir(exist_ok=True)
    try:
        base = make_base(scale, scale.preset_layers, folder)
        free_memory()
        with _limit_memory(scale, _PRESET_CARD - _CONTEXT):
            return _train_preset(scale, base)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # 15 GB
        free_memory()


def _train_preset(scale: Scale, base: Path) -> dict[str, Any]:
    """Return peaks of memory, and the job's estimate of what torch allocates.

    The estimate also counts CUDA itself and the optimizer's paged state, which torch does not.
    """
    length = min(config.read(_PRESET).data.max_length, scale.lengths[-1])
    settings = config.read(_PRESET, [f"model.base={base}", f"data.max_length={length}"])
    need = strategy.estimate(settings, measure.measure(base, settings))
    estimated = need.on_each(1) - _CONTEXT - need.optimizer
    _reset_peak()
    model = adapt(load(base, RECIPE), settings.lora)
    loading = _read_peak()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained)  # train.optimizer of the preset
    batch = make_batch(scale, settings.train.micro_batch_size, length, packed=False)
    _reset_peak()
    for _ in range(_PRESET_STEPS):
        seconds = run_step(model, batch)
        optimizer.step()
    synchronize()
    return {
        "preset": _PRESET.name,
        "layers": scale.preset_layers,
        "micro_batch": settings.train.micro_batch_size,
        "length": length,
        "estimated_gib": round(estimated / 2**30, 2),
        "loading": loading,
        "training": {**_read_peak(), **_describe_speed(batch, seconds)},
    }


@contextlib.contextmanager
def _limit_memory(scale: Scale, limit: int) -> Iterator[None]:
    """Let torch allocate no more than `limit` bytes on the GPU; RuntimeError if it does."""
    if scale.device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        _require_limit(limit)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _require_limit(limit: int) -> None:
    """Raise RuntimeError if more than `limit` bytes can be allocated."""
    try:
        torch.empty(limit + 1, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return
    raise RuntimeError(f"torch allocates more than its limit of {limit} bytes")


def check_speed(scale: Scale, work: Path) -> dict[str, Any]:
    """Measure tokens/s and peak memory of micro batches for two numbers of layers, and profile.

    Both grow by the same amount for each layer, so the rows give those of a model of any depth.
    """
    rows = []
    for layers in dict.fromkeys((scale.few_layers, scale.layers)):
        model = adapt(load(make_base(scale, layers, work), RECIPE))
        for micro_batch in scale.micro_batches:
            for packed in (False, True):
                batch = make_batch(scale, micro_batch, scale.lengths[-1] // 2, packed=packed)
                row = {"layers": layers, "micro_batch": micro_batch, "packed": packed}
                rows.append(row | _measure_or_explain(model, batch, profiled=not packed))
                keep_row(work, rows[-1])
        del model
    if not any("tokens_per_second" in row for row in rows):
        raise RuntimeError(f"no micro batch could be measured: {rows[0]['error']}")
    return {"rows": rows}


def _measure_or_explain(model: PreTrainedModel, batch: Batch, *, profiled: bool) -> dict[str, Any]:
    """Return the figures of a step, as far as there are any, and why there are no more."""
    figures: dict[str, Any] = {}
    try:
        figures |= _measure(model, batch)
        if profiled:
            figures |= _profile(model, batch, figures["seconds"])
    except RuntimeError as e:  # out of memory, or a driver that lets nobody look
        figures["error"] = str(e)[:200]
    if "error" in figures:  # only now: the exception held the tensors of the step
        model.zero_grad()
        free_memory()
    return figures


def _measure(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    run_step(model, batch)  # compiles the kernels
    _reset_peak()
    seconds = run_step(model, batch)
    return {**_describe_speed(batch, seconds), **_read_peak()}


def _describe_speed(batch: Batch, seconds: float) -> dict[str, Any]:
    tokens = int((batch["labels"] != IGNORED).sum())
    return {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 4)}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _read_peak() -> dict[str, float]:
    """Return the most that tensors took since `_reset_peak`, and what torch reserved for them."""
    if not torch.cuda.is_available():
        return {}
    peaks = {
        "peak_gib": torch.cuda.max_memory_allocated(),
        "reserved_gib": torch.cuda.max_memory_reserved(),
    }
    return {name: round(size / 2**30, 2) for name, size in peaks.items()}


def _profile(model: PreTrainedModel, batch: Batch, seconds: float) -> dict[str, Any]:
    """Profile one step; `seconds` are those of a step that the profiler does not slow down."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run_step(model, batch)
    return summarize_profile(profiler.key_averages(), seconds)


def summarize_profile(averages: Iterable[Any], seconds: float) -> dict[str, Any]:
    """Return the share of a step's `seconds` in which kernels run, and how many there are.

    Operations on the CPU report the time of the kernels that they start once more, and annotations
    the time of all kernels within them: only the kernels themselves are added up.
    """
    events = list(averages)
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6  # of microseconds
    return {
        "kernel_share": round(busy / seconds, 3),
        "kernels": sum(event.count for event in kernels),
        "operations": sum(event.count for event in operations),
    }
