"""How training goes, for people (a bar or lines), for programs (JSON lines) and for TensorBoard."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import errors, log

_SHOWN = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "rewards/margins",
    "eval_rewards/margins",
    "tokens_per_second",
    "memory_gb",
    "epoch",
)
_LOSSES = ("loss", "eval_loss")


_TOO_MUCH = "Lower train.learning_rate, or set model.compute_dtype to bfloat16 or float32 if it was float16"
_FROM_THE_START = "Nothing was trained yet: the base is damaged, or too large for model.compute_dtype float16"


class Progress(TrainerCallback):
    """Writes what the trainer logs, with speed and memory, to `directory` and to stderr."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = (directory / "metrics.jsonl").open("w", encoding="utf-8")
        self._events = directory / "tensorboard"
        self._board = SummaryWriter(str(self._events))
        self._bar = contextlib.ExitStack()
        self._show: Callable[[float, str], None] | None = None
        self._first, self._tokens, self._steps = 0, 0, 0  # when this attempt began, and at the last line
        self._busy, self._begun, self._left, self._note = 0.0, 0.0, 0.0, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.replay(state)
        log.phase("compile", step=state.global_step)
        self._first = state.global_step
        self._tokens, self._steps = int(state.num_input_tokens_seen), state.global_step
        self._show = self._bar.enter_context(log.progress("train", state.max_steps, sys.stderr))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._busy += time.monotonic() - self._begun  # evaluation and checkpoints do not count as training
        if state.global_step == self._first + 1:
            log.phase("train", step=state.global_step)
        if self._show:
            self._show(state.global_step, self._note)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs: dict[str, float] = more["logs"]
        watched = _LOSSES if args.fp16 else (*_LOSSES, "grad_norm")  # in float16 the scaler skips steps that overflow
        lost = [name for name in watched if not math.isfinite(logs.get(name, 0.0))]
        if lost:
            raise errors.ModelError(
                f"{lost[0]} is {logs[lost[0]]} at step {state.global_step}: nothing after the last checkpoint is kept. "
                + (_TOO_MUCH if state.global_step else _FROM_THE_START)
            )
        if "loss" in logs:
            logs = {**logs, **self._speed(state)}
        entry = {name: logs[name] for name in _SHOWN if name in logs}
        if entry.keys() & set(_LOSSES):
            self._write(entry, state.global_step)
            self._say(entry, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def replay(self, state: TrainerState) -> None:
        """Write what earlier attempts logged, so that the files are those of the whole run."""
        for entry in state.log_history:
            self._write(entry, int(entry["step"]))

    def close(self) -> None:
        """Write out what is left."""
        self._bar.close()
        self._metrics.close()
        self._board.close()
        for events in self._events.glob("events.out.tfevents.*"):  # named after time, machine and process
            events.rename(self._events / "events.out.tfevents.run")

    def _speed(self, state: TrainerState) -> dict[str, float]:
        busy, tokens = max(self._busy, 1e-9), int(state.num_input_tokens_seen) - self._tokens
        self._left = (state.max_steps - state.global_step) * busy / max(state.global_step - self._steps, 1)
        self._tokens, self._steps, self._busy = int(state.num_input_tokens_seen), state.global_step, 0.0
        return {"tokens_per_second": tokens / busy, "memory_gb": _memory() / 1e9}

    def _write(self, entry: dict[str, float], step: int) -> None:
        shown = {name: entry[name] for name in _SHOWN if name in entry}
        if shown:
            self._metrics.write(json.dumps({"step": step, **shown}) + "\n")
            self._metrics.flush()
            for name, value in shown.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def _say(self, entry: dict[str, float], state: TrainerState) -> None:
        if "eval_loss" in entry:
            note = f"eval loss {entry['eval_loss']:.4f}"
        else:
            note = (
                f"loss {entry['loss']:.4f}, learning rate {entry['learning_rate']:.2e}, "
                f"{entry['tokens_per_second']:.0f} tokens/s, "
                f"{entry['memory_gb']:.2f} GB, {_clock(self._left)} left"
            )
            self._note = f"loss {entry['loss']:.4f}  {entry['tokens_per_second']:.0f} tok/s"
        log.event(
            "train.metrics", f"step {state.global_step}/{state.max_steps}: {note}", step=state.global_step, **entry
        )


def _memory() -> int:
    """Bytes: the most that this process has held on its GPU, or in host memory where there is none."""
    return (
        int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)
    )


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
