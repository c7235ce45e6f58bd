"""Several machines: one of them leads, all of them train, and none of them is left waiting."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import command, need, tiny_config
from hosts import Hosts, hosts, possible
from killing import differences

BOUND = 90.0  # seconds in which all nodes of an attempt that lost one must have ended, here
STEPS = {
    "train": {"epochs": None, "max_steps": 24, "eval_every": 8, "global_batch_size": 8, "micro_batch_size": 2},
    "lora": {"dropout": 0.0},
    "checkpoint": {"every_steps": 4},
}


class Nodes:
    """The job on each of some hosts."""

    def __init__(self, hosts: Hosts, config: Path) -> None:
        self._hosts, self._config = hosts, config
        self._logs = [config.parent / f"h{rank}.log" for rank in range(hosts.count)]
        self.running = [self.start(rank) for rank in range(hosts.count)]

    def start(self, rank: int, *more: str) -> "subprocess.Popen[str]":
        cache = self._config.parent / f"cache-{rank}"
        line = [*command("run", self._config), "--set", f"run.cache={cache}", *more]
        with self._logs[rank].open("w") as log:
            return self._hosts.start(rank, line, stderr=log)

    def said(self, rank: int) -> str:
        return self._logs[rank].read_text()

    def until(self, text: str, rank: int = 0) -> None:
        """Wait until a node says it."""
        end = time.monotonic() + 120
        while text not in self.said(rank):
            assert self.running[rank].poll() is None, self.said(rank)
            assert time.monotonic() < end, self.said(rank)
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.killpg(self.running[rank].pid, number)

    def ended(self) -> list[int]:
        """The statuses, when all have ended."""
        end = time.monotonic() + BOUND
        while any(process.poll() is None for process in self.running):
            assert time.monotonic() < end, "\n".join(map(self.said, range(len(self.running))))
            time.sleep(0.1)
        return [process.returncode for process in self.running]


@pytest.fixture(params=[2])
def network(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    need("network namespaces (root and iproute2)", possible() or None)
    with hosts(request.param) as made:
        yield made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run of two machines that nobody touched."""
    need("network namespaces (root and iproute2)", possible() or None)
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = tiny_config(folder, tiny_model, run={"url": f"{folder}/run"}, **STEPS)
    with hosts(2) as network:
        made = Nodes(network, settings)
        assert made.ended() == [0, 0], made.said(0) + made.said(1)
    return folder / "run"


@pytest.fixture
def config(tiny_run: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_run(run={"url": f"{tmp_path}/run"}, **STEPS)


@pytest.fixture
def nodes(network: Hosts, config: Path) -> Iterator[Callable[[], Nodes]]:
    started: list[Nodes] = []

    def start() -> Nodes:
        started.append(Nodes(network, config))
        return started[-1]

    yield start
    for each in started:
        for process in each.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_two_machines_do_one_run(nodes: Callable[[], Nodes], tmp_path: Path) -> None:
    """Each pulls the base and takes its part; one prepares, saves, merges and publishes."""
    made = nodes()

    assert made.ended() == [0, 0], made.said(0) + made.said(1)
    assert (tmp_path / "run" / "done.json").exists()
    assert not (tmp_path / "run" / "prepared").exists()
    assert "node 1 of 2 is here (h1)" in made.said(0)
    assert "instruction format" not in made.said(1)
    assert "training as node 1 of 2" in made.said(1)
    assert "done: the results are in" in made.said(1)


@pytest.mark.slow
def test_fsdp_shards_within_each_machine(
    nodes: Callable[[], Nodes], config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two processes on each of two machines hold a half of the base each, and learn what two whole copies do."""
    tree = yaml.safe_load(config.read_text())
    tree["distributed"] = {"strategy": "fsdp", "processes_per_node": 2}
    config.write_text(yaml.safe_dump(tree))

    sharded = nodes()

    assert sharded.ended() == [0, 0], sharded.said(0) + sharded.said(1)
    assert "each node shards a copy of the base over its 2 processes" in sharded.said(0)
    log = (tmp_path / "run" / "attempts" / "1.jsonl").read_text().splitlines()
    shared = next(line for line in map(json.loads, log) if line["event"] == "train.shared")
    assert shared["held"] / shared["whole"] == pytest.approx(1 / 2, rel=0.1)
    mine, theirs = (read_losses(run) for run in (tmp_path / "run", undisturbed))
    assert mine.keys() == theirs.keys()
    assert mine == pytest.approx(theirs, abs=2e-4)  # float32 adds up in another order


def read_losses(run: Path) -> dict[tuple[int, str], float]:
    lines = map(json.loads, (run / "report" / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], name): line[name] for line in lines for name in line.keys() & {"loss", "eval_loss"}}


@pytest.mark.slow
def test_a_machine_that_is_killed_ends_the_attempt_of_all_and_the_next_one_goes_on(
    nodes: Callable[[], Nodes], undisturbed: Path, tmp_path: Path
) -> None:
    """The loss is not theirs: 75, start again; the result is that of the run that nobody touched."""
    made = nodes()
    made.until("checkpoint at step 8 sealed")

    made.signal(1, signal.SIGKILL)

    assert made.ended() == [75, -signal.SIGKILL]
    assert "node 1 (h1) is gone" in made.said(0)
    assert nodes().ended() == [0, 0]
    assert not differences(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_the_first_machine_is_no_other(nodes: Callable[[], Nodes], undisturbed: Path, tmp_path: Path) -> None:
    """When it is killed, the rest ends as well, and the next attempt takes the run over."""
    made = nodes()
    made.until("checkpoint at step 8 sealed")

    made.signal(0, signal.SIGKILL)

    assert made.ended() == [-signal.SIGKILL, 75]
    assert nodes().ended() == [0, 0]
    assert not differences(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_cut_off_ends_the_attempt_on_both_sides(
    rank: int, nodes: Callable[[], Nodes], network: Hosts, undisturbed: Path, tmp_path: Path
) -> None:
    """Nobody answers, and nobody waits for longer than a minute; when it is back, the run goes on."""
    made = nodes()
    made.until("checkpoint at step 8 sealed")

    network.cut_off(rank)

    assert made.ended() == [75, 75]
    assert "node 1 (h1) has not said a word for 20 s" in made.said(0)
    assert "has not said a word for 20 s" in made.said(1)
    network.bring_back(rank)
    assert nodes().ended() == [0, 0]
    assert not differences(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_on_one_machine_stops_all_with_a_checkpoint(
    rank: int, nodes: Callable[[], Nodes], undisturbed: Path, tmp_path: Path
) -> None:
    """At the same step, which is then safe in the store."""
    made = nodes()
    made.until("step 6/24")

    made.signal(rank, signal.SIGTERM)

    assert made.ended() == [75, 75]
    sealed = max(
        int(path.parent.name.partition("-")[0]) for path in (tmp_path / "run").rglob("checkpoints/*/manifest.json")
    )
    assert f"step {sealed} sealed" in made.said(0)
    assert nodes().ended() == [0, 0]
    assert not differences(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pull", "load", "merge"])
def test_a_request_to_stop_is_heard_in_every_phase(moment: str, nodes: Callable[[], Nodes]) -> None:
    """Also while the others wait for something."""
    words = {"pull": "attempt 1 of", "load": "prepared train", "merge": "trained 24 steps"}
    made = nodes()
    made.until(words[moment])

    made.signal(0, signal.SIGTERM)

    assert made.ended() == [75, 75]
    assert nodes().ended() == [0, 0]


def test_a_cache_that_one_machine_cannot_use_is_told_on_all(nodes: Callable[[], Nodes], tmp_path: Path) -> None:
    """At once: the others do not wait for it with all of their GPUs."""
    (tmp_path / "cache-1").mkdir()
    os.chown(tmp_path / "cache-1", 12345, -1)

    made = nodes()

    assert made.ended() == [64, 64]
    assert "belongs to user 12345" in made.said(0)


def test_a_failure_on_one_machine_is_told_on_all(nodes: Callable[[], Nodes], config: Path) -> None:
    """What fails for good fails for good everywhere, with its reason."""
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train"] = [str(config.parent / "missing.jsonl")]
    config.write_text(yaml.safe_dump(tree))
    made = nodes()

    assert made.ended() == [64, 64]
    assert "missing.jsonl does not exist" in made.said(0)
    assert "missing.jsonl does not exist" in made.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("network", [4], indirect=True)
def test_four_machines_lose_one_and_go_on(nodes: Callable[[], Nodes], tmp_path: Path) -> None:
    """All of the others end, whoever of them was told first."""
    made = nodes()
    made.until("checkpoint at step 8 sealed")

    made.signal(2, signal.SIGKILL)

    assert made.ended() == [75, 75, -signal.SIGKILL, 75]
    assert nodes().ended() == [0, 0, 0, 0]
    assert (tmp_path / "run" / "done.json").exists()
