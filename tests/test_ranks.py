"""Processes that train together when one of them dies, stands still or is slow: what the job does, and what it says."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, command

from job import cluster

SECONDS = 60.0  # in which the attempt must have ended
STEPS = {
    "train": {"max_steps": 2000, "eval_every": 2000, "log_every": 1, "global_batch_size": 4, "micro_batch_size": 2},
    "checkpoint": {"every_steps": 1000},
    "distributed": {"processes_per_node": 2, "timeout_minutes": 0.1},
    "merge": {"enabled": False},
}


class Job:
    """A job with two processes that train, and what it says."""

    def __init__(self, process: psutil.Popen, log: Path) -> None:
        self.process, self._log = process, log
        self._family: list[psutil.Process] = []

    def said(self) -> str:
        return self._log.read_text()

    def until(self, text: str) -> None:
        end = time.monotonic() + 120
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            self._family = self.process.children() or self._family
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        return next(each for each in self.process.children() if each.environ().get("RANK") == str(number))

    def family(self) -> list[psutil.Process]:
        """Those of its processes that still run."""
        return [each for each in self._family if each.is_running()]

    def status(self) -> int:
        """That of the job, which ends soon."""
        return int(self.process.wait(SECONDS))


@pytest.fixture
def job(tiny_run: Callable[..., Path], tmp_path: Path) -> Iterator[Job]:
    with started(tiny_run(**STEPS), tmp_path / "log") as made:
        yield made


@contextmanager
def started(config: Path, log: Path, **delay: object) -> Iterator[Job]:
    """A job that runs; `delay` is for tests/moments."""
    more = {"DELAY": json.dumps(delay), "PYTHONPATH": str(ROOT / "tests" / "moments")} if delay else {}
    with log.open("w") as stderr:
        line = [str(part) for part in command("run", config)]
        process = psutil.Popen(line, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1", **more})
    made = Job(process, log)
    try:
        yield made
        assert not made.family(), f"left behind: {made.family()}; {made.said()}"
    finally:
        for each in [process, *made.family()]:
            if each.is_running():
                each.kill()
        subprocess.Popen.wait(process)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_ends_the_attempt_with_its_name(rank: int, job: Job) -> None:
    """Soon, once, and with nothing of what the other one says because of it."""
    job.until("step 3/")

    job.rank(rank).kill()

    assert job.status() == 1
    last = job.said().splitlines()[-1]
    assert f"error: rank {rank} of 2: training was killed by SIGKILL" in last
    assert "Traceback" not in job.said()
    assert "lost another process" not in job.said()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (1, r"rank 0 on \S+ waited \d+ s at .* for rank 1 on \S+ \(at .*, no sign of life\)"),
        (0, r"rank 1 on \S+ waited \d+ s at .* for rank 0, which does not answer"),
    ],
)
def test_a_process_that_stands_still_is_named_with_the_one_that_waits(rank: int, told: str, job: Job) -> None:
    """After the time that the config gives, and not after that of the libraries."""
    job.until("step 3/")

    job.rank(rank).send_signal(signal.SIGSTOP)

    assert job.status() == 1
    assert re.search(told, job.said()), job.said()


@pytest.mark.slow
def test_a_request_to_stop_ends_a_job_that_stands_still(tiny_run: Callable[..., Path], tmp_path: Path) -> None:
    """It cannot save any more; it ends before the cluster kills it."""
    config = tiny_run(**STEPS | {"distributed": {"processes_per_node": 2}, "checkpoint": {"grace_seconds": 15}})
    with started(config, tmp_path / "log") as job:
        job.until("step 3/")
        job.rank(1).send_signal(signal.SIGSTOP)
        asked = time.monotonic()

        job.process.terminate()

        assert job.status() == 75
        assert time.monotonic() - asked < 15 + 5  # of a busy machine; without an end of its own it would be 600


@pytest.mark.slow
def test_a_process_that_is_slow_is_named_once(job: Job) -> None:
    """However long it is slow, and the run goes on; on a busy machine the other one may be called slow between."""
    job.until("step 3/")
    slow = job.rank(1)
    end = time.monotonic() + 60
    more = 8  # steps of the slow one after it was named

    while more:
        assert time.monotonic() < end, job.said()
        slow.suspend()
        time.sleep(0.35)
        slow.resume()
        time.sleep(0.1)
        more -= "rank 1 takes" in job.said()
    job.process.terminate()

    assert job.status() == 75
    named = re.findall(r"rank (\d) takes [\d.]+ times as long as the others", job.said())
    assert all(one != other for one, other in itertools.pairwise(named))


MANY = {  # eight micro batches of a second make a step longer than the time limit of six
    "train": {"max_steps": 2, "eval_every": 2, "log_every": 1, "global_batch_size": 16, "micro_batch_size": 1},
    "distributed": {"processes_per_node": 2, "timeout_minutes": 0.1},
    "data": {"eval": []},
    "merge": {"enabled": False},
}
MICRO_BATCH = {"module": "job.train.trainer", "function": "Trainer.compute_loss"}


@pytest.mark.slow
def test_a_step_of_many_micro_batches_is_no_process_that_stands_still(
    tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """However long it takes, as long as each of them takes less than the time limit."""
    slow = {**MICRO_BATCH, "seconds": 1.0, "call": 0, "rank": -1}
    with started(tiny_run(**MANY), tmp_path / "log", **slow) as job:
        job.until("step 1/2")
        begun = time.monotonic()
        job.until("step 2/2")

        assert time.monotonic() - begun > 8
        assert job.status() == 0, job.said()


@pytest.mark.slow
def test_a_process_that_stands_still_in_a_micro_batch_is_found_in_time(
    tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The other one waits in the same micro batch: neither is taken for dead while it looks for whom it waits."""
    stuck = {**MICRO_BATCH, "seconds": 600.0, "call": 11, "rank": 1}
    with started(tiny_run(**MANY), tmp_path / "log", **stuck) as job:
        job.until("step 1/2")
        begun = time.monotonic()

        assert job.status() == 1
        assert time.monotonic() - begun < 6 + 20  # what it takes to look who waits, and to end the others
        assert re.search(r"none of the 2 processes has moved for \d+ s at step 2, micro batch 3", job.said()), (
            job.said()
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_process_is_named_although_sharing_makes_the_others_wait_for_it(
    rank: int, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Under FSDP each layer's weights are gathered before it, where a fast process waits for a slow one.

    Only the first layer is slow: the whole forward pass takes both processes the same time.
    """
    config = tiny_run(**STEPS | {"distributed": {"processes_per_node": 2, "strategy": "fsdp"}})
    slow = {
        "module": "transformers.models.llama.modeling_llama", "function": "LlamaAttention.forward",
        "having": {"layer_idx": 0}, "seconds": 0.4, "call": 0, "rank": rank,
    }  # fmt: skip
    with started(config, tmp_path / "log", **slow) as job:
        job.until("times as long as the others")
        job.process.terminate()

        assert job.status() == 75
        assert set(re.findall(r"rank (\d) takes", job.said())) == {str(rank)}


AVERAGE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from job import inputs
from job.train.ranks import Ranks

rank, port = int(sys.argv[2]), int(sys.argv[3])
listening = int(sys.argv[4]) if rank == 0 else None
ranks = Ranks(inputs.Team(processes=2, port=port), rank)
ranks.meet(listening, 60.0, lambda why, lost: sys.exit(why))
both, one, none = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
both.grad = torch.full((2, 3), 2.0 if rank else 4.0)
one.grad = torch.ones(2, 3) if rank else None
ranks.average([both, one, none])
assert torch.equal(both.grad, torch.full((2, 3), 3.0)), both.grad
assert torch.equal(one.grad, torch.full((2, 3), 0.5)), one.grad
assert none.grad is None
ranks.leave()
"""


def test_gradients_are_averaged_and_those_that_nobody_has_stay_so() -> None:
    """As with one process: an expert that no token went to is not moved by its momentum."""
    with cluster.listen(here=True) as meeting:
        line = [sys.executable, "-c", AVERAGE, str(ROOT)]
        more = [str(meeting.getsockname()[1]), str(meeting.fileno())]
        started = [
            subprocess.Popen([*line, str(rank), *more], pass_fds=[meeting.fileno()], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]

    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


@pytest.mark.slow
def test_somebody_elses_torchrun_may_start_the_job(tiny_run: Callable[..., Path]) -> None:
    """Once for each GPU, as it does: the first does the work, the others end at once and well."""
    config = tiny_run()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

    ended = subprocess.run(
        [*torchrun, *map(str, command("run", config)[1:])], capture_output=True, text=True, check=False, timeout=300
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("another process of this machine does the work") == 1
    assert (config.parent / "run" / "done.json").exists()
