"""How training ended: what its processes said themselves, and what the job makes of the end of those that could not."""

import platform
import signal
import time
from collections.abc import Mapping

from job import cluster, errors, failures, log, preemption
from job.inputs import Outcome, Task, Team

_REASON_SECONDS = 30.0  # longer than another machine needs to say why it ends, or is silent before it is taken for dead
_SHOWN_LINES = 20  # of the last words, in the log of the attempt
_SHARED_BYTES = 1 << 30  # in use on a GPU when training is gone, beyond what a desktop or an idle process takes
_MEANS = {
    "SIGBUS": "; a file that is mapped into memory could not be read or written, mostly for a full /dev/shm or disk",
    "SIGKILL": "; the kernel kills so when memory runs out",
}


def judge(given: Task, environ: Mapping[str, str]) -> None:
    """Raise what the processes on this machine ended with, if they did not end well.

    `environ` is theirs. To be called when all of them are gone: only then is what a GPU still holds somebody else's.
    """
    team, outcomes = given.team, given.outcomes()
    if failed := find_failed(given):
        raise _failure(failed[0], team, environ)
    if lost := [outcome for outcome in outcomes if outcome.lost]:
        if team.nodes == 1:
            raise errors.WorkerError(lost[0].why, errors.FAILED)
        time.sleep(_REASON_SECONDS)  # interrupted by the reason, if another machine tells it
        raise errors.PeerError(f"{lost[0].why}. Start again on all nodes to go on")
    if any(outcome.status == errors.AGAIN for outcome in outcomes):
        raise errors.Preempted("training was stopped; start the same command again to go on")


def find_failed(given: Task) -> list[Outcome]:
    """Return the ends that are failures, the first one first."""
    return [outcome for outcome in given.outcomes() if outcome.status not in (errors.DONE, errors.AGAIN)]


def describe_silent(
    given: Task, rank: int, status: int, seen: float, words: str, *, asked: bool, short: bool
) -> Outcome:
    """Return how process `rank` ended at the time `seen`, with `status` and these last words, without saying so itself.

    It was `asked` to stop before, or the container was `short` of memory and the kernel killed some process in it.
    torch aborts a process from a thread of its own when NCCL fails: because another process is gone, which is not this
    one's failure, or because its own GPU failed, which is.
    """
    if words:
        log.detail("worker.words", "\n".join(words.splitlines()[-_SHOWN_LINES:]), rank=rank)
    if asked and -status in (*preemption.SIGNALS, preemption.STOP):  # before it could hear it
        return Outcome(rank, errors.AGAIN, _killed(status), seen)
    if status == -signal.SIGABRT and given.team.size > 1 and failures.lost_another(words):
        why = f"rank {rank} was aborted by torch, which lost another process"
        return Outcome(rank, errors.AGAIN, why, seen, lost=True)
    if status == -signal.SIGKILL and short:
        error: errors.JobError = failures.killed_for_memory(given.config, cluster.memory_limit())
        return Outcome(rank, error.status, str(error), seen, fault=error.fault)
    failure = failures.find(words)
    if failure and failure.kind != "peer" and status != -signal.SIGKILL:
        error = failures.explain(failure, given.config)
        return Outcome(rank, error.status, str(error), seen, fault=error.fault)
    return Outcome(rank, errors.FAILED, _killed(status), seen)


def _failure(first: Outcome, team: Team, environ: Mapping[str, str]) -> errors.WorkerError:
    """Return the error for the process that failed first, and with which GPU of which machine."""
    gpu = _gpu_of(first, team, environ)
    who = f"rank {first.rank} of {team.size}" if team.size > 1 else ""
    if gpu and first.fault.startswith("gpu"):
        who = f"{who} on {platform.node()} (GPU {gpu})".lstrip()
    why = f"{who}: {first.why}" if who else first.why
    if gpu and first.fault == "gpu memory" and (used := cluster.memory_in_use(gpu)) > _SHARED_BYTES:
        return errors.WorkerError(
            f"{why}. But other processes use {log.size(used)} of that GPU: end them, or start again when they have "
            "ended; what training needs may fit then",
            errors.FAILED,
        )
    return errors.WorkerError(why, first.status)


def _gpu_of(outcome: Outcome, team: Team, environ: Mapping[str, str]) -> str:
    """Return what CUDA_VISIBLE_DEVICES calls the GPU of that process; nothing on a CPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if team.gpus else []
    local = outcome.rank - team.rank(0)
    return visible[local] if local < len(visible) else ""


def _killed(status: int) -> str:
    """Return what to tell of a process that ended with `status` and without a word."""
    if status >= 0:
        return f"training ended with status {status} and said nothing"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # one of the real-time signals
        name = f"signal {-status}"
    return f"training was killed by {name}{_MEANS.get(name, '')}"
