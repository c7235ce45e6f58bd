"""Several training processes on one machine, and how the job ends when one of them does."""

import dataclasses
import itertools
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from job import cluster, config, errors, inputs, launch, preemption
from job.launch import processes, verdict, words

WORKER = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from job import inputs, launch
launch.die_with(int(sys.argv[sys.argv.index("--parent") + 1]))
task = inputs.Task.from_json(pathlib.Path(sys.argv[-1]).read_text())
rank = int(os.environ["RANK"])
def tell(status, why="because", lost=False):
    task.ended(inputs.Outcome(rank, status, why, time.time(), lost))
    sys.exit(status)
def here(name):
    (task.base / f"{{name}}-{{rank}}").write_text(str(os.getpid()))
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time for the others when one has failed."""
    monkeypatch.setattr(processes, "AFTER_A_LOSS", 3.0)


@pytest.fixture
def task(tiny_run: Callable[..., Path], tmp_path: Path) -> inputs.Task:
    settings = config.read(tiny_run())
    start, team = inputs.Start(1, 0, "token", 60.0), inputs.Team(processes=2)
    out, scratch, log = tmp_path / "out", tmp_path / "scratch", tmp_path / "log"
    return inputs.Task(settings, start, team, tmp_path, tmp_path, out, scratch, log, {}, None)


def train(code: str, task: inputs.Task, notice: preemption.Notice | None = None) -> None:
    """Launch two processes that do `code`; they know their `rank` and can `tell` how they end."""
    program = [sys.executable, "-c", WORKER.format(root=str(ROOT)) + code]
    kernels = task.scratch / "kernels"
    gpus = ("6", "7") if task.team.gpus else ()
    environ = launch.environment(
        os.environ, task.team, gpus, None, kernel_cache=kernels, deterministic=True, offload=False
    )
    launch.training(program, task, environ, notice or preemption.Notice())


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < until, f"never came: {paths}"
        time.sleep(0.05)


def gone(pid: Path) -> bool:
    """Whether the process that left its number there has ended, within some seconds."""
    process = int(pid.read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def lost(task: inputs.Task, *failures: errors.JobError, after: float = 0.0) -> Iterator[preemption.Notice]:
    """A notice to which another thread tells these failures, some seconds after both processes are up."""
    notice = preemption.Notice()
    notice.listen()

    def tell() -> None:
        wait_for(task.base / "up-0", task.base / "up-1")
        for failure in failures:
            time.sleep(after)
            notice.interrupt(failure)

    telling = threading.Thread(target=tell)
    telling.start()
    try:
        yield notice
    finally:
        telling.join()
        for number in (*preemption.SIGNALS, preemption.STOP, signal.SIGRTMIN):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def with_another_machine(task: inputs.Task) -> inputs.Task:
    return dataclasses.replace(task, team=dataclasses.replace(task.team, nodes=2))


def test_each_process_knows_its_rank_and_how_many_there_are(task: inputs.Task) -> None:
    """As torchrun would tell it."""
    code = "tell(0 if os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == str(rank) else 1)"

    train(code, task)

    assert [outcome.status for outcome in task.outcomes()] == [0, 0]


@pytest.mark.parametrize("status", [1, 64])
def test_the_first_failure_is_the_jobs_with_its_status_and_reason(status: int, task: inputs.Task) -> None:
    """The other process, which waits for it in vain, is ended; what it says then is not shown."""
    code = f"here('up'); time.sleep(rank); rank or tell({status}, 'no such column'); time.sleep(60)"

    with pytest.raises(errors.WorkerError, match=r"^rank 0 of 2: no such column$") as caught:
        train(code, task)

    assert caught.value.status == status
    assert gone(task.base / "up-0")
    assert gone(task.base / "up-1")


def test_a_process_that_is_killed_is_named(task: inputs.Task) -> None:
    """It could not say so itself."""
    code = "rank and os.kill(os.getpid(), 9); time.sleep(60)"

    with pytest.raises(errors.WorkerError, match=r"^rank 1 of 2: training was killed by SIGKILL; the kernel") as caught:
        train(code, task)

    assert caught.value.status == 1


ABORTED = """
here("up")
if rank:
    os.write(2, b"[rank1]:[E409 ProcessGroupNCCL.cpp:2068] [Rank 1] Process group watchdog thread terminated with "
                b"exception: {}\\nframe #0: c10::Error::Error\\n")
    os.abort()
time.sleep(60)
"""
ECC = "CUDA error: uncorrectable ECC error encountered"
NO_PEER = "NCCL error: remote process exited or there was a network error, NCCL version 2.28.9"


def with_gpus(task: inputs.Task) -> inputs.Task:
    return dataclasses.replace(task, team=dataclasses.replace(task.team, gpus=True))


def test_a_gpu_that_fails_is_a_failure_of_its_own_also_among_several_machines(
    task: inputs.Task, capfd: pytest.CaptureFixture[str]
) -> None:
    """NCCL's watchdog aborts it as if it had lost another; nobody would count it. The user still sees the words."""
    with pytest.raises(errors.WorkerError) as caught:
        train(ABORTED.format(ECC), with_gpus(with_another_machine(task)))

    assert caught.value.status == 1
    assert str(caught.value).startswith(
        f"rank 1 of 4 on {platform.node()} (GPU 7): {ECC}. The GPU or its link is broken: take the node out of service"
    )
    assert ECC in capfd.readouterr().err
    assert gone(task.base / "up-0")


def test_a_process_that_torch_aborts_for_the_loss_of_another_did_not_fail(
    task: inputs.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the other machine's turn to say why."""
    monkeypatch.setattr(verdict, "_REASON_SECONDS", 0.1)

    with pytest.raises(errors.PeerError, match="rank 1 was aborted by torch, which lost another process"):
        train(ABORTED.format(NO_PEER), with_another_machine(task))


def test_a_process_that_aborts_for_another_reason_is_counted(task: inputs.Task) -> None:
    """Such as a library that wrote where it must not."""
    with pytest.raises(errors.WorkerError, match=r"^rank 1 of 4: training was killed by SIGABRT$") as caught:
        train(
            "here('up'); rank and os.write(2, b'free(): invalid pointer') and os.abort(); time.sleep(60)",
            with_another_machine(task),
        )

    assert caught.value.status == 1


def test_bitsandbytes_ends_the_process_itself_when_memory_is_short(task: inputs.Task) -> None:
    """By exit(1) from C++, in the exact words of its library; that is as permanent as what torch says of it."""
    code = """
if rank:
    libc = ctypes.CDLL(None)
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")
    libc.fprintf(stderr, b"Error %s at line %d in file %s\\n", b"out of memory", 559, b"/src/csrc/pythonInterface.cpp")
    libc.exit(1)
time.sleep(60)
"""

    with pytest.raises(
        errors.WorkerError, match=r"memory is too small: bitsandbytes: out of memory\. Change"
    ) as caught:
        train("import ctypes" + code, with_gpus(task))

    assert caught.value.status == 64


def test_a_gpu_that_others_use_too_may_have_room_later(task: inputs.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use when training is gone is somebody else's: that is said, and the next start may succeed."""
    asked_for: list[str] = []
    monkeypatch.setattr(cluster, "memory_in_use", lambda gpu: asked_for.append(gpu) or 11_000_000_000)
    code = "rank and task.ended(inputs.Outcome(rank, 64, 'too small', time.time(), fault='gpu memory')); time.sleep(1)"

    with pytest.raises(
        errors.WorkerError, match=r"^rank 1 of 2 on .* \(GPU 7\): too small\. .* use 11\.0 GB"
    ) as caught:
        train(code, with_gpus(task))

    assert caught.value.status == 1
    assert asked_for == ["7"]


def test_what_the_kernel_killed_for_want_of_memory_is_told_from_other_kills(
    task: inputs.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container's own count of them grew."""
    kills = itertools.chain([3, 3], itertools.repeat(4))
    monkeypatch.setattr(cluster, "oom_kills", lambda: next(kills))
    monkeypatch.setattr(cluster, "memory_limit", lambda: 8 * 2**30)

    with pytest.raises(errors.WorkerError, match=r"^rank 1 of 2: the kernel killed .* limit is 8\.0 GiB") as caught:
        train("rank and os.kill(os.getpid(), 9); time.sleep(60)", task)

    assert caught.value.status == 1


def test_the_last_words_are_passed_on_whole_and_kept_in_part(capfd: pytest.CaptureFixture[str]) -> None:
    """What a library writes without end does not fill the memory of the job."""
    reading, writing = os.pipe()
    kept = words.LastWords(os.fdopen(reading, "rb"))
    with os.fdopen(writing, "wb") as pipe:
        for number in range(30_000):
            pipe.write(b"%07d\n" % number)

    end = kept.text()

    assert end.endswith("0029999\n")
    assert len(end) == 1 << 16
    assert capfd.readouterr().err.splitlines() == [f"{number:07d}" for number in range(30_000)]


def test_a_process_left_behind_does_not_hold_up_the_end(task: inputs.Task) -> None:
    """It has inherited the pipe, which so stays open."""
    begun = time.monotonic()
    code = "import subprocess\nif rank:\n    subprocess.Popen(['sleep', '30'])\n    os.abort()\ntime.sleep(60)"

    with pytest.raises(errors.WorkerError, match="SIGABRT"):
        train(code, task)

    assert time.monotonic() - begun < 20


def test_the_killed_one_is_the_reason_and_not_what_the_others_say_of_it(task: inputs.Task) -> None:
    """They notice its end before the job does."""
    code = """
if rank:
    here("down")
    os.kill(os.getpid(), 9)
while not (task.base / "down-1").exists():
    time.sleep(0.001)
time.sleep(0.02)
tell(1, "connection reset by peer")
"""

    with pytest.raises(errors.WorkerError, match=r"^rank 1 of 2: training was killed by SIGKILL"):
        train(code, task)


def test_a_process_that_does_not_answer_any_more_is_killed(task: inputs.Task) -> None:
    """Another one has waited for it in vain, and says so."""
    code = "here('up'); rank or tell(75, 'rank 0 waited 600 s for rank 1', lost=True); time.sleep(60)"

    with pytest.raises(errors.WorkerError, match=r"^rank 0 waited 600 s for rank 1$") as caught:
        train(code, task)

    assert caught.value.status == 1
    assert gone(task.base / "up-1")


def test_the_loss_of_another_machine_is_told_with_its_reason(task: inputs.Task) -> None:
    """Our processes notice first, and the job waits for what the other machine says."""
    code = "here('up'); tell(75, 'lost another process', lost=True)"

    with (
        lost(task, errors.PeerError("node 1 (h1) is gone"), after=2) as notice,
        pytest.raises(errors.PeerError, match=r"^node 1 \(h1\) is gone$"),
    ):
        train(code, with_another_machine(task), notice)


def test_a_failure_of_our_own_is_told_whatever_another_machine_says(task: inputs.Task) -> None:
    """It lost our process, and says so while we still wait for the others of ours."""
    code = "here('up'); rank or tell(64, 'no such column'); time.sleep(60)"

    with (
        lost(task, errors.PeerError("node 1 (h1) ended: lost another process"), after=2) as notice,
        pytest.raises(errors.WorkerError, match=r"^rank 0 of 4: no such column$") as caught,
    ):
        train(code, with_another_machine(task), notice)

    assert caught.value.status == 64


def asked(task: inputs.Task, notice: preemption.Notice, grace: float = 30.0) -> threading.Thread:
    """Ask to stop when both processes are up."""

    def ask() -> None:
        wait_for(task.base / "up-0", task.base / "up-1")
        notice.since, notice.grace, notice.reason = time.monotonic(), grace, "SIGTERM"

    asking = threading.Thread(target=ask)
    asking.start()
    return asking


def test_a_failure_is_told_although_the_job_was_asked_to_stop(task: inputs.Task) -> None:
    """Else the next start would run into the same, and nobody would count it."""
    notice = preemption.Notice()
    code = "signal.signal(signal.SIGPWR, lambda *_: tell(64, 'access denied')); here('up'); time.sleep(60)"

    asking = asked(task, notice)
    with pytest.raises(errors.WorkerError, match="access denied") as caught:
        train(code, task, notice)
    asking.join()

    assert caught.value.status == 64


def test_who_does_not_hear_a_request_to_stop_is_ended_before_the_cluster_does_it(task: inputs.Task) -> None:
    """On GPUs one that waits for another in vain; the job ends with its own status, and not with SIGKILL."""
    notice = preemption.Notice()

    asking = asked(task, notice, grace=5.0)
    with pytest.raises(errors.Preempted):
        train("signal.signal(signal.SIGPWR, signal.SIG_IGN); here('up'); time.sleep(60)", task, notice)
    asking.join()

    assert time.monotonic() - notice.since < 5
    assert gone(task.base / "up-0")
    assert gone(task.base / "up-1")


def test_a_signal_that_follows_a_clouds_notice_shortens_the_time(task: inputs.Task) -> None:
    """The cloud gave two minutes, and the cluster that drains the machine gives ten seconds from then on."""
    config = task.config.model_copy(
        update={"checkpoint": task.config.checkpoint.model_copy(update={"grace_seconds": 6})}
    )
    task = dataclasses.replace(task, config=config)
    notice = preemption.Notice()
    notice.listen()

    def signalled() -> None:
        asked(task, notice, grace=115.0).join()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=signalled)
    asking.start()
    with pytest.raises(errors.Preempted):
        train("signal.signal(signal.SIGPWR, signal.SIG_IGN); here('up'); time.sleep(60)", task, notice)
    asking.join()

    assert time.monotonic() - notice.since < 1 + 6
    assert gone(task.base / "up-0")


def test_a_process_that_cannot_listen_yet_may_be_stopped_too(task: inputs.Task) -> None:
    """While it imports torch the signal ends it, which is no failure."""
    notice = preemption.Notice()

    asking = asked(task, notice)
    with pytest.raises(errors.Preempted):
        train("here('up'); time.sleep(60)", task, notice)
    asking.join()


def test_a_checkpoint_on_its_way_is_waited_for_when_a_machine_is_lost(task: inputs.Task) -> None:
    """The steps since the last one would be lost besides; that a second one is lost changes nothing."""
    code = "here('up'); time.sleep(2); here('saved'); tell(75, '', True)"
    failures = errors.PeerError("node 1 (h1) is gone"), errors.PeerError("node 2 (h2) is gone")

    with lost(task, *failures, after=0.5) as notice, pytest.raises(errors.PeerError, match="node 1"):
        train(code, with_another_machine(task), notice)

    assert (task.base / "saved-0").exists()
    assert (task.base / "saved-1").exists()


def test_a_machine_that_is_lost_when_all_is_done_is_not_missed(task: inputs.Task) -> None:
    """The result is there."""
    with lost(task, errors.PeerError("node 1 (h1) is gone")) as notice:
        train("here('up'); time.sleep(1); tell(0)", with_another_machine(task), notice)


def test_a_process_that_is_done_and_does_not_end_is_ended(task: inputs.Task) -> None:
    """A driver or a library that hangs when Python takes it down keeps no result."""
    train("task.ended(inputs.Outcome(rank, 0, 'done', time.time())); here('up'); time.sleep(60)", task)

    assert gone(task.base / "up-0")
    assert gone(task.base / "up-1")


def test_a_request_to_stop_reaches_all_of_them_once(task: inputs.Task) -> None:
    """The slowest is waited for."""
    notice = preemption.Notice()
    code = """
count = 0
def save(*_):
    global count
    count += 1
signal.signal(signal.SIGPWR, save)
here("up")
while not count:
    time.sleep(0.05)
here("asked")
time.sleep(2 + rank)
tell(75, str(count))
"""

    asking = asked(task, notice)
    with pytest.raises(errors.Preempted, match="stopped by SIGTERM"):
        train(code, task, notice)
    asking.join()

    assert [(outcome.status, outcome.why) for outcome in task.outcomes()] == [(75, "1"), (75, "1")]


def test_a_start_that_was_replaced_ends_all_of_them_at_once(task: inputs.Task) -> None:
    """Not one more checkpoint."""
    with lost(task, errors.FencedError("taken for dead")) as notice, pytest.raises(errors.FencedError):
        train("here('up'); time.sleep(60)", task, notice)

    assert gone(task.base / "up-0")
    assert gone(task.base / "up-1")


def test_what_is_kept_of_an_ending_is_what_the_process_said_itself(task: inputs.Task) -> None:
    """Others see only that it is gone."""
    task.ended(dataclasses.replace(inputs.Outcome(1, 64, "no such column", 2.0)))
    task.ended(inputs.Outcome(1, 1, "killed", 3.0))
    task.ended(inputs.Outcome(0, 1, "lost rank 1", 2.5))

    assert [outcome.why for outcome in task.outcomes()] == ["no such column", "lost rank 1"]
