"""TRL's trainer, made exact: our checkpoints instead of its own, and randomness that depends on the step alone."""

import contextlib
import functools
import hashlib
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from job import checkpoint, errors, log
from job.checkpoint import state as states
from job.model.tokenizer import IGNORED
from job.train.cadence import Cadence
from job.train.order import Epochs, Order
from job.train.pace import Pace
from job.train.placement import held
from job.train.ranks import Ranks

_SLOW = 1.5  # times as long as the others takes a process that is worth a word
_SHARE = 0.2  # if that is also so much of the time of all


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl's types are not followed
    """Saves to and restores from the run's store, and never loads a pickle. `saving` is rank 0's alone."""

    def __init__(
        self, saving: checkpoint.Background | None, cadence: Cadence, ranks: Ranks, order: Order, *, keep_best: bool,
        **how: Any,
    ) -> None:  # fmt: skip
        self._saving, self._cadence, self._ranks, self._order = saving, cadence, ranks, order
        self._keep_best = keep_best
        super().__init__(**how)
        self._first = 0  # the step that this attempt goes on from
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of losses over tokens, tokens
        self._unlogged: dict[str, Any] = {}
        zero3 = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]  # transformers'
        measured = ranks.size > 1 and not zero3
        self._pace, self._compared = Pace(self.model) if measured else None, time.monotonic()
        self._micro_batch = 0  # of this step
        self._late: int | None = None  # the process that was said to be slow
        for callback in (cadence, Epochs(order), _TakeUp(self)):
            self.add_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
        super().log(logs, *rest, **more)
        if "loss" in logs and self._pace:
            self._compare(self._pace.taken())

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Nothing to do: the adapter is the same in every process, and `_clip_grad_norm` averages its gradients."""

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.is_distributed_loading_by_transformers:
            self._ranks.average([parameter for parameter in model.parameters() if parameter.requires_grad])
        return super()._clip_grad_norm(model)

    def create_optimizer(self, *model: Any) -> Any:
        """Without the group of parameters that decay, or do not, if it is empty: DeepSpeed drops it too."""
        made = super().create_optimizer(*model)
        made.param_groups[:] = [group for group in made.param_groups if group["params"]]
        return made

    def compute_loss(self, *how: Any, **more: Any) -> Any:
        """Leave micro batches in which no process has anything to predict out of the averages of the log."""
        loss = super().compute_loss(*how, **more)
        metrics = self._metrics["train" if self.model.training else "eval"]
        entropy, accuracy = metrics["entropy"], metrics["mean_token_accuracy"]
        # as TRL says it of no token at all; those that have one come first in a step
        if len(entropy) > 1 and entropy[-1] == accuracy[-1] == 0.0:
            entropy.pop()
            accuracy.pop()
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *how: Any, **more: Any) -> Any:
        """Collate the micro batches of a step, each marked: images become numbers here."""
        self._micro_batch = 0
        return super().get_batch_samples(self._marked(epoch_iterator), *how, **more)

    def _marked(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._ranks.mark(f"the data of step {self.state.global_step + 1}")
            try:
                batch = next(epoch_iterator)
            except StopIteration:
                return
            yield batch

    def training_step(self, *how: Any, **more: Any) -> Any:
        """Mark every micro batch, so that a step of many is not taken for one that stands still."""
        self._micro_batch += 1
        self._ranks.mark(f"step {self.state.global_step + 1}, micro batch {self._micro_batch}")
        return super().training_step(*how, **more)

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        self._ranks.mark(f"evaluation after step {self.state.global_step}")
        self._cadence.check()
        count = self._weight(inputs)
        result = super().prediction_step(model, inputs, *rest, **more)
        self._evaluated += torch.tensor([float(result[0]) * count, count], dtype=torch.float64)
        return result

    def _weight(self, inputs: Any) -> int:
        """How much a batch counts in an average: its tokens to be predicted."""
        return int((inputs["labels"][:, 1:] != IGNORED).sum().item())

    def evaluation_loop(self, *how: Any, **more: Any) -> Any:
        """Weigh every token alike: the stock mean over batches changes with the batch size."""
        self._evaluated.zero_()
        with self._aside("evaluate"):
            output = super().evaluation_loop(*how, **more)
        total, count = self._ranks.total(*self._evaluated.tolist())
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
        if self.is_deepspeed_enabled:  # it evaluates only what was prepared to be trained
            self._prepare_for_training(self.state.max_steps, None, None)
        self._evaluate(None, None, skip_scheduler=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        begun = time.monotonic()
        self.store_flos()
        with self._aside("save"):
            self._submit()
        self._cadence.cost.copied(time.monotonic() - begun)

    def _submit(self) -> None:
        loss = self._ranks.total(self._tr_loss.item())[0] / self._ranks.size
        unlogged = {"loss": loss, "step": self._globalstep_last_logged, "metrics": dict(self._metrics["train"])}
        if self._saving is None:
            if self._loop.collective:
                states.capture(self.state.global_step, self._loop, "", unlogged)  # rank 0 keeps it
            return
        scratch = Path(self.args.output_dir) / states.TRAINER  # of the machine, so of one process only
        self.state.save_to_json(str(scratch))
        trainer = scratch.read_text(encoding="utf-8")
        best = self.state.best_global_step if self._keep_best else None
        made = states.capture(self.state.global_step, self._loop, trainer, unlogged, self._saving.spare(best))
        self._saving.submit(made, best)

    def _compare(self, seconds: float) -> None:
        """Say which process the others wait for, if one is much slower."""
        mine = [0.0] * self._ranks.size
        mine[self._ranks.rank] = seconds
        each = self._ranks.total(*mine)
        slowest, usual = max(each), statistics.median_low(each)
        passed, self._compared = time.monotonic() - self._compared, time.monotonic()
        late = each.index(slowest)
        if self._ranks.first and slowest > _SLOW * usual and slowest - usual > _SHARE * passed and late != self._late:
            self._late = late  # said once, and again when it is another one
            log.warn(
                "train.slow",
                f"rank {late} takes {slowest / usual:.1f} times as long as the others for its share of "
                "a step, and they wait for it: look at that GPU's clock, temperature and neighbours",
                step=self.state.global_step,
            )

    @contextlib.contextmanager
    def _aside(self, phase: str) -> Iterator[None]:
        """Account for `phase` while the block lasts, and then for training again."""
        log.phase(phase, step=self.state.global_step)
        yield
        log.phase("train" if self.state.global_step > self._first else "compile", step=self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to load: the adapter was restored before the model was shared out."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare as if nothing was to be resumed, for each strategy has a way of its own, and restore our way."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        mine, whole = held(self.model)  # ZeRO has shared it out only now
        if mine < whole:
            log.event("train.shared", f"rank 0 holds {mine / whole:.0%} of the frozen base", held=mine, whole=whole)
        if resume_from_checkpoint is not None:
            states.restore_optimizer(Path(resume_from_checkpoint), self._loop)
            self._unlogged = states.unlogged(Path(resume_from_checkpoint))
        return prepared

    def take_up(self) -> None:
        """Go on with the sums of the line of the log that was not full when the checkpoint was made."""
        if self._unlogged:
            self._tr_loss += self._unlogged["loss"]
            self._globalstep_last_logged = self._unlogged["step"]
            self._metrics["train"].update(self._unlogged["metrics"])

    @functools.cached_property
    def _loop(self) -> states.Loop:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
        if not self.is_deepspeed_enabled:
            return states.Loop(self.model, optimizer, self.lr_scheduler, self.accelerator.scaler)
        from job.checkpoint.zero import ZeroLoop

        return ZeroLoop(self.model, optimizer, self.lr_scheduler, None)

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
