"""Start training as a process of its own and see it to its end, whatever ends it."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from job import cluster, config, errors, log, manifest, paths, preemption
from job.config import Config
from job.inputs import Base, Prepared, Start, Task
from job.preemption import Notice

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # prctl(2)


def task(settings: Config, start: Start, base: Base, data: Prepared, cache: paths.Cache) -> Task:
    """What the training process is told; the place of its result is that of these inputs and no others."""
    digests = {"base": base.digest, "data": data.digest, "config": config.digest(settings), "began": str(start.began)}
    out = cache.work(f"trained-{paths.digest(json.dumps(digests))}")
    scratch = cache.work(f"attempt-{start.attempt}")
    return Task(settings, start, base.path, data.path, out, scratch, cache.log(), digests)


def training(command: Sequence[str], given: Task, environ: Mapping[str, str], notice: Notice) -> Path:
    """Run `command` on the task `given`, pass a request to stop on to it, and wait until it has saved and gone.

    Returns the sealed folder of the result. Raises `errors.Preempted` when it stopped on request, and
    `errors.WorkerError` with its status when it failed.
    """
    if manifest.sealed(given.out):
        log.event("launch.over", "trained already, on this machine")
        return given.out
    for left in given.scratch.parent.glob("attempt-*"):  # by starts that were killed
        shutil.rmtree(left)
    told = given.scratch / "task.json"
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(given.to_json(), encoding="utf-8")
    with notice.deferred():
        status = _run([*command, str(told)], _one_device(environ, cluster.gpus(environ)), notice, given)
        if status > 0 and status != errors.AGAIN:
            raise errors.WorkerError(f"training ended with status {status}; its own message is above", status)
    if status == errors.AGAIN:
        raise errors.Preempted("training was stopped; start the same command again to go on")
    if status:
        name = _name(-status)
        why = "; the kernel kills so when memory runs out" if name == "SIGKILL" else ""
        raise errors.WorkerError(f"training was killed by {name}{why}", errors.FAILED)
    return given.out


def check(settings: Config) -> None:
    """Raise `errors.ConfigError` if `settings` ask for more processes than this version can start."""
    wanted = settings.distributed
    if wanted.strategy not in ("auto", "ddp") or wanted.processes_per_node not in ("auto", 1):
        raise errors.ConfigError(
            f"distributed: strategy {wanted.strategy} with processes_per_node {wanted.processes_per_node} is valid, "
            "but this version trains in one process: use strategy auto and processes_per_node auto, or a later version"
        )


def die_with(parent: int) -> None:
    """End this process when `parent` dies: a training whose job is gone must not go on writing checkpoints."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        raise errors.JobError("the process that started this training is gone")


def _run(command: Sequence[str], environ: Mapping[str, str], notice: Notice, given: Task) -> int:
    """Run the training process to its end, and no longer than this one may write; returns its status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {preemption.RISK})  # inherited: it would kill who does not listen yet
    process = subprocess.Popen(command, env=environ)  # noqa: S603 - our own command line
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {preemption.RISK})
        return _wait(process, notice, given)
    except BaseException:  # another attempt owns the run now: not one more checkpoint
        process.kill()
        process.wait()
        raise


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def _wait(process: "subprocess.Popen[bytes]", notice: Notice, given: Task) -> int:
    told, warned = False, False
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if notice.reason and not told:
                told = True
                if notice.grace is not None:
                    given.know(notice.grace)
                process.send_signal(signal.SIGTERM)
            elif notice.at_risk and not warned:
                warned = True
                process.send_signal(preemption.RISK)


def _one_device(environ: Mapping[str, str], gpus: int) -> dict[str, str]:
    """The environment of a training on one device: of several GPUs only the first is shown to it."""
    if gpus <= 1:
        return dict(environ)
    first = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log.warn(
        "launch.idle", f"this version trains on one GPU: {gpus - 1} of {gpus} stay idle; ask for one GPU", gpus=gpus
    )
    return {**environ, "CUDA_VISIBLE_DEVICES": first}
