"""The machines of one attempt: who belongs to it, what they hear of each other, and how they end together."""

import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from job import errors
from job.cluster import First, Node, Other, line

RUN, CONFIG = "s3://bucket/run", "digest"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Cluster:
    """Two or more nodes in one process, each with the errors that reached it."""

    def __init__(self, port: int, count: int) -> None:
        self.port, self.count = port, count
        self.lost: list[queue.Queue[errors.JobError]] = [queue.Queue() for _ in range(count)]
        self.asked: list[queue.Queue[str]] = [queue.Queue() for _ in range(count)]
        self.after = ExitStack()

    def first(self, **how: object) -> First:
        node = First(self._node(0), **self._hello(how), asked=self.asked[0].put, lost=self.lost[0].put)
        self.after.callback(node.__exit__, None, None, None)
        return node

    def other(self, rank: int = 1, **how: object) -> Other:
        heard = {"asked": self.asked[rank].put, "lost": self.lost[rank].put}
        node = Other(self._node(rank), **self._hello(how), **heard, patience=10)
        self.after.callback(node.__exit__, None, None, None)
        return node

    def _node(self, rank: int) -> Node:
        return Node(rank, self.count, "127.0.0.1", self.port)

    def _hello(self, how: dict[str, object]) -> dict[str, object]:
        return {"run": RUN, "config": CONFIG, "gpus": 2, **how}


@pytest.fixture
def two(port: int) -> Iterator[Cluster]:
    nodes = Cluster(port, 2)
    with nodes.after:
        yield nodes


def test_what_the_first_says_is_heard_by_all_also_by_late_comers(port: int) -> None:
    """In the order in which it was said."""
    nodes = Cluster(port, 3)
    with nodes.after:
        first, early = nodes.first(), nodes.other(1)
        first.tell(step=1)
        late = nodes.other(2)
        first.gather(10)
        first.tell(step=2)

        for node in (early, late):
            assert [node.hear(), node.hear()] == [{"step": 1}, {"step": 2}]


def test_a_node_may_come_before_the_first_one_is_up(two: Cluster) -> None:
    """Nobody knows which machine starts first."""
    found: queue.Queue[Other] = queue.Queue()
    threading.Thread(target=lambda: found.put(two.other()), daemon=True).start()
    time.sleep(0.3)
    first = two.first()

    first.gather(10)

    assert found.get(timeout=10)


def test_the_others_learn_that_the_run_is_done(two: Cluster) -> None:
    """And end well too."""
    first, other = two.first(), two.other()
    first.gather(10)

    first.__exit__(None, None, None)

    assert other.hear() == {"done": True}
    assert two.lost[1].empty()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.DataError("no data"), errors.PERMANENT),
        (errors.StoreError("no answer"), errors.AGAIN),
    ],
)
def test_the_others_end_as_the_first_one_does(two: Cluster, error: BaseException, status: int) -> None:
    """For good if it failed for good, and to be started again otherwise."""
    first = two.first()
    two.other()
    first.gather(10)

    first.__exit__(type(error), error, None)

    heard = two.lost[1].get(timeout=10)
    assert heard.status == status
    assert str(error) in str(heard)


def test_the_first_one_ends_when_another_fails(two: Cluster) -> None:
    """With the other's name and reason."""
    first, other = two.first(), two.other()
    first.gather(10)

    other.__exit__(errors.DiskFullError, errors.DiskFullError("no room"), None)

    heard = two.lost[0].get(timeout=10)
    assert heard.status == errors.AGAIN
    assert "node 1" in str(heard)
    assert "no room" in str(heard)


def test_a_request_to_stop_reaches_every_node(two: Cluster) -> None:
    """As a request, not as a loss: they save what they have."""
    first, other = two.first(), two.other()
    first.gather(10)

    other.__exit__(errors.Preempted, errors.Preempted("stopped by SIGTERM"), None)

    assert two.asked[0].get(timeout=10).startswith("a request to stop node 1")
    assert two.lost[0].empty()


def test_a_node_that_is_not_needed_any_more_may_go_and_come_back(two: Cluster) -> None:
    """While the first one merges and publishes; who comes back only waits for the end."""
    first, other = two.first(), two.other()
    first.gather(10)
    first.tell(start=1)
    first.release()
    other.__exit__(errors.Preempted, errors.Preempted("stopped by SIGTERM"), None)
    back = two.other()
    time.sleep(0.2)

    first.__exit__(None, None, None)

    assert back.hear() == {"done": True}
    assert two.asked[0].empty()
    assert two.lost[0].empty()


def test_a_node_that_dies_without_a_word_is_noticed_on_both_sides(two: Cluster) -> None:
    """A closed connection is enough, nobody waits."""
    first = two.first()
    connection = socket.create_connection(("127.0.0.1", two.port))
    connection.sendall(json.dumps({"run": RUN, "config": CONFIG, "gpus": 2, "rank": 1, "host": "b"}).encode() + b"\n")
    first.gather(10)

    connection.close()

    assert "node 1 (b) is gone" in str(two.lost[0].get(timeout=10))


def test_a_node_that_hangs_is_noticed(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stands, but nothing comes over it any more."""
    monkeypatch.setattr(line, "SILENCE", 1.0)
    first = two.first()
    with socket.create_connection(("127.0.0.1", two.port)) as connection:
        connection.sendall(json.dumps({"run": RUN, "config": CONFIG, "gpus": 2, "rank": 1, "host": "b"}).encode())
        connection.sendall(b"\n")
        first.gather(10)

        heard = two.lost[0].get(timeout=10)

    assert heard.status == errors.AGAIN
    assert "has not said a word" in str(heard)


def test_a_long_silence_of_the_work_is_no_silence_of_the_node(two: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download of an hour ends no attempt."""
    monkeypatch.setattr(line, "SILENCE", 0.6)
    monkeypatch.setattr(line, "BEAT", 0.1)
    first, other = two.first(), two.other()
    first.gather(10)
    time.sleep(1.5)

    first.tell(step=1)

    assert other.hear() == {"step": 1}
    assert two.lost[0].empty()
    assert two.lost[1].empty()


def test_a_node_that_is_lost_before_it_is_needed_may_come_back(two: Cluster) -> None:
    """Its container may have been started anew while the others still waited."""
    first = two.first()
    with socket.create_connection(("127.0.0.1", two.port)) as connection:
        connection.sendall(json.dumps({"run": RUN, "config": CONFIG, "gpus": 2, "rank": 1, "host": "b"}).encode())
        connection.sendall(b"\n")
    time.sleep(0.2)
    two.other()

    first.gather(10)

    assert two.lost[0].empty()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"config": "other"}, "another config"),
        ({"rank": 2}, "not one of this run's 2 nodes"),
    ],
)
def test_a_node_that_does_not_fit_ends_all_for_good(port: int, how: dict[str, object], told: str) -> None:
    """At once: it would come again, and the others would wait for it in vain, start after start."""
    nodes = Cluster(port, 2)
    nodes.lost.append(queue.Queue())
    nodes.asked.append(queue.Queue())
    with nodes.after:
        nodes.first()
        rank = int(str(how.pop("rank", 1)))

        nodes.other(rank, **how)

        for heard in (nodes.lost[rank].get(timeout=10), nodes.lost[0].get(timeout=10)):
            assert heard.status == errors.PERMANENT
            assert told in str(heard)


def test_a_node_with_other_gpus_ends_all(two: Cluster) -> None:
    """One of them may be broken: the next start may get another machine."""
    two.first()

    two.other(gpus=1)

    for queued in two.lost:
        heard = queued.get(timeout=10)
        assert heard.status == errors.FAILED or two.lost.index(queued) == 1
        assert "another number of GPUs than this one (1 instead of 2)" in str(heard)


def test_a_node_that_does_not_fit_ends_nobody_who_needs_none(two: Cluster) -> None:
    """While the first one only merges and publishes."""
    first = two.first()
    first.release()

    two.other(config="other")

    assert two.lost[1].get(timeout=10).status == errors.PERMANENT
    time.sleep(0.5)
    assert two.lost[0].empty()


def test_what_ends_one_node_is_told_to_the_others_at_once(port: int) -> None:
    """And not when the first one has ended too: they may have some seconds only."""
    nodes = Cluster(port, 3)
    with nodes.after:
        first, failing = nodes.first(), nodes.other(1)
        nodes.other(2)
        first.gather(10)

        failing.__exit__(errors.DataError, errors.DataError("no data"), None)

        heard = nodes.lost[2].get(timeout=10)
        assert heard.status == errors.PERMANENT
        assert "node 1" in str(heard)
        assert "no data" in str(heard)


def test_a_request_to_stop_does_not_hide_why_the_first_node_failed(two: Cluster) -> None:
    """It comes while the node stays to tell the others."""
    node = two.first()
    failed = errors.DataError("no data")

    def stop(*_: object) -> None:
        raise errors.Preempted("stopped by SIGALRM")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    begun = time.monotonic()
    try:
        with pytest.raises(errors.DataError), node:
            raise failed
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    assert time.monotonic() - begun < 20


def test_a_node_of_another_run_is_refused(two: Cluster) -> None:
    """It ends for good and knows why; the others go on waiting for the right one."""
    first = two.first()

    two.other(1, run="s3://bucket/other")

    heard = two.lost[1].get(timeout=10)
    assert heard.status == errors.PERMANENT
    assert "another run.url than this one (s3://bucket/other instead of s3://bucket/run)" in str(heard)
    assert two.lost[0].empty()
    two.other(1)
    first.gather(10)


def test_a_node_that_is_there_twice_disturbs_nobody(two: Cluster) -> None:
    """The second one is sent away, to be started again; the work goes on."""
    first, other = two.first(), two.other()
    first.gather(10)
    second = queue.Queue[errors.JobError]()
    working, two.lost[1] = two.lost[1], second

    two.other()

    heard = second.get(timeout=10)
    assert heard.status == errors.AGAIN
    assert "is there already" in str(heard)
    first.tell(step=1)
    assert other.hear() == {"step": 1}
    assert working.empty()
    assert two.lost[0].empty()


def test_a_node_that_is_started_anew_before_it_is_needed_takes_its_place(two: Cluster) -> None:
    """Also when nobody has seen yet that the one before is gone; should it live, it ends and may come again."""
    first = two.first()
    two.other()
    before, two.lost[1] = two.lost[1], queue.Queue()
    time.sleep(0.2)

    other = two.other()

    assert before.get(timeout=10).status == errors.AGAIN
    first.gather(10)
    first.tell(step=1)
    assert other.hear() == {"step": 1}
    assert two.lost[0].empty()


def test_the_first_waits_until_the_others_have_all_that_they_need(two: Cluster) -> None:
    """However long that takes."""
    first, other = two.first(), two.other()
    first.gather(10)
    ready = threading.Event()
    threading.Thread(target=lambda: (first.await_ready(), ready.set()), daemon=True).start()
    assert not ready.wait(1)

    other.ready()

    assert ready.wait(10)


def test_a_node_that_comes_late_hears_that_the_first_one_failed_for_good(two: Cluster) -> None:
    """Else it would look for it for minutes, and be started again after that."""
    first = two.first()
    failed = errors.DataError("no data")
    ended = threading.Thread(target=first.__exit__, args=(errors.DataError, failed, None))
    ended.start()
    time.sleep(2 * line.LAST)

    two.other()

    assert two.lost[1].get(timeout=10).status == errors.PERMANENT
    ended.join(10)
    assert not ended.is_alive()


def test_garbage_on_the_port_disturbs_nobody(two: Cluster) -> None:
    """Port scanners, browsers, and connections that say nothing."""
    first = two.first()
    silent = socket.create_connection(("127.0.0.1", two.port))
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 100 + b"\n",
        b"[]\n",
        b"null\n",
        json.dumps({"run": RUN, "config": CONFIG, "gpus": 2, "rank": "x"}).encode() + b"\n",
        b"",
    ):
        with socket.create_connection(("127.0.0.1", two.port)) as connection:
            connection.sendall(garbage)
    two.other()

    first.gather(10)

    silent.close()
    assert two.lost[0].empty()


# Slurm starts all nodes at once, and would start the others again for ever; a pod may wait for its machine.
COUNTED = pytest.mark.parametrize(("scheduler", "status"), [("Slurm", errors.FAILED), ("PET_NNODES", errors.AGAIN)])


@COUNTED
def test_a_node_that_never_comes_is_named(scheduler: str, status: int, port: int) -> None:
    """After a time in which images can be pulled; the next start may find it, but under Slurm that is a failure."""
    first = First(Node(0, 2, "127.0.0.1", port, scheduler), RUN, CONFIG, 2, print, print)

    with pytest.raises(errors.JobError, match=r"node 1 of 2 did not reach 127\.0\.0\.1:") as caught:
        first.gather(0.1)
    first.__exit__(None, None, None)

    assert caught.value.status == status


@COUNTED
def test_a_first_node_that_never_comes_is_named(scheduler: str, status: int, port: int) -> None:
    """With its address, and what the network said."""
    with pytest.raises(errors.JobError, match=rf"127\.0\.0\.1:{port} .*refused") as caught:
        Other(Node(1, 2, "127.0.0.1", port, scheduler), RUN, CONFIG, 2, print, print, patience=0.1)

    assert caught.value.status == status
