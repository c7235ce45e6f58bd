"""TRL's trainer, made exact: our checkpoints instead of its own, and randomness that depends on the step alone."""

import contextlib
import functools
import hashlib
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from job import checkpoint, errors, log
from job.inputs import Task
from job.model.tokenizer import IGNORED
from job.preemption import Notice

_COST_AT_FIRST = 1.0  # seconds; what a checkpoint costs before one was measured


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl's types are not followed
    """Saves to and restores from the run's store, and never loads a pickle."""

    def __init__(self, saving: checkpoint.Background, cadence: "Cadence", *, keep_best: bool, **how: Any) -> None:
        super().__init__(**how)
        self._saving, self._cadence, self._keep_best = saving, cadence, keep_best
        self._first = 0  # the step that this attempt goes on from
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of losses over tokens, tokens
        self._unlogged: dict[str, Any] = {}
        self.add_callback(cadence)
        self.add_callback(_TakeUp(self))

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        self._cadence.notice.check()  # an evaluation may take longer than the cluster gives
        count = (inputs["labels"][:, 1:] != IGNORED).sum().item()
        result = super().prediction_step(model, inputs, *rest, **more)
        self._evaluated += torch.tensor([float(result[0]) * count, count], dtype=torch.float64)
        return result

    def evaluation_loop(self, *how: Any, **more: Any) -> Any:
        """Weigh every token alike: the stock mean over batches changes with the batch size."""
        self._evaluated.zero_()
        with self._aside("evaluate"):
            output = super().evaluation_loop(*how, **more)
        total, count = self._evaluated.tolist()
        output.metrics["eval_loss"] = total / max(count, 1)
        return output

    def _maybe_log_save_evaluate(self, *how: Any, **more: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*how, **more)
        except errors.Preempted:  # in the middle of an evaluation: `due` makes the next attempt catch up
            self.control.should_evaluate, self.control.should_training_stop = False, True
            self.control.should_save = self._cadence.in_time()
            super()._maybe_log_save_evaluate(*how, **more)

    def catch_up(self) -> None:
        """Do the evaluation after the last step, which a request to stop cut off."""
        self._evaluate(None, None, skip_scheduler=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        begun = time.monotonic()
        self.store_flos()
        if self.is_world_process_zero():
            with self._aside("save"):
                self._submit()
            self._cadence.cost.copied(time.monotonic() - begun)

    def _submit(self) -> None:
        scratch = Path(self.args.output_dir) / checkpoint.TRAINER
        self.state.save_to_json(str(scratch))
        unlogged = {
            "loss": self._tr_loss.item(),
            "step": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
        }
        trainer = scratch.read_text(encoding="utf-8")
        state = checkpoint.capture(self.state.global_step, self._loop, trainer, unlogged, self._saving.spare())
        self._saving.submit(state, self.state.best_global_step if self._keep_best else None)

    @contextlib.contextmanager
    def _aside(self, phase: str) -> Iterator[None]:
        """Account for `phase` while the block lasts, and then for training again."""
        log.phase(phase, step=self.state.global_step)
        yield
        log.phase("train" if self.state.global_step > self._first else "compile", step=self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.restore_adapter(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, directory: str | None) -> None:
        if directory is not None:
            checkpoint.restore_optimizer(Path(directory), self._loop)
            self._unlogged = checkpoint.unlogged(Path(directory))

    def take_up(self) -> None:
        """Go on with the sums of the line of the log that was not full when the checkpoint was made."""
        if self._unlogged:
            self._tr_loss += self._unlogged["loss"]
            self._globalstep_last_logged = self._unlogged["step"]
            self._metrics["train"].update(self._unlogged["metrics"])

    @functools.cached_property
    def _loop(self) -> checkpoint.Loop:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
        return checkpoint.Loop(self.model, optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:  # noqa: FBT001, FBT002
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler and self.state.global_step:  # at the start: the evaluation that a request to stop cut off
            self._determine_best_metric(metrics, trial)
        return metrics

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        begun: tuple[int, int] = super()._init_training_state(max_steps, *rest)
        self.state.compute_steps(
            self.args, max_steps
        )  # a restored state carries the cadence of the attempt that wrote it
        self._first = self.state.global_step
        return begun

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: `Exact` seeds every step, and the stock way is a pickle for each rank."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restored with the optimizer."""


class _TakeUp(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.take_up()  # the stock loop has just set them to zero


class Exact(TrainerCallback):
    """Makes dropout and every other draw of a step a function of (seed, step, rank).

    So resuming needs no saved generator state.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        drawn = hashlib.sha256(f"{self._seed} {state.global_step} {args.process_index}".encode()).digest()
        seed = int.from_bytes(drawn[:4], "big")
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
        torch.manual_seed(seed)  # of every GPU too


class Cadence(TrainerCallback):
    """When to save besides every n steps, and when to stop because the cluster asks for it."""

    def __init__(self, notice: Notice, saving: checkpoint.Background, task: Task, *, keep_best: bool) -> None:
        self.notice, self._saving, self._task, self._keep_best = notice, saving, task, keep_best
        self._saved, self._hurried = time.monotonic(), False
        self.cost = checkpoint.Cost()
        self._begun, self._disturbed, self._warm = 0.0, False, False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun, self._disturbed = time.monotonic(), self._saving.active()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._warm:  # the first step of a start takes longer for other reasons
            self.cost.stepped(time.monotonic() - self._begun, disturbed=self._disturbed)
        self._warm = True
        self._saving.check()  # what cannot be saved need not be trained
        if time.monotonic() - self._saved >= self._interval():
            control.should_save = True
        if self.notice.at_risk and not self._hurried:
            self._hurried = control.should_save = True
        if self.notice.reason and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = False  # seconds are short; `due` makes the next attempt catch up
            control.should_save = self.in_time()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        loss: float = more["metrics"]["eval_loss"]
        best = state.best_metric
        if self._keep_best and state.global_step and (best is None or loss < best):
            control.should_save = True  # the best adapter must be in the store, whatever the cadence

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()

    def _interval(self) -> float:
        """Seconds between checkpoints."""
        minutes = self._task.config.checkpoint.every_minutes
        if minutes != "auto":
            return math.inf if minutes is None else minutes * 60
        saving = self._saving
        return checkpoint.interval(self.cost.seconds or _COST_AT_FIRST, saving.upload, self._task.start.between)

    def in_time(self) -> bool:
        """Whether one more checkpoint will be safe before the cluster kills us."""
        left = self._task.grace - (time.monotonic() - self.notice.since)
        needed = self._saving.expected()
        if needed > left:
            log.warn(
                "preemption.short",
                f"a checkpoint needs {needed:.1f} s here, and {left:.1f} s are left of the {self._task.grace:.0f} "
                "that the cluster or checkpoint.grace_seconds gives: the last sealed one is what counts",
                needed=needed,
                left=left,
            )
        return needed <= left


def due(state: TrainerState, every: int) -> bool:
    """Whether the evaluation that belongs to the restored step was cut off by a request to stop."""
    done = any(entry.get("step") == state.global_step and "eval_loss" in entry for entry in state.log_history)
    return state.global_step % every == 0 and not done
