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

from job import cluster, config, errors, inputs, launch, preemption


@pytest.fixture
def task(tiny_run: Callable[..., Path], tmp_path: Path) -> inputs.Task:
    settings = config.read(tiny_run())
    return inputs.Task(
        settings,
        inputs.Start(1, 0, "token", 60.0),
        tmp_path,
        tmp_path,
        tmp_path / "out",
        tmp_path / "scratch",
        tmp_path / "log",
        {},
    )


def start(code: str, task: inputs.Task, notice: preemption.Notice | None = None) -> Path:
    return launch.training([sys.executable, "-c", code], task, dict(os.environ), notice or preemption.Notice())


def test_a_task_arrives_as_it_was_sent(task: inputs.Task) -> None:
    """Config, folders and digests survive the way through the file."""
    assert inputs.Task.from_json(task.to_json()) == task


@pytest.mark.parametrize("status", [1, 64])
def test_the_status_of_a_failed_training_is_ours(status: int, task: inputs.Task) -> None:
    """A permanent failure stays permanent."""
    with pytest.raises(errors.WorkerError, match=f"training ended with status {status}") as caught:
        start(f"raise SystemExit({status})", task)

    assert caught.value.status == status


def test_a_training_that_is_killed_may_work_next_time(task: inputs.Task) -> None:
    """The kernel's out-of-memory killer is named as the likely cause."""
    with pytest.raises(errors.WorkerError, match=r"killed by SIGKILL; the kernel .* memory") as caught:
        start("import os; os.kill(os.getpid(), 9)", task)

    assert caught.value.status == 1


def test_a_request_to_stop_reaches_the_training_and_is_waited_for(task: inputs.Task, tmp_path: Path) -> None:
    """The job ends with the preempted status after the training has saved, not before; it knows how long it may."""
    assert task.grace == 30
    notice = preemption.Notice()
    saved = tmp_path / "saved"
    code = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / "ready")!r}).touch()
time.sleep(60)
"""

    def ask() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        notice.reason, notice.grace = "SIGTERM", 115.0

    threading.Thread(target=ask).start()
    with pytest.raises(errors.Preempted, match="stopped by SIGTERM"):
        start(code, task, notice)

    assert saved.exists()
    assert task.grace == 115


def test_a_training_whose_job_is_gone_ends() -> None:
    """Nobody goes on writing checkpoints for a job that was killed."""
    child = (
        "import os,sys,time; from job import launch; launch.die_with(int(sys.argv[1])); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import os,subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    root = str(Path(launch.__file__).parent.parent)
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


@pytest.mark.parametrize("wanted", [{"strategy": "fsdp"}, {"processes_per_node": 2}])
def test_more_processes_than_this_version_starts_are_refused(
    wanted: dict[str, object], tiny_run: Callable[..., Path]
) -> None:
    """In the first second, and not by training on one GPU of four."""
    with pytest.raises(errors.ConfigError, match="this version trains in one process"):
        launch.check(config.read(tiny_run(distributed=wanted)))


@pytest.mark.parametrize(
    ("visible", "present", "count"), [(None, 2, 2), ("1", 2, 1), ("", 2, 0), ("0,1", 2, 2), ("0", 0, 0), ("-1", 1, 0)]
)
def test_gpus_are_counted_without_cuda(visible: str | None, present: int, count: int, tmp_path: Path) -> None:
    """What the driver shows, cut down by CUDA_VISIBLE_DEVICES."""
    for number in range(present):
        (tmp_path / f"gpu{number}").mkdir()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert cluster.gpus(environ, tmp_path) == count


def test_a_warning_does_not_kill_a_training_that_is_just_starting(task: inputs.Task) -> None:
    """The signal waits until somebody listens."""
    notice = preemption.Notice()
    notice.at_risk = "the test says so"
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); time.sleep(0.5)\n"
        "from job import preemption; heard = preemption.Notice(); heard.listen(); time.sleep(0.1)\n"
        "sys.exit(0 if heard.at_risk else 9)"
    )

    assert start(code, task, notice) == task.out
