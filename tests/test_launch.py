"""Starting the training process and translating its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from job import config, errors, inputs, launch, preemption


@pytest.fixture
def task(tiny_run: Callable[..., Path], tmp_path: Path) -> inputs.Task:
    settings = config.read(tiny_run())
    start, team = inputs.Start(1, 0, "token", 60.0), inputs.Team()
    out, scratch, log = tmp_path / "out", tmp_path / "scratch", tmp_path / "log"
    return inputs.Task(settings, start, team, tmp_path, tmp_path, out, scratch, log, {}, tmp_path / "checkpoint")


TOLD = """
import pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from job import inputs
task = inputs.Task.from_json(pathlib.Path(sys.argv[-1]).read_text())
def tell(status, why):
    task.ended(inputs.Outcome(0, status, why, time.time()))
"""


def start(code: str, task: inputs.Task, notice: preemption.Notice | None = None) -> None:
    """Launch a training that does `code` and can `tell` how it ends."""
    program = [sys.executable, "-c", TOLD.format(root=str(ROOT)) + code]
    launch.training(program, task, dict(os.environ), notice or preemption.Notice())


def test_a_task_arrives_as_it_was_sent(task: inputs.Task) -> None:
    """Config, folders and digests survive the way through the file."""
    assert inputs.Task.from_json(task.to_json()) == task


@pytest.mark.parametrize("status", [1, 64])
def test_the_status_of_a_failed_training_is_ours(status: int, task: inputs.Task) -> None:
    """A permanent failure stays permanent."""
    with pytest.raises(errors.WorkerError, match=r"^the reason$") as caught:
        start(f"tell({status}, 'the reason')", task)

    assert caught.value.status == status


def test_a_training_that_ends_without_a_word_may_work_next_time(task: inputs.Task) -> None:
    """It is not taken for done, whatever its status."""
    with pytest.raises(errors.WorkerError, match="ended with status 0 and reported no error") as caught:
        start("", task)

    assert caught.value.status == 1


def test_a_training_that_is_killed_may_work_next_time(task: inputs.Task) -> None:
    """The kernel's out-of-memory killer is named as the likely cause."""
    with pytest.raises(errors.WorkerError, match=r"killed by SIGKILL; the kernel .* memory") as caught:
        start("import os; os.kill(os.getpid(), 9)", task)

    assert caught.value.status == 1


def test_a_request_to_stop_reaches_the_training_and_is_waited_for(task: inputs.Task, tmp_path: Path) -> None:
    """The job ends with the preempted status after the training has saved, not before; it knows how long it may."""
    assert task.grace == 26
    notice = preemption.Notice()
    saved = tmp_path / "saved"
    code = f"""
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    tell(75, "stopped")
    sys.exit(0)
signal.signal(signal.SIGPWR, save)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(60)
"""

    def ask() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        notice.since, notice.grace, notice.reason = time.monotonic(), 115.0, "SIGTERM"

    threading.Thread(target=ask).start()
    with pytest.raises(errors.Preempted, match="stopped by SIGTERM"):
        start(code, task, notice)

    assert saved.exists()
    assert task.grace == 111


def test_a_training_whose_job_is_gone_ends() -> None:
    """Nobody goes on writing checkpoints for a job that was killed."""
    child = (
        "import os,sys,time; from job import launch; launch.die_with(int(sys.argv[1])); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import os,subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen([sys.executable, "-c", parent], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        grandchild = int(process.stdout.readline())
        process.kill()
    for _ in range(50):
        if not Path(f"/proc/{grandchild}/cmdline").exists() or not Path(f"/proc/{grandchild}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        os.kill(grandchild, signal.SIGKILL)
        pytest.fail("the training outlived its job")


def test_a_training_that_lost_its_parent_before_it_began_ends() -> None:
    """The parent may die between starting the process and its first instruction."""
    with pytest.raises(errors.JobError, match="is gone"):
        launch.die_with(parent=1 if os.getppid() != 1 else 2)


def test_a_warning_reaches_the_training(task: inputs.Task) -> None:
    """Without ending it, however early it comes."""
    notice = preemption.Notice()
    notice.at_risk = "the test says so"

    start("time.sleep(0.5); tell(0 if task.at_risk else 9, 'not warned')", task, notice)
