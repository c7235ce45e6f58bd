"""The scripts under slurm/ on a real Slurm: whatever it does to a run, the run goes on, and ends as if nothing was."""

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, need, tiny_config
from killing import debris, differences
from scheduler import WHAT, Slurm, possible, slurm
from submitted import Checkout

MORE_URGENT = ("--partition=high", "--nodes=2", "--exclusive", "--job-name=urgent", "--output=/dev/null")
STEPS = {
    "train": {"epochs": None, "max_steps": 160, "eval_every": 80, "log_every": 40},
    "checkpoint": {"every_steps": 20},
}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


@pytest.fixture
def config(tiny_run: Callable[..., Path]) -> Path:
    return tiny_run(**STEPS)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run that nobody touched, also under Slurm."""
    need(WHAT, possible() or None)
    folder = tmp_path_factory.mktemp("undisturbed")
    with slurm() as cluster:
        checkout = Checkout(folder / "checkout")
        job = cluster.submit("slurm/train.sbatch", tiny_config(folder, tiny_model, **STEPS), cwd=checkout.folder)
        told = cluster.until(job, "COMPLETED", "FAILED", why=lambda: checkout.said(job))
    assert told["JobState"] == "COMPLETED", checkout.said(job)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.every_commit
def test_a_run_that_a_more_urgent_job_preempts_goes_on_in_the_same_log(
    cluster: Slurm, checkout: Checkout, config: Path, tmp_path: Path
) -> None:
    """Without any grace; the job still has the seconds that Slurm waits before it kills."""
    job = cluster.submit("slurm/train.sbatch", config, "--set", "merge.enabled=false", cwd=checkout.folder)
    checkout.until("checkpoint at step 40 sealed", job)
    cluster.submit(*MORE_URGENT, "--wrap=sleep 1", cwd=tmp_path)

    cluster.until(job, "COMPLETED", "FAILED", why=lambda: checkout.said(job))
    assert cluster.job(job)["JobState"] == "COMPLETED", checkout.said(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert "attempt 1 of" in checkout.said(job)
    assert "attempt 2 of" in checkout.said(job)
    assert (tmp_path / "run" / "done.json").exists()
    assert checkout.left == []


def disturb(cluster: Slurm, how: str, job: str, folder: Path) -> None:
    """Do to a running job what happens to it on a cluster."""
    node = cluster.job(job)["NodeList"]
    if how == "preempted":
        cluster.submit(*MORE_URGENT, "--wrap=sleep 1", cwd=folder)
    elif how == "by hand":
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    elif how == "node down":
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    elif how == "node crashed":
        cluster.crash(node)


USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "partition", "more"),
    [
        pytest.param("preempted", "low", "", id="preempted without grace"),
        pytest.param("preempted", "grace", "", id="preempted with grace"),
        pytest.param("preempted", "grace", USER_SIGNAL, id="preempted with grace and the user's signal"),
        pytest.param("by hand", "low", "", id="asked to stop by hand"),
        pytest.param("node down", "low", "", id="its node set down"),
        pytest.param("node crashed", "low", "", id="its node crashed"),
    ],
)
def test_whatever_happens_the_result_is_that_of_the_run_that_nobody_touched(
    how: str, partition: str, more: str, checkout: Checkout, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, optimizer and all that was measured; and nothing is left in the store."""
    with slurm(more) as cluster:
        job = cluster.submit(f"--partition={partition}", "slurm/train.sbatch", config, cwd=checkout.folder)
        checkout.until("checkpoint at step 40 sealed", job)
        disturb(cluster, how, job, tmp_path)

        cluster.until(job, "COMPLETED", "FAILED", "TIMEOUT", why=lambda: checkout.said(job))
        assert cluster.job(job)["JobState"] == "COMPLETED", checkout.said(job)
        assert cluster.job(job)["Restarts"] == "1"
    said = checkout.said(job)
    told = how in ("preempted", "by hand")
    assert ("checkpoint at step 40 sealed" in said, "attempt 2 of" in said) == (True, True)
    assert ("the job ended with 75" in said) == told, said
    assert differences(tmp_path / "run", undisturbed) == []
    assert debris(tmp_path / "run", attempts=2, keep=2) <= {".store/lock"}  # of a folder as the store
    assert checkout.left == []


@pytest.mark.slow
def test_a_time_limit_ends_a_start_and_not_the_run(checkout: Checkout, tiny_run: Callable[..., Path]) -> None:
    """Slurm looks at limits every 30 s, and warns some time before they are reached; the next start goes on."""
    long = STEPS["train"] | {"max_steps": 4000, "log_every": 200, "eval_every": 1000}
    config = tiny_run(train=long, checkpoint={"every_steps": 500}, merge={"enabled": False})
    with slurm() as cluster:
        warned = ("--time=5", "--signal=B:USR1@270")
        job = cluster.submit(*warned, "slurm/train.sbatch", config, cwd=checkout.folder)
        told = cluster.until(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=800, why=lambda: checkout.said(job))
    assert told["JobState"] == "COMPLETED", checkout.said(job)
    assert int(told["Restarts"]) > 0
    assert "asked to stop (SIGUSR1)" in checkout.said(job)


TWO = {
    "train": STEPS["train"] | {"global_batch_size": 8, "micro_batch_size": 2},
    "checkpoint": STEPS["checkpoint"],
    "lora": {"dropout": 0.0},
}


@pytest.mark.slow
def test_of_two_nodes_one_crashes_and_the_result_is_the_same(
    checkout: Checkout, tiny_model: Path, tmp_path: Path
) -> None:
    """The lost one takes the job back into the queue; a run of two nodes that nobody touched ends in the same bits."""
    runs = {}
    with slurm() as cluster:
        for what in ("touched", "untouched"):
            (tmp_path / what).mkdir()
            config = tiny_config(tmp_path / what, tiny_model, **TWO)
            options = (f"--job-name={what}", "--cpus-per-task=1", "--gpus-per-node=1", "--mem=4G")
            job = cluster.submit(*options, "slurm/train-multinode.sbatch", config, cwd=checkout.folder)
            if what == "touched":
                checkout.until("checkpoint at step 40 sealed", job, what)
                cluster.crash(cluster.nodes[1])
                cluster.until(job, "PENDING", why=functools.partial(checkout.said, job, what))
                cluster.restore(cluster.nodes[1])
            said = functools.partial(checkout.said, job, what)
            told = cluster.until(job, "COMPLETED", "FAILED", seconds=200, why=said)
            assert told["JobState"] == "COMPLETED", said()
            runs[what] = int(told["Restarts"])
            assert "0: " in said()
            assert "training as node 1 of 2" in said()
    assert runs == {"touched": 1, "untouched": 0}
    assert differences(tmp_path / "touched" / "run", tmp_path / "untouched" / "run") == []
    assert checkout.left == []


@pytest.mark.slow
def test_a_run_in_a_container_is_told_too(checkout: Checkout, config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With Charliecloud; the image is a tree of mount points for this machine's own system, read-only inside."""
    need("Charliecloud (ch-run)", shutil.which("ch-run"))
    image = tmp_path / "image"
    for folder in ("usr", "etc", "proc", "sys", "dev", "tmp", "home", "root", "opt"):
        (image / folder).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (image / "etc" / name).touch()
    (image / "opt" / "job").symlink_to(sys.prefix)
    (image / "app").symlink_to(ROOT)
    # What is below /tmp is there anyway: ch-run shares it.
    folders = dict.fromkeys(map(str, ("/usr", sys.base_prefix, sys.prefix, ROOT, tmp_path)))
    mounts = f'"{" ".join(folders)}"'
    checkout.edit("train.sbatch", WITH="charliecloud", IMAGE=image, MOUNTS=mounts)
    with slurm() as cluster:
        job = cluster.submit("slurm/train.sbatch", config, cwd=checkout.folder)
        checkout.until("checkpoint at step 40 sealed", job)
        disturb(cluster, "by hand", job, tmp_path)
        told = cluster.until(job, "COMPLETED", "FAILED", why=lambda: checkout.said(job))
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), checkout.said(job)
    assert "asked to stop (SIGUSR1)" in checkout.said(job)
    assert differences(tmp_path / "run", undisturbed) == []
