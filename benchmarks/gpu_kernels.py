"""Kernels on one device: copies, the compiler, the loss, and whether a step can be repeated."""

import contextlib
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
from gpu_scale import Scale
from gpu_steps import RECIPE, Batch, adapt, load, make_batch, run_step
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from job.model.tokenizer import IGNORED
from job.train.packed_weights import find_changed_patterns

_STORAGES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_LOSS_TOKENS, _IGNORED_EVERY = 160, 5
_TOLERANCE = 2e-2  # of bfloat16 products against float64, as a share of the largest value
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
    """Count the 16-bit patterns that the copies of a sharded model change; bytes must stay.

    The premise is that they change some of bfloat16, so that 4-bit weights must be bytes.
    """
    device = torch.device(scale.device)
    changed = {str(dtype): find_changed_patterns(dtype, device) for dtype in _STORAGES}
    _require(changed["torch.uint8"] == 0, f"the copy changes bytes: {changed}")
    return {"changed_patterns": changed, "premise_confirmed": changed["torch.bfloat16"] > 0}


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
    return {"share_of_bytes_changed": damaged, "premise_confirmed": damaged["torch.bfloat16"] > 0}


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
    without = outcomes["without"]
    lacks_compiler = without["status"] != 0 and "compiler" in str(without["last"])
    return {**outcomes, "premise_confirmed": lacks_compiler}


def check_loss_kernel(scale: Scale, work: Path) -> dict[str, Any]:
    """Compare loss and gradient of TRL's fused head with full logits in float64."""
    model = load(make_base(scale, scale.few_layers, work), {"quantization": "none"})
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
    model = adapt(load(make_base(scale, scale.few_layers, work), RECIPE))
    figures = []
    for length in scale.lengths:
        for packed in (False, True):
            batch = make_batch(scale, 2, length, packed=packed)
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


def _compare_two_steps(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    first, _ = _compute_gradients(model, batch)
    second, seconds = _compute_gradients(model, batch)
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    return {"equal": not unequal, "unequal": len(unequal), "of": len(first), "seconds": seconds}


def _compute_gradients(model: PreTrainedModel, batch: Batch) -> tuple[Batch, float]:
    """Return the adapter's gradients of one step, by name, and the seconds that it took."""
    seconds = run_step(model, batch)
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return gradients, seconds


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:  # noqa: FBT001 - reads well where it is used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - an assertion that -O keeps
    if not holds:
        raise RuntimeError(message)
