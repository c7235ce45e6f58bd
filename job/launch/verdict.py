"""Decide how training ended: by what its processes reported, or by how they died."""

import platform
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from job import cluster, errors, failures, log, preemption
from job.inputs import Outcome, Task, Team

# Longer than another machine needs to say why it ends, or is silent before it is taken for dead.
_REASON_SECONDS = 30.0
_SHOWN_LINES = 20  # of the last words, in the log of the attempt
# In use on a GPU when training is gone; a desktop or an idle process takes less.
_SHARED_BYTES = 1 << 30
_MEANS = {
    "SIGBUS": "; a memory-mapped file could not be read: look for a full disk or /dev/shm",
    "SIGKILL": "; the kernel does this when host memory runs out",
}


def judge(given: Task, environ: Mapping[str, str]) -> None:
    """Raise the error that the training processes of this machine ended with, if any failed.

    `environ` is theirs. Call it when all of them are gone: only then does memory that is in use on
    a GPU belong to somebody else.
    """
    team, outcomes = given.team, given.outcomes()
    if failed := find_failed(given):
        raise _failure(failed[0], team, environ)
    if lost := [outcome for outcome in outcomes if outcome.lost]:
        if team.nodes == 1:
            raise errors.WorkerError(lost[0].why, errors.FAILED)
        time.sleep(_REASON_SECONDS)  # interrupted by the reason, if another machine tells it
        advice = "Start the job again on all nodes: it resumes from its last checkpoint"
        raise errors.PeerError(f"{lost[0].why}. {advice}")
    if any(outcome.status == errors.AGAIN for outcome in outcomes):
        raise errors.Preempted("training was stopped; start the same command again to resume")


def find_failed(given: Task) -> list[Outcome]:
    """Return the outcomes that are failures, in the order in which they happened."""
    well = (errors.DONE, errors.AGAIN)
    return [outcome for outcome in given.outcomes() if outcome.status not in well]


@dataclass(frozen=True)
class Silent:
    """A process that ended without saying why; `words` is the end of what its libraries wrote."""

    rank: int
    status: int
    seen: float
    """When it was seen to run for the last time."""
    words: str


def describe_silent(given: Task, end: Silent, *, asked: bool, short: bool) -> Outcome:
    """Return the outcome of a process that ended without reporting why.

    `asked`: the job had been asked to stop. `short`: the kernel's OOM killer ended some process of
    this container. torch's NCCL watchdog aborts a process both when another one is gone, which is
    not this one's failure, and when its own GPU failed, which is.
    """
    if end.words:
        last = end.words.splitlines()[-_SHOWN_LINES:]
        log.detail("worker.words", "\n".join(last), rank=end.rank)
    if asked and -end.status in (*preemption.SIGNALS, preemption.STOP):  # before it could hear it
        return Outcome(end.rank, errors.AGAIN, _killed(end.status), end.seen)
    aborted = end.status == -signal.SIGABRT and given.team.size > 1
    if aborted and failures.lost_another(end.words):
        why = f"rank {end.rank} was aborted by torch, which lost another process"
        return Outcome(end.rank, errors.AGAIN, why, end.seen, lost=True)
    error = _error_of(given, end, short=short)
    return Outcome(end.rank, error.status, str(error), end.seen, fault=error.fault)


def _error_of(given: Task, end: Silent, *, short: bool) -> errors.JobError:
    if end.status == -signal.SIGKILL:
        if short:
            return failures.killed_for_memory(given.config, cluster.memory_limit())
        return errors.JobError(_killed(end.status))
    failure = failures.find(end.words)
    if failure is None or failure.kind == "peer":
        return errors.JobError(_killed(end.status))
    return failures.explain(failure, given.config)


def _failure(first: Outcome, team: Team, environ: Mapping[str, str]) -> errors.WorkerError:
    """Return the error for the process that failed first, with its rank, machine and GPU."""
    gpu = _gpu_of(first, team, environ)
    who = f"rank {first.rank} of {team.size}" if team.size > 1 else ""
    if gpu and first.fault.startswith("gpu"):
        who = f"{who} on {platform.node()} (GPU {gpu})".lstrip()
    why = f"{who}: {first.why}" if who else first.why
    used = cluster.memory_in_use(gpu) if gpu and first.fault == "gpu memory" else 0
    if used > _SHARED_BYTES:
        return errors.WorkerError(
            f"{why}. Other processes use {log.size(used)} of this GPU's memory: stop them, or start "
            "the job again once they are gone. Training may fit then",
            errors.FAILED,
        )
    return errors.WorkerError(why, first.status)


def _gpu_of(outcome: Outcome, team: Team, environ: Mapping[str, str]) -> str:
    """Return what CUDA_VISIBLE_DEVICES calls the GPU of that process; nothing on a CPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if team.gpus else []
    local = outcome.rank - team.rank(0)
    return visible[local] if local < len(visible) else ""


def _killed(status: int) -> str:
    """Return how a process that reported nothing ended, by its `status`."""
    if status >= 0:
        return f"training ended with status {status} and reported no error"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # one of the real-time signals
        name = f"signal {-status}"
    return f"training was killed by {name}{_MEANS.get(name, '')}"
