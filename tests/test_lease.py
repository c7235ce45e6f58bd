"""Who owns a run: one start at a time, whatever happens to it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT

from job import errors, lease, storage

SECONDS = 2.0
ELSEWHERE = {"host": "elsewhere", "boot": "b", "space": "s", "number": 1, "began": 1}
OWNER = (
    "import sys, time; from contextlib import ExitStack; from job import lease, storage\n"
    "def lost(error): print(error, flush=True)\n"
    f"owner, number = lease.take(storage.connect(sys.argv[1]), {SECONDS}, ExitStack())\n"
    "owner.keep(lost); print(number, flush=True); time.sleep(60)"
)
RIVAL = (
    "import sys; from contextlib import ExitStack; from job import errors, lease, storage\n"
    "for url in sys.stdin:\n"
    "    store = storage.connect(url.strip())\n"
    "    try:\n"
    f"        owner, number = lease.take(store, {SECONDS}, ExitStack())\n"
    "        owner.keep(print); owner.confirm(); store.create(f'written-{owner.token}', b'1')\n"
    "        print('owner', flush=True)\n"
    "    except errors.OwnedError: print('owned', flush=True)"
)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return (tmp_path / "run").as_uri()
    return f"s3://{request.getfixturevalue('bucket')}/run"


@pytest.fixture
def store(url: str) -> storage.Store:
    return storage.connect(url)


@pytest.fixture
def owner(url: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that owns the run and renews its lease."""
    started = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", OWNER, url], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def content(store: storage.Store) -> dict[str, object]:
    there = store.read("lease.json")
    assert there
    read: dict[str, object] = json.loads(there.data)
    return read


def left_by(store: storage.Store, process: dict[str, object], attempt: int = 4) -> None:
    """A lease whose owner did not give it back."""
    lost = {"token": "t", "attempt": attempt, "seconds": SECONDS, "renewed": 9, "released": False, "process": process}
    store.create("lease.json", json.dumps(lost).encode())


def test_a_lease_that_was_given_back_is_taken_at_once(store: storage.Store, said: Callable[[], str]) -> None:
    """Every attempt gets a number of its own, also where older ones left only their logs."""
    store.put("attempts/6.jsonl", b"")

    first, one = lease.take(store, SECONDS, ExitStack())
    first.release()
    _, two = lease.take(store, SECONDS, ExitStack())

    assert (one, two) == (7, 8)
    assert "watching" not in said()


def test_a_live_owner_is_named_and_left_alone(store: storage.Store, owner: Callable[[], subprocess.Popen[str]]) -> None:
    """The start that came second asks to be started again, and changes nothing."""
    process = owner()

    with pytest.raises(errors.OwnedError, match=rf"attempt 1 \(process {process.pid} on ") as caught:
        lease.take(store, SECONDS, ExitStack())

    assert caught.value.status == 75
    assert content(store)["attempt"] == 1


def test_an_owner_that_is_gone_from_this_machine_costs_no_time(
    store: storage.Store, owner: Callable[[], subprocess.Popen[str]], said: Callable[[], str]
) -> None:
    """A restart after a crash need not wait for the lease to end."""
    process = owner()
    process.kill()
    process.wait()

    _, number = lease.take(store, 3600, ExitStack())

    assert number == 2
    assert "watching" not in said()
    assert f"took the run over from attempt 1 (process {process.pid} on" in said()


@pytest.mark.parametrize("left", ["dead", "unreadable"])
def test_a_dead_owner_elsewhere_is_replaced_after_the_time_of_its_lease(
    left: str, store: storage.Store, said: Callable[[], str]
) -> None:
    """Measured by the clock of the one that waits; also if nobody can read what lies there."""
    if left == "dead":
        left_by(store, ELSEWHERE)
    else:
        store.create("lease.json", b"{")
    begun = time.monotonic()

    _, number = lease.take(store, SECONDS, ExitStack())

    assert time.monotonic() - begun >= SECONDS
    assert number == (5 if left == "dead" else 1)
    assert "watching 2 s whether it lives" in said()


def test_a_process_with_the_same_number_is_not_the_owner() -> None:
    """Numbers are given again; when the process was started tells it from another, and containers count apart."""
    here = lease.Process.this()
    assert not here.is_gone()

    assert lease.Process(here.host, here.boot, here.space, here.number, here.began + 1).is_gone()
    assert not lease.Process(here.host, here.boot, "pid:[1]", here.number, here.began + 1).is_gone()
    assert not lease.Process(here.host, "before", here.space, here.number, here.began + 1).is_gone()
    assert not lease.Process("other", here.boot, here.space, here.number, here.began + 1).is_gone()


def test_an_owner_that_was_replaced_notices_and_writes_nothing(store: storage.Store) -> None:
    """A machine that was paused for longer than its lease wakes up and must not seal anything."""
    paused, _ = lease.take(store, SECONDS, ExitStack())
    there = store.read("lease.json")
    assert there
    store.replace("lease.json", there.data.replace(paused.token.encode(), b"another"), there.version)
    now, lost, heard = content(store), list[errors.JobError](), threading.Event()

    with pytest.raises(errors.FencedError, match="belongs to another start now") as caught:
        paused.confirm()
    paused.keep(lambda error: (lost.append(error), heard.set()))  # type: ignore[func-returns-value]
    heard.wait(10)
    paused.release()

    assert caught.value.status == 75
    assert isinstance(lost[0], errors.FencedError)
    assert content(store) == now


def test_an_owner_that_nobody_replaced_goes_on_after_an_outage(store: storage.Store) -> None:
    """The time of the lease is for those who wait; what decides is who wrote last."""
    owner, _ = lease.take(store, SECONDS, ExitStack())
    time.sleep(SECONDS * 1.5)

    owner.confirm()

    assert content(store)["renewed"] == 1


def test_of_two_starts_at_the_same_time_only_one_ever_writes(url: str) -> None:
    """Fifty times."""
    command = [sys.executable, "-c", RIVAL]
    rivals = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for number in range(50):
        place = f"{url}/{number}"
        for rival in rivals:
            assert rival.stdin
            rival.stdin.write(f"{place}\n")
            rival.stdin.flush()
        told = sorted(rival.stdout.readline().strip() for rival in rivals if rival.stdout)

        assert told == ["owned", "owner"]
        assert len([e for e in storage.connect(place).list() if e.key.startswith("written-")]) == 1
    for rival in rivals:
        rival.communicate()
