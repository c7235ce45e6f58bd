"""The scripts under slurm/: how they read, and what becomes of a job that ends in one way or another."""

import functools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from scheduler import Slurm
from submitted import Checkout

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
# What is set to another value must be found by a person's eye, by grep, and by a program, one in a line.
SETTING = re.compile(r"(#SBATCH --[a-z-]+|[A-Za-z]+)=\S+ +# EDIT: \S")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path / "checkout")
    made.stand_in()
    return made


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_correct_and_says_what_to_edit(script: Path) -> None:
    """Under 100 lines that shellcheck has nothing against."""
    lines = script.read_text().splitlines()
    checked = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True, check=False
    )

    assert checked.stdout + checked.stderr == ""
    assert len(lines) < 100
    assert max(map(len, lines)) <= 120
    marked = [line for line in lines[3:] if "EDIT" in line]
    assert [line for line in marked if SETTING.match(line)] == marked != []


def test_the_scripts_ask_for_the_same() -> None:
    """Those for several nodes and for sweeps are headers for the one that does the work."""
    header = re.compile(r"#SBATCH --(requeue|open-mode\S+|signal\S+|ntasks-per-node\S+)")
    asked = {script.name: set(header.findall(script.read_text())) for script in SCRIPTS}

    assert len(asked["train.sbatch"]) == 4
    assert len(set(map(frozenset, asked.values()))) == 1
    others = [script.read_text() for script in SCRIPTS if script.name != "train.sbatch"]
    assert ["exec bash slurm/train.sbatch" in text for text in others] == [True, True]


def test_a_failure_is_tried_three_times_more_and_a_permanent_one_never(cluster: Slurm, checkout: Checkout) -> None:
    """Status 1 makes four starts in one log, 64 a single one; both jobs have failed then, and leave nothing behind."""
    failing = cluster.submit("slurm/train.sbatch", "run.yaml", cwd=checkout.folder, STATUS="1")
    permanent = cluster.submit("--job-name=other", "slurm/train.sbatch", cwd=checkout.folder, STATUS="64")

    assert cluster.until(permanent, "FAILED")["ExitCode"] == "64:0"
    assert cluster.until(failing, "FAILED", why=lambda: checkout.said(failing))["ExitCode"] == "1:0"
    assert [f"start {n} on" in checkout.said(failing) for n in range(5)] == [True] * 4 + [False]
    assert cluster.job(permanent)["Restarts"] == "0"
    assert "entrypoint.py run run.yaml --set" in checkout.said(failing)
    assert checkout.left == []


def test_of_an_array_only_the_task_that_was_asked_to_stop_is_requeued(cluster: Slurm, checkout: Checkout) -> None:
    """The last task has the array's number as its own, and still takes nobody along."""
    options = ("--array=1-2", "--dependency=", "--output=finetune-%A_%a.log")
    array = cluster.submit(*options, "slurm/train.sbatch", cwd=checkout.folder, LASTS="4")
    for task in (1, 2):
        checkout.until("start 0", f"{array}_{task}")
    assert cluster.job(f"{array}_2")["JobId"] == array
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_2")

    for task in (1, 2):
        cluster.until(f"{array}_{task}", "COMPLETED", why=lambda task=task: checkout.said(f"{array}_{task}"))  # type: ignore[misc]
    assert "asked" in checkout.said(f"{array}_2")
    assert [cluster.job(f"{array}_{task}")["Restarts"] for task in (1, 2)] == ["0", "1"]


def test_a_job_knows_itself_whatever_it_was_submitted_from(cluster: Slurm, checkout: Checkout) -> None:
    """A task of an array that submits one hands all of its variables on; and not every site counts cores for a task."""
    script = checkout.folder / "slurm" / "train.sbatch"
    script.write_text(re.sub(r"#SBATCH --cpus-per-task.*\n", "", script.read_text()))
    of_others = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_END_TIME": "1", "failed": "0"}
    job = cluster.submit("--time=60", "slurm/train.sbatch", cwd=checkout.folder, LASTS="4", **of_others)
    checkout.until("start 0", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)

    assert cluster.until(job, "COMPLETED", why=lambda: checkout.said(job))["Restarts"] == "1"
    ends = [int(found) - time.time() for found in re.findall(r"until (\d+): ", checkout.said(job))]
    assert len(ends) == 2
    assert all(3400 < left <= 3600 for left in ends)


def test_what_cannot_go_on_ends_at_once_and_says_why(cluster: Slurm, checkout: Checkout) -> None:
    """Where Slurm may not requeue, where failures cannot be counted, and where the time limit allows for nothing."""
    (checkout.folder / ".failures-2").mkdir()
    submit = functools.partial(cluster.submit, cwd=checkout.folder)
    barred = submit("--job-name=barred", "--no-requeue", "slurm/train.sbatch", STATUS="75")
    blind = submit("--job-name=blind", "slurm/train.sbatch", STATUS="1")
    short = submit("--job-name=short", "--time=4", "slurm/train.sbatch")

    assert cluster.until(barred, "FAILED")["ExitCode"] == "75:0"
    assert "submit it again" in checkout.said(barred, "barred")
    assert cluster.until(blind, "FAILED")["ExitCode"] == "1:0"
    assert "failed too often" in checkout.said(blind, "blind")
    assert cluster.until(short, "FAILED")["ExitCode"] == "64:0"
    assert "start 0" not in checkout.said(short, "short")


def test_what_the_user_cancels_is_not_requeued(cluster: Slurm, checkout: Checkout) -> None:
    """The job is asked to stop and ends with 75, which would requeue it at any other time."""
    job = cluster.submit("slurm/train.sbatch", cwd=checkout.folder, LASTS="60")
    checkout.until("start 0", job)
    cluster.run("scancel", job)

    assert cluster.until(job, "CANCELLED")["Restarts"] == "0"
    checkout.until("not requeued from here", job)
    assert "asked\n" in checkout.said(job)
    assert checkout.left == []


@pytest.mark.slow
def test_who_does_not_heed_the_warning_is_requeued_before_the_time_is_over(cluster: Slurm, checkout: Checkout) -> None:
    """A start that the limit itself ends would be the last one, for Slurm does not requeue it."""
    checkout.edit("train.sbatch", GRACE=10)
    job = cluster.submit("slurm/train.sbatch", cwd=checkout.folder, LASTS="300", DEAF="yes")
    checkout.until("start 0", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)

    checkout.until("start 1", job)
    assert cluster.job(job)["Restarts"] == "1"
    assert "the job ended with 75" not in checkout.said(job)


@pytest.mark.slow
def test_the_end_of_a_start_waits_for_a_controller_that_is_away(cluster: Slurm, checkout: Checkout) -> None:
    """It is restarted just when the job ends; the job is requeued when it is back, and not forgotten."""
    job = cluster.submit("slurm/train.sbatch", cwd=checkout.folder, LASTS="3", STATUS="75")
    checkout.until("start 0", job)
    cluster.stop_controller()
    checkout.until("the job ended with 75", job)
    time.sleep(5)
    cluster.start_controller()

    checkout.until("start 1", job)
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_second_start_of_a_run_waits_until_the_first_job_is_gone(cluster: Slurm, checkout: Checkout) -> None:
    """Also while the first one is back in the queue; both have the same name."""
    first = cluster.submit("slurm/train.sbatch", cwd=checkout.folder, LASTS="4")
    second = cluster.submit("slurm/train.sbatch", cwd=checkout.folder)
    checkout.until("start 0", first)
    cluster.run("scancel", "--batch", "--signal=USR1", first)

    cluster.until(first, "PENDING")
    assert cluster.until(first, "COMPLETED")["Restarts"] == "1"
    ended = cluster.job(first)["EndTime"]
    assert cluster.until(second, "COMPLETED")["StartTime"] >= ended


def test_a_sweep_makes_a_run_of_each_line(cluster: Slurm, checkout: Checkout) -> None:
    """Each with the changes of its line, a URL and a log of its own."""
    array = cluster.submit("slurm/sweep.sbatch", "run.yaml", "--set", "run.seed=7", cwd=checkout.folder)
    for task in (1, 2, 3):
        cluster.until(f"{array}_{task}", "COMPLETED", why=lambda task=task: checkout.said(f"{array}_{task}", "sweep"))  # type: ignore[misc]
    common = "run run.yaml --set run.seed=7 --set train.learning_rate"
    assert f"{common}=1e-4 --set run.name=lr-1e-4 " in checkout.said(f"{array}_1", "sweep")
    rest = "--set lora.r=8 --set lora.alpha=16 --set run.name=lr-5e-4-r8"
    assert f"{common}=5e-4 {rest} " in checkout.said(f"{array}_3", "sweep")
    assert f"--set run.url={checkout.folder}/.smoke/sweep/lr-5e-4-r8 " in checkout.said(f"{array}_3", "sweep")
