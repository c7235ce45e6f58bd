"""How often a checkpoint is worth its time, and when there is no time for one more."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from job import checkpoint, config, inputs, preemption
from job.train.cadence import Cadence
from job.train.ranks import Ranks


class Saving:
    """What is known of saving: what it costs training, and how long the last one took, and so a new one."""

    def __init__(self, cost: float = 0.0, upload: float = 0.0) -> None:
        self.cost, self.upload = cost, upload

    def failed(self) -> bool:
        return False

    def active(self) -> bool:
        return False

    def expected(self) -> float:
        return self.upload


@dataclass
class Task:
    """What the decision needs of a task."""

    config: config.Config
    grace: float = 30.0
    at_risk: bool = False
    start: inputs.Start = field(default_factory=lambda: inputs.Start(1, 0, "token", 3600.0))


@pytest.mark.parametrize(
    ("cost", "upload", "between", "seconds"),
    [(0.5, 1, 3600, 60), (0.5, 1, 400, 20), (0.5, 90, 3600, 90), (2, 1, 3600, 120)],
)
def test_the_interval_is_youngs(cost: float, upload: float, between: float, seconds: float) -> None:
    """The square root of twice the cost times the time between preemptions; never less than an upload takes."""
    assert checkpoint.interval(cost, upload, between) == pytest.approx(seconds)


def test_a_checkpoint_costs_the_copy_and_what_it_slows_down() -> None:
    """Steps with a checkpoint on its way are compared with those without; before the first one nothing is known."""
    cost = checkpoint.Cost()
    assert cost.seconds is None
    for _ in range(2):
        cost.stepped(4.0, disturbed=False)
    cost.copied(0.1)
    assert cost.seconds == pytest.approx(0.1)
    for seconds in (4.9, 4.3):
        cost.stepped(seconds, disturbed=True)
    assert cost.seconds == pytest.approx(0.1 + 0.6 * 2)
    cost.copied(0.2)
    assert cost.seconds == pytest.approx(0.2 + 0.6)
    for _ in range(9):
        cost.stepped(3.0, disturbed=True)

    assert cost.seconds == pytest.approx(0.2), "faster steps are chance"


@pytest.fixture
def arguments(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to=[])


def after_a_step(
    arguments: TrainingArguments, saving: Saving, notice: preemption.Notice, task: Task, waited: float
) -> TrainerControl:
    """What is decided at the end of a step, `waited` seconds after the last checkpoint."""
    cadence = Cadence(notice, saving, task, Ranks(inputs.Team(), 0), keep_best=False)  # type: ignore[arg-type]
    cadence._saved -= waited
    cadence.cost.copied(saving.cost)
    control = TrainerControl()
    cadence.on_step_end(arguments, TrainerState(global_step=3, max_steps=10), control)
    return control


@pytest.mark.parametrize(("waited", "due"), [(59, False), (61, True)])
@pytest.mark.parametrize("minutes", [1.0, "auto"])
def test_a_checkpoint_is_due_after_its_interval(
    *, waited: float, due: bool, minutes: float | str, arguments: TrainingArguments, tiny_run: Callable[..., Path]
) -> None:
    """A number of minutes, or what Young's formula gives for what a checkpoint costs here."""
    task = Task(config.read(tiny_run(checkpoint={"every_minutes": minutes})))

    control = after_a_step(arguments, Saving(0.5, 1), preemption.Notice(), task, waited)

    assert control.should_save is due


def test_a_warning_is_worth_one_checkpoint(arguments: TrainingArguments, tiny_run: Callable[..., Path]) -> None:
    """Training goes on: the machine may stay."""
    notice = preemption.Notice()
    notice.warn("the test says so")

    control = after_a_step(arguments, Saving(0.5, 1), notice, Task(config.read(tiny_run())), 0)

    assert control.should_save
    assert not control.should_training_stop


@pytest.mark.parametrize(("upload", "grace", "saves"), [(5.0, 30.0, True), (20.0, 30.0, False), (20.0, 115.0, True)])
def test_a_checkpoint_that_would_come_too_late_is_not_begun(
    *, upload: float, grace: float, saves: bool, arguments: TrainingArguments, tiny_run: Callable[..., Path],
    said: Callable[[], str],
) -> None:  # fmt: skip
    """Fifteen seconds after the request: what takes longer than the rest of what the cluster gives is left."""
    notice = preemption.Notice()
    notice.reason, notice.since = "the test", time.monotonic() - 15

    control = after_a_step(arguments, Saving(0.5, upload), notice, Task(config.read(tiny_run()), grace), 0)

    assert control.should_training_stop
    assert control.should_save is saves
    assert ("the last sealed one is what counts" in said()) is not saves
