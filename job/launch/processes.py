"""Start training as processes of its own and see them to their end, whatever ends them."""

import ctypes
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from job import cluster, config, errors, log, manifest, paths, preemption
from job.config import Config
from job.inputs import AFTER_A_LOSS, Base, Prepared, Start, Task, Team
from job.launch import verdict
from job.launch.words import LastWords
from job.preemption import Notice

_POLL_SECONDS = 0.2
_KILL_SECONDS = 20.0  # after that a process that was killed hangs in the kernel, mostly in a driver
_LATER_SECONDS = 1.0  # than the processes themselves give up
_PR_SET_PDEATHSIG = 1  # prctl(2)
_STDERR = 2


def digests(settings: Config, start: Start, base: Base, data: Prepared) -> dict[str, str]:
    """What a checkpoint must have been made from to be gone on with."""
    return {"base": base.digest, "data": data.digest, "config": config.digest(settings), "began": str(start.began)}


def task(
    settings: Config, start: Start, team: Team, base: Base, data: Prepared, resumed: Path | None, cache: paths.Cache
) -> Task:
    """What the training processes are told; the place of their result is that of these inputs and no others."""
    inputs = digests(settings, start, base, data)
    out = cache.work(f"trained-{paths.digest(json.dumps(inputs))}")
    scratch = cache.work(f"attempt-{start.attempt}")
    return Task(settings, start, team, base.path, data.path, out, scratch, cache.log(), inputs, resumed)


def over(given: Task) -> bool:
    """Whether the result of `given` is on this machine already."""
    if manifest.sealed(given.out):
        log.event("launch.over", "trained already, on this machine")
        return True
    return False


def training(
    command: Sequence[str],
    given: Task,
    environ: Mapping[str, str],
    notice: Notice,
    meeting: socket.socket | None = None,
) -> None:
    """Train on the task `given`, pass a request to stop on to the processes that do, and wait until they are gone.

    `command` starts one of them; rank 0 lets the others find it at `meeting`, and where it is, the folder of the result
    is sealed then. Raises `errors.Preempted` when they stopped on request, `errors.WorkerError` with the status of the
    first one that failed, and `errors.PeerError` when they lost those of another machine.
    """
    for left in given.scratch.parent.glob("attempt-*"):  # by starts that were killed
        shutil.rmtree(left)
    told = given.scratch / "task.json"
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(given.to_json(), encoding="utf-8")
    with notice.deferred():
        running: dict[int, _Worker] = {}
        try:
            for local in range(given.team.processes):
                running[given.team.rank(local)] = _start(
                    [*command, "--parent", str(os.getpid())], given, environ, local, meeting, told
                )
            if meeting:
                meeting.close()  # rank 0 has it
            _see_to_the_end(running, given, notice)
        finally:  # also when another attempt owns the run now: not one more checkpoint
            _end(running)
        failure = notice.take()
        if isinstance(failure, errors.FencedError):
            raise failure
        if verdict.find_failed(given):  # more than other machines' failures, or a request to stop
            verdict.judge(given, environ)
        if failure and not _done(given):
            raise failure
    verdict.judge(given, environ)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A process that trains; `words` are what its libraries say on stderr."""

    process: "subprocess.Popen[bytes]"
    words: LastWords
    kills: int
    """How many processes of this container the kernel had killed for memory when it began."""


def die_with(parent: int) -> None:
    """End this process when `parent` dies: a training whose job is gone must not go on writing checkpoints."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        raise errors.JobError("the process that started this training is gone")


def _start(
    command: Sequence[str],
    given: Task,
    environ: Mapping[str, str],
    local: int,
    meeting: socket.socket | None,
    told: Path,
) -> _Worker:
    """One process of the team, told its place as torchrun would.

    Its Python writes to the stderr of the job, its libraries to a pipe that ends there: a bar needs
    a terminal, and the job needs to know what a library said before it aborted the process.
    """
    team, more, opened = given.team, {}, []
    if team.grouped:
        place = {
            "RANK": team.rank(local), "LOCAL_RANK": local, "WORLD_SIZE": team.size,
            "LOCAL_WORLD_SIZE": team.processes, "GROUP_RANK": team.node,
            "MASTER_ADDR": team.first, "MASTER_PORT": team.port,
        }  # fmt: skip
        more = {name: str(value) for name, value in place.items()}
    if meeting and team.rank(local) == 0:
        opened = [meeting.fileno()]
    listening = ["--listening", str(opened[0])] if opened else []
    terminal, kills = os.dup(_STDERR), cluster.oom_kills()
    try:
        process = subprocess.Popen(  # noqa: S603 - our own command line
            [*command, *listening, "--terminal", str(terminal), str(told)],
            env={**environ, **more},
            pass_fds=[*opened, terminal],
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(terminal)
    assert process.stderr
    return _Worker(process, LastWords(process.stderr), kills)


def _see_to_the_end(running: Mapping[int, _Worker], given: Task, notice: Notice) -> None:
    """Wait until all have ended, or one is lost and the others, which wait for it in vain, had some time.

    Not longer than the cluster does, and not at all when another attempt owns the run.
    """
    told, warned, over, until, looked = False, False, False, math.inf, time.time()
    allowed = given.config.checkpoint.grace_seconds
    while True:
        now = time.time()
        alive = _alive(running, given, looked, notice)
        looked = now
        if not alive or time.monotonic() > until or isinstance(notice.failure, errors.FencedError):
            return
        if not told and not over and (notice.failure or _over(given)):  # once told, a checkpoint has what time there is
            over, until = True, time.monotonic() + AFTER_A_LOSS
        if notice.reason:
            if (grace := notice.allowed(given.config.checkpoint.grace_seconds)) != allowed:  # a signal may shorten it
                allowed = grace
                given.allow(grace)
            # one that stands still does not hear it, nor one that waits in vain for another that did
            until = min(until, notice.since + given.grace + _LATER_SECONDS)
            for process in [] if told else alive:
                process.send_signal(preemption.STOP)
            told = True
        elif notice.at_risk and not warned:
            warned = True
            given.warn()
        notice.wait(_POLL_SECONDS)


def _alive(
    running: Mapping[int, _Worker], given: Task, looked: float, notice: Notice
) -> "list[subprocess.Popen[bytes]]":
    """Those that still run. Of one that does not its end is kept, as of when it was `looked` at last.

    So it comes before the ends that it caused.
    """
    alive = [worker.process for worker in running.values() if worker.process.poll() is None]
    known = {outcome.rank for outcome in given.outcomes()}
    for rank, worker in running.items():
        status = worker.process.returncode
        if status is not None and rank not in known:
            end = verdict.Silent(rank, status, looked, worker.words.text())
            asked, short = notice.reason is not None, cluster.oom_kills() > worker.kills
            given.ended(verdict.describe_silent(given, end, asked=asked, short=short))
    return alive


def _end(running: Mapping[int, _Worker]) -> None:
    for worker in running.values():
        worker.process.kill()
    until = time.monotonic() + _KILL_SECONDS
    for rank, process in ((rank, worker.process) for rank, worker in running.items()):
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warn("launch.undead", f"rank {rank} (process {process.pid}) is held by the kernel and does not end")


def _over(given: Task) -> bool:
    """Whether those that still run have nothing left to do: one was lost, or all have said how they end."""
    outcomes = given.outcomes()
    return (
        len(outcomes) == given.team.processes
        or bool(verdict.find_failed(given))
        or any(outcome.lost for outcome in outcomes)
    )


def _done(given: Task) -> bool:
    """Whether all processes on this machine have done what there was to do."""
    outcomes = given.outcomes()
    return len(outcomes) == given.team.processes and all(outcome.status == errors.DONE for outcome in outcomes)
