"""When to save, and when to stop: decided by all processes together, at the end of a step."""

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import checkpoint, errors, log
from job.inputs import Task
from job.preemption import Notice
from job.train.ranks import Ranks

_COST_AT_FIRST = 1.0  # seconds; what a checkpoint costs before one was measured


class Cadence(TrainerCallback):
    """When to save besides every n steps, and when to stop because the cluster asks any of the processes for it.

    Rank 0 knows what a checkpoint costs, and saves; the others follow.
    """

    def __init__(
        self, notice: Notice, saving: checkpoint.Background | None, task: Task, ranks: Ranks, *, keep_best: bool
    ) -> None:
        self._notice, self._saving, self._task, self._ranks = notice, saving, task, ranks
        self._keep_best = keep_best
        self._saved, self._hurried = time.monotonic(), False
        self.cost = checkpoint.Cost()
        self._begun, self._disturbed, self._warm = 0.0, False, False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun, self._disturbed = time.monotonic(), self._saving is not None and self._saving.active()
        self._ranks.mark(f"step {state.global_step + 1}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._warm:  # the first step of a start takes longer for other reasons
            self.cost.stepped(time.monotonic() - self._begun, disturbed=self._disturbed)
        self._warm = True
        failed = self._saving is not None and self._saving.failed()
        late = time.monotonic() - self._saved >= self._interval()
        asked, failed, risk, late = map(
            bool, self._ranks.most(self._asked(), failed, self._task.at_risk or bool(self._notice.at_risk), late)
        )
        if failed:
            self._end()
        if late or (risk and not self._hurried):
            control.should_save = True
        self._hurried = self._hurried or risk
        if asked and state.global_step < state.max_steps:
            self._follow()
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

    def check(self) -> None:
        """In the middle of an evaluation, which may take longer than the cluster gives: raise `errors.Preempted`.

        All processes do so together.
        """
        if self._ranks.most(self._asked())[0]:
            self._follow()
            self._notice.check()

    def in_time(self) -> bool:
        """Whether one more checkpoint will be safe before the cluster kills any of us."""
        left = -self._ranks.most(-self._left())[0]
        needed = self._ranks.told(self._saving.expected() if self._saving else 0.0)
        if needed > left and self._ranks.first:
            log.warn(
                "preemption.short",
                f"a checkpoint needs {needed:.1f} s here, and {left:.1f} s are left of the {self._task.grace:.0f} "
                "that it has of what the cluster or checkpoint.grace_seconds gives: the last sealed one is what counts",
                needed=needed,
                left=left,
            )
        return needed <= left

    def _asked(self) -> bool:
        return self._notice.reason is not None

    def _follow(self) -> None:
        """Take what another process was asked for as asked of this one."""
        if not self._asked():
            self._notice.request("so was another process of the run", self._task.grace)

    def _left(self) -> float:
        """Seconds until this machine is gone, as far as we know."""
        if not self._asked():
            return math.inf
        return self._task.grace - (time.monotonic() - self._notice.since)

    def _end(self) -> None:
        """What cannot be saved need not be trained: rank 0 says why."""
        if self._saving:
            self._saving.check()
        raise errors.PeerError("rank 0 could not save a checkpoint")

    def _interval(self) -> float:
        """Seconds between checkpoints."""
        minutes = self._task.config.checkpoint.every_minutes
        if self._saving is None or minutes is None:
            return math.inf
        if minutes != "auto":
            return minutes * 60
        upload = self._saving.upload
        return checkpoint.interval(self.cost.seconds or _COST_AT_FIRST, upload, self._task.start.between)


def due(state: TrainerState, every: int) -> bool:
    """Whether the evaluation that belongs to the restored step was cut off by a request to stop."""
    done = any(entry.get("step") == state.global_step and "eval_loss" in entry for entry in state.log_history)
    return state.global_step % every == 0 and not done
