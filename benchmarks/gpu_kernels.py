"""Kernels and single steps on one device: copies, the loss, determinism, speed and memory."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed.fsdp  # registers torch.ops.fsdp
from gpu_base import make_base
from gpu_scale import PROGRESS, Scale
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from job import config
from job.model import lora, weights
from job.model.tokenizer import IGNORED
from job.train.packed_weights import find_changed_patterns

_STORAGES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_LOSS_TOKENS, _IGNORED_EVERY = 160, 5
_TOLERANCE = 2e-2  # of bfloat16 products against float64, as a share of the largest value
_RECIPE = {"quantization": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
_WITHOUT_COMPILER = """
import os, torch
from trl.kernels.chunked_logprob import *
from trl.trainer.utils import add_fused_lm_head
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
model = LlamaForCausalLM(config).to("cuda")
add_fused_lm_head(model, outputs=("log_probs",))
ids = torch.arange(32, device="cuda")[None]
model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
"""


def check_machine(scale: Scale, work: Path) -> dict[str, Any]:
    """Return versions and hardware, and how long the base models take to make."""
    packages = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cpus": os.cpu_count(),
    }
    if scale.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "built_for": torch.cuda.get_arch_list(),
            "cuda": torch.version.cuda,
            "free_gib": round(free / 2**30, 1),
            "total_gib": round(total / 2**30, 1),
        }
    begun = time.monotonic()
    make_base(scale, scale.few_layers, work)
    return {**found, "base_seconds": round(time.monotonic() - begun, 1)}


def check_copy_kernels(scale: Scale, work: Path) -> dict[str, Any]:  # noqa: ARG001 - all checks are called alike
    """Count the 16-bit patterns that the copies of a sharded model change; bytes must stay."""
    device = torch.device(scale.device)
    changed = {str(dtype): find_changed_patterns(dtype, device) for dtype in _STORAGES}
    _require(changed["torch.uint8"] == 0, f"the copy changes bytes: {changed}")
    return {"changed_patterns": changed}


def check_gathered_block(scale: Scale, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """Gather a 4-bit weight with FSDP2's own copies, as two ranks would; its bytes must stay."""
    damaged = {}
    for storage in _STORAGES:
        torch.manual_seed(0)
        linear = bnb.nn.Linear4bit(
            scale.hidden, scale.intermediate, bias=False, quant_type="nf4", quant_storage=storage
        )
        packed = linear.to(scale.device).weight.data.flatten()
        gathered = _gather_like_fsdp(packed)
        wrong = gathered.view(torch.uint8) != packed.view(torch.uint8)
        damaged[str(storage)] = float(wrong.float().mean())
    _require(damaged["torch.uint8"] == 0, f"gathered bytes differ: {damaged}")
    return {"share_of_bytes_changed": damaged}


def _gather_like_fsdp(packed: torch.Tensor) -> torch.Tensor:
    """Return what two ranks with a half of `packed` each gather, by FSDP2's copy-in and copy-out."""
    halves = packed.chunk(2)
    size = halves[0].numel()
    buffer = torch.empty(2 * size, dtype=packed.dtype, device=packed.device)
    for rank, half in enumerate(halves):  # the collective between them moves bytes
        torch.ops.fsdp.all_gather_copy_in([half], buffer, [size], size, rank)
    result = torch.empty_like(buffer)
    torch.ops.fsdp.split_with_sizes_copy(buffer.view(2, -1), [size], dim=1, out=[result.view(2, -1)])
    return result


def check_compiler(scale: Scale, work: Path) -> dict[str, Any]:
    """Run the loss without a C compiler on PATH, and with one; the second must work."""
    if scale.device != "cuda":
        return {"skipped": "the loss is a Triton kernel on a GPU only"}
    outcomes = {}
    for name, path in (("without", str(work)), ("with", os.environ["PATH"])):
        cache = work / f"triton-{name}"
        environ = {**os.environ, "PATH": path, "TRITON_CACHE_DIR": str(cache)}
        if name == "without":
            environ.pop("CC", None)
        begun = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", _WITHOUT_COMPILER],
            env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        outcomes[name] = {
            "status": ended.returncode,
            "seconds": round(time.monotonic() - begun, 1),
            "last": ended.stderr.strip().splitlines()[-1:],
        }
    _require(outcomes["with"]["status"] == 0, f"the loss fails with a compiler: {outcomes}")
    return outcomes


def check_loss_kernel(scale: Scale, work: Path) -> dict[str, Any]:
    """Compare loss and gradient of TRL's fused head with full logits in float64."""
    model = _load(make_base(scale, scale.few_layers, work), {"quantization": "none"})
    head = model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    ids = torch.randint(scale.vocabulary, (1, _LOSS_TOKENS), device=scale.device)
    labels = ids.clone()
    labels[:, ::_IGNORED_EVERY] = IGNORED
    add_fused_lm_head(model, outputs=("log_probs",))
    states: list[torch.Tensor] = []

    def keep(_module: object, _arguments: object, output: Any) -> None:  # noqa: ANN401
        output.last_hidden_state.requires_grad_().retain_grad()
        states.append(output.last_hidden_state)

    model.base_model.register_forward_hook(keep)
    loss = -model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum()
    loss.backward()

    hidden = states[0].detach().double().requires_grad_()
    logits = hidden[0, :-1] @ head.double().T
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    expected.backward()
    gradient, reference = states[0].grad, hidden.grad
    _require(gradient is not None and reference is not None, "no gradient reached the head's input")
    assert gradient is not None and reference is not None  # noqa: PT018 - for the types
    off = float((gradient.double() - reference).abs().max() / reference.abs().max())
    loss_off = abs(float(loss) / float(expected) - 1)
    _require(max(off, loss_off) < _TOLERANCE, f"loss off by {loss_off:.2e}, gradient by {off:.2e}")
    return {"loss_off": loss_off, "gradient_off": off, "tolerance": _TOLERANCE}


def check_determinism(scale: Scale, work: Path) -> dict[str, Any]:
    """Do each step twice, with and without deterministic kernels; with them all bits must be equal."""
    model = _adapt(_load(make_base(scale, scale.few_layers, work), _RECIPE))
    figures = []
    for length in scale.lengths:
        for packed in (False, True):
            batch = _make_batch(scale, 2, length, packed=packed)
            row: dict[str, Any] = {"length": length, "packed": packed}
            for deterministic in (False, True):
                with _deterministic(deterministic):
                    key = "deterministic" if deterministic else "default"
                    row[key] = _compare_two_steps(model, batch)
            row["cost"] = row["deterministic"]["seconds"] / row["default"]["seconds"]
            figures.append(row)
    varying = [row for row in figures if not row["deterministic"]["equal"]]
    _require(not varying, f"deterministic kernels gave other bits: {varying}")
    return {"steps": figures}


def _compare_two_steps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    first, _ = _compute_gradients(model, batch)
    second, seconds = _compute_gradients(model, batch)
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    return {"equal": not unequal, "unequal": len(unequal), "of": len(first), "seconds": seconds}


def _compute_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Return the adapter's gradients of one step, by name, and the seconds that it took."""
    model.zero_grad()
    torch.manual_seed(0)  # for the dropout
    _synchronize()
    begun = time.monotonic()
    with torch.autocast(batch["labels"].device.type, torch.bfloat16):  # as accelerate does it for bf16
        loss = -model(**batch, fused_lm_head=True).log_probs.sum()
    loss.backward()
    _synchronize()
    seconds = time.monotonic() - begun
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }, seconds


def check_speed(scale: Scale, work: Path) -> dict[str, Any]:
    """Measure tokens/s and peak memory of micro batches for two numbers of layers, and then where the time goes.

    Both grow by the same amount for each layer, so the rows give those of a model of any depth.
    """
    rows = []
    for layers in dict.fromkeys((scale.few_layers, scale.layers)):
        model = _adapt(_load(make_base(scale, layers, work), _RECIPE))
        for packed in (False, True):
            for micro_batch in scale.micro_batches:
                batch = _make_batch(scale, micro_batch, scale.lengths[-1] // 2, packed=packed)
                row = {"layers": layers, "micro_batch": micro_batch, "packed": packed}
                try:
                    rows.append(row | _measure(model, batch))
                except torch.OutOfMemoryError as e:
                    rows.append(row | {"error": str(e)[:200]})
                _keep_row(work, rows[-1])
        row = {"layers": layers, "profiled": True}
        try:
            rows.append(row | _profile(model, _make_batch(scale, 2, scale.lengths[-1] // 2, packed=False)))
        except RuntimeError as e:  # such as a driver that lets nobody look
            rows.append(row | {"error": str(e)[:200]})
        _keep_row(work, rows[-1])
        del model
    return {"rows": rows}


def _keep_row(work: Path, row: dict[str, Any]) -> None:
    """Write a row down at once, so that it is kept if the time is over before the part is."""
    with (work / PROGRESS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _measure(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    _compute_gradients(model, batch)  # compiles the kernels
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _, seconds = _compute_gradients(model, batch)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    tokens = int((batch["labels"] != IGNORED).sum())
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "peak_gib": round(peak / 2**30, 2),
    }


def _profile(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        _, seconds = _compute_gradients(model, batch)
    events = profiler.key_averages()
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    return {
        "kernel_share": round(kernels / seconds, 3),
        "operations": sum(event.count for event in events),
    }


def _make_batch(scale: Scale, micro_batch: int, length: int, *, packed: bool) -> dict[str, torch.Tensor]:
    """Return sequences of `length` and three quarters of it: padded rows, or one packed row."""
    lengths = [length - (row % 2) * (length // 4) for row in range(micro_batch)]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, scale.vocabulary, (size,), generator=draw) for size in lengths]
    if packed:
        ids = torch.cat(rows)[None]
        places = torch.cat([torch.arange(size) for size in lengths])[None]
        labels = torch.where(places == 0, IGNORED, ids)
        batch = {"input_ids": ids, "labels": labels, "position_ids": places}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        labels = pad(rows, batch_first=True, padding_value=IGNORED)
        batch = {"input_ids": pad(rows, batch_first=True), "labels": labels, "attention_mask": mask}
    return {name: value.to(scale.device) for name, value in batch.items()}


def _load(base: Path, model: dict[str, Any]) -> PreTrainedModel:
    settings = config.Model.model_validate({"base": base.as_uri(), **model})
    return weights.for_training(base, settings)


def _adapt(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with an adapter, a fused head and gradient checkpointing, as the job trains it."""
    adapted: Any = lora.adapted(model, config.Lora())
    lora.draw(adapted, 0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, and then most gradients would be zero too
            parameter.data.normal_(std=1e-3)
    add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs",))
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.config.use_cache = False
    adapted.train()
    return adapted  # type: ignore[no-any-return]


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:  # noqa: FBT001 - reads well where it is used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - an assertion that -O keeps
    if not holds:
        raise RuntimeError(message)
