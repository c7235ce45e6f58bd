"""Whole jobs on one device: resume, float16, merge and verification, and the tests that need a GPU."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_base import make_base, write_records
from gpu_scale import Scale
from safetensors.torch import load_file

_ROOT = Path(__file__).parent.parent
_ENTRYPOINT = str(_ROOT / "entrypoint.py")
_STOPPED = 75
_SHOWN_LINES = 15


@dataclass
class Start:
    """One start of a job: its exit status, and the events that it logged."""

    status: int
    seconds: float
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def require(self, status: int) -> None:
        """Raise RuntimeError with the last lines of the log unless the start ended with `status`."""
        if self.status != status:
            last = "\n".join(self.lines[-_SHOWN_LINES:])
            raise RuntimeError(f"the job ended with {self.status} instead of {status}:\n{last}")

    def last(self, event: str, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return the last value of `key` in events of that name, or None."""
        found = [each[key] for each in self.events if each.get("event") == event and key in each]
        return found[-1] if found else None


def check_tests(scale: Scale, work: Path) -> dict[str, Any]:
    """Run the tests that need a GPU; on a CPU they skip themselves."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--timeout", "100",
        f"--basetemp={work / 'pytest'}", "tests/test_gpu.py", "tests/test_packed_weights.py",
        "-k", "not same_bits and not gather",  # check_resume and check_gathered_block do these
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    summary = ended.stdout.strip().splitlines()[-_SHOWN_LINES:]
    if ended.returncode:
        raise RuntimeError("\n".join(summary))
    if scale.device != "cuda":
        return {"skipped": summary[-1]}
    return {"summary": summary[-1]}


def check_resume_padded(scale: Scale, work: Path) -> dict[str, Any]:
    """Stop a QLoRA run and start it again; adapter and losses must be those of an undisturbed run."""
    return _compare_stopped_run(scale, work, packing=False)


def check_resume_packed(scale: Scale, work: Path) -> dict[str, Any]:
    """Do the same with several examples in each sequence."""
    return _compare_stopped_run(scale, work, packing=True)


def _compare_stopped_run(scale: Scale, work: Path, *, packing: bool) -> dict[str, Any]:
    kind = "packed" if packing else "padded"
    whole = _write_config(scale, work / f"whole-{kind}", _base(scale, work), packing=packing)
    stopped = _write_config(scale, work / f"stopped-{kind}", _base(scale, work), packing=packing)
    undisturbed = _start(whole)
    undisturbed.require(0)
    first = _start(stopped, stop_at=scale.stop_at)
    first.require(_STOPPED)
    second = _start(stopped)
    second.require(0)
    _require_equal_runs(whole.parent / "run", stopped.parent / "run")
    return {
        "undisturbed_seconds": round(undisturbed.seconds, 1),
        "resumed_seconds": round(second.seconds, 1),
        "tokens_per_second": undisturbed.last("train.metrics", "tokens_per_second"),
        "memory_gb": undisturbed.last("train.metrics", "memory_gb"),
    }


def _require_equal_runs(one: Path, other: Path) -> None:
    """Raise RuntimeError unless adapters have the same bits and all losses are equal."""
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    unequal = [name for name in adapters[0] if not torch.equal(adapters[0][name], adapters[1][name])]
    losses = [_read_losses(run) for run in (one, other)]
    steps = [step for step in losses[0] if losses[0][step] != losses[1].get(step)]
    if unequal or steps or not losses[0]:
        raise RuntimeError(f"{len(unequal)} of {len(adapters[0])} weights differ; losses differ at {steps[:5]}")


def _read_losses(run: Path) -> dict[str, float]:
    lines = (run / "report" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {
        f"{entry['step']}/{name}": entry[name] for entry in entries for name in entry.keys() & {"loss", "eval_loss"}
    }


def check_float16(scale: Scale, work: Path) -> dict[str, Any]:
    """Train with float16 and its loss scaler, as on a T4, and resume; losses must be finite and fall."""
    made = _write_config(scale, work / "float16", _base(scale, work), compute_dtype="float16")
    first = _start(made, stop_at=scale.stop_at)
    first.require(_STOPPED)
    second = _start(made)
    second.require(0)
    losses = _read_losses(made.parent / "run")
    before, after = losses["0/eval_loss"], losses[f"{scale.steps}/eval_loss"]
    if not (math.isfinite(before) and after < before):
        raise RuntimeError(f"the eval loss went from {before} to {after}")
    return {"before": before, "after": after, "seconds": round(first.seconds + second.seconds, 1)}


def check_merge(scale: Scale, work: Path) -> dict[str, Any]:
    """Merge the adapter of a run on its own, verify the result on this device, and ask it."""
    made = _write_config(scale, work / "merge", _base(scale, work), steps=2)
    _start(made).require(0)
    run, out = made.parent / "run", made.parent / "merged"
    merged = _call("merge", "--json", "--base", _base(scale, work), "--adapter", run / "adapter", "--out", out)
    merged.require(0)
    answered = _call(
        "generate", "--base", out, "--prompt", "abc", "--max-tokens", 8, "--temperature", 0,
        "--cache", work / "cache",
    )  # fmt: skip
    answered.require(0)
    phases = [each for each in merged.events if each.get("event", "").startswith("examine")]
    return {
        "merge_seconds": round(merged.seconds, 1),
        "generate_seconds": round(answered.seconds, 1),
        "verification": [each.get("message", each["event"])[:300] for each in phases],
    }


def _base(scale: Scale, work: Path) -> Path:
    return make_base(scale, scale.few_layers, work)


def _write_config(
    scale: Scale,
    folder: Path,
    base: Path,
    *,
    packing: bool = False,
    compute_dtype: str = "bfloat16",
    steps: int | None = None,
) -> Path:
    """Write data and config of a QLoRA run with the settings of the presets; return the config."""
    folder.mkdir()
    steps = steps or scale.steps
    longest = scale.lengths[-1]
    write_records(folder / "train.jsonl", 4 * steps, longest)
    write_records(folder / "eval.jsonl", 4, longest // 2)
    tree = {
        "run": {"name": "gpu-check", "url": str(folder / "run"), "cache": str(folder.parent / "cache")},
        "model": {"base": str(base), "quantization": "nf4", "compute_dtype": compute_dtype},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [str(folder / "eval.jsonl")],
            "max_length": longest,
            "packing": packing,
            "leaks": "allow",
        },
        "train": {
            "max_steps": steps,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "warmup": 0,
            "log_every": 1,
            "eval_every": steps,
        },
        "checkpoint": {"every_minutes": 10},
        "merge": {"enabled": False},
        "examine": {"minutes": 0},  # `check_merge` verifies
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _start(config: Path, stop_at: int | None = None) -> Start:
    """Start the run, and ask it to stop after step `stop_at` if one is given."""
    return _call("run", config, "--json", stop_at=stop_at)


def _call(*arguments: object, stop_at: int | None = None) -> Start:
    begun = time.monotonic()
    found = Start(status=-1, seconds=0.0)
    command = [sys.executable, _ENTRYPOINT, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        for line in process.stderr or ():
            found.lines.append(line.rstrip())
            if not line.startswith("{"):
                continue
            event = json.loads(line)
            found.events.append(event)
            if event.get("event") == "train.metrics" and event.get("step") == stop_at:
                process.send_signal(signal.SIGTERM)
    found.status, found.seconds = process.returncode, time.monotonic() - begun
    return found
