"""Whole jobs on one device: resume, float16, merge and verification, and the tests that need a GPU."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_base import make_base, write_records
from gpu_scale import Scale, keep_row
from safetensors.torch import load_file

_ROOT = Path(__file__).parent.parent
_ENTRYPOINT = str(_ROOT / "entrypoint.py")
_STOPPED = 75
_SHOWN_LINES = 15
_EXAMINE_MINUTES = {"cuda": 1, "cpu": 4}
_UNVERIFIED = {  # events of a verification that ends well and shows less than it should
    "examine.failed",
    "examine.fallback",
    "examine.faint",
    "examine.left",
    "examine.nan",
}


@dataclass
class Start:
    """One start of a job: its exit status, and the events that it logged."""

    status: int
    seconds: float
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    output: str = ""

    def require(self, status: int) -> None:
        """Raise RuntimeError with the last lines of the log unless the start ended with `status`."""
        if self.status != status:
            last = "\n".join(self.lines[-_SHOWN_LINES:])
            raise RuntimeError(f"the job ended with {self.status} instead of {status}:\n{last}")

    def last(self, event: str, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return the last value of `key` in events of that name, or None."""
        found = [each[key] for each in self.events if each.get("event") == event and key in each]
        return found[-1] if found else None

    def describe(self, name: str) -> dict[str, Any]:
        """Return the figures of this start, called `name`, as a row."""
        row = {"start": name, "status": self.status, "seconds": round(self.seconds, 1)}
        for key in ("tokens_per_second", "memory_gb"):
            value = self.last("train.metrics", key)
            if value is not None:
                row[key] = value
        return row


def check_tests(scale: Scale, work: Path) -> dict[str, Any]:
    """Run the tests that need a GPU; on a CPU they skip themselves."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--timeout", "100",
        f"--basetemp={work / 'pytest'}", "tests/test_gpu.py", "tests/test_packed_weights.py",
        "-k", "not same_bits and not gather",  # check_resume and check_gathered_block do these
    ]  # fmt: skip
    ended = subprocess.run(
        command, cwd=_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
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
    _start(work, whole).require(0)
    _start(work, stopped, stop_at=scale.stop_at).require(_STOPPED)
    _start(work, stopped).require(0)
    _require_equal_runs(whole.parent / "run", stopped.parent / "run")
    return {}  # the rows of the starts are the figures


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
    """Train with float16 and its loss scaler, as on a T4, and resume; losses must fall.

    All of them must be finite. On a GPU the scaler must go on with the state that it had.
    """
    made = _write_config(scale, work / "float16", _base(scale, work), compute_dtype="float16")
    run = made.parent / "run"
    _start(work, made, stop_at=scale.stop_at).require(_STOPPED)
    _start(work, made).require(0)
    losses = _read_losses(run)
    infinite = [step for step, loss in losses.items() if not math.isfinite(loss)]
    if infinite:
        raise RuntimeError(f"losses are not finite at {infinite[:5]}")
    before, after = losses["0/eval_loss"], losses[f"{scale.steps}/eval_loss"]
    if after >= before:
        raise RuntimeError(f"the eval loss went from {before} to {after}")
    figures: dict[str, Any] = {"before": before, "after": after}
    if scale.device == "cuda":
        figures["scalers"] = _read_checkpoints(run)
        require_scaler_resumed(figures["scalers"])
    return figures


def _read_checkpoints(run: Path) -> list[dict[str, Any]]:
    """Return the step and the loss scaler's state of each checkpoint, the oldest first."""
    files = sorted((run / "checkpoints").glob("*/state.json"))
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [{"step": state["step"], "scaler": state["scaler"]} for state in states]


def require_scaler_resumed(checkpoints: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError unless the last scaler's state continues that of the first checkpoint.

    The scaler counts steps without overflow; an overflow halves the scale and restarts the count.
    """
    stopped, ended = checkpoints[0], checkpoints[-1]
    before, after = stopped["scaler"], ended["scaler"]
    if not (before and after) or stopped["step"] == ended["step"]:
        raise RuntimeError(f"there are no states of a loss scaler to compare: {checkpoints}")
    steps = ended["step"] - stopped["step"]
    counted = after["_growth_tracker"] - before["_growth_tracker"]
    continued = after["scale"] == before["scale"] and counted == steps
    overflowed = after["scale"] < before["scale"]
    if not (continued or overflowed):
        raise RuntimeError(f"the loss scaler began anew after the resume: {checkpoints}")


def check_merge(scale: Scale, work: Path) -> dict[str, Any]:
    """Merge the adapter of a run on its own, verify the result on this device, and ask it."""
    adapter = _find_or_train_adapter(scale, work)
    out = work / "merged"
    merged = _call(
        "merge", "--json", "--base", _base(scale, work), "--adapter", adapter, "--out", out,
        "--set", f"examine.minutes={_EXAMINE_MINUTES[scale.device]}",
        "--set", f"run.cache={work / 'cache'}",
    )  # fmt: skip
    keep_row(work, merged.describe("merge"))
    merged.require(0)
    require_verified(merged.events, scale.device)
    answered = _call(
        "generate", "--base", out, "--prompt", "abc", "--max-tokens", 8, "--temperature", 0,
        "--cache", work / "cache",
    )  # fmt: skip
    keep_row(work, answered.describe("generate"))
    answered.require(0)
    if not answered.output.strip():
        raise RuntimeError("generate printed no answer")
    phases = [each for each in merged.events if each.get("event", "").startswith("examine")]
    return {
        "verification": [each.get("message", each["event"])[:300] for each in phases],
        "answer": answered.output.strip()[:100],
    }


def _find_or_train_adapter(scale: Scale, work: Path) -> Path:
    """Return the adapter of the undisturbed run of `resume-padded`, or of a new run."""
    shared = work / "whole-padded" / "run"
    if (shared / "done.json").exists():
        return shared / "adapter"
    made = _write_config(scale, work / "trained", _base(scale, work), steps=scale.stop_at)
    _start(work, made).require(0)
    return made.parent / "run" / "adapter"


def require_verified(events: Sequence[Mapping[str, Any]], device: str) -> None:
    """Raise RuntimeError unless the merged model was compared, and on a GPU if there is one."""
    names = [event.get("event") for event in events]
    messages = [str(event.get("message")) for event in events if event.get("event") in _UNVERIFIED]
    if "examine.merged" not in names or messages:
        raise RuntimeError(f"the verification shows too little: {messages or names}")
    begun = [str(each.get("message")) for each in events if each.get("event") == "examine.begin"]
    if device == "cuda" and any("on the CPU" in message for message in begun):
        raise RuntimeError(f"models were verified on the CPU: {begun}")


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


def _start(work: Path, config: Path, stop_at: int | None = None) -> Start:
    """Start the run, ask it to stop after step `stop_at` if one is given, and keep its figures."""
    ended = _call("run", config, "--json", stop_at=stop_at)
    keep_row(work, ended.describe(config.parent.name))
    return ended


def _call(*arguments: object, stop_at: int | None = None) -> Start:
    begun = time.monotonic()
    found = Start(status=-1, seconds=0.0)
    command = [sys.executable, _ENTRYPOINT, *map(str, arguments)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            for line in process.stderr or ():
                found.lines.append(line.rstrip())
                event = parse_event(line)
                if event is None:
                    continue
                found.events.append(event)
                if event.get("event") == "train.metrics" and event.get("step") == stop_at:
                    process.send_signal(signal.SIGTERM)
        except BaseException:
            process.kill()
            raise
        process.wait()
        output.seek(0)
        found.output = output.read()
    found.status, found.seconds = process.returncode, time.monotonic() - begun
    return found


def parse_event(line: str) -> dict[str, Any] | None:
    """Return the event in a line of the log, which a progress bar may precede, or None."""
    start = line.find('{"')
    if start < 0:
        return None
    with contextlib.suppress(ValueError):
        event: dict[str, Any] = json.loads(line[start:])
        return event
    return None
