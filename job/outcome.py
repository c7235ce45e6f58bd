"""How a process of the job ends: its last words, and the exit status that they stand for."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack

from job import errors, log, preemption
from job.inputs import Outcome, Task
from job.preemption import Notice


def conclude(job: Callable[[Notice, ExitStack], None], *, as_json: bool, debug: bool) -> None:
    """Run `job`, say why it did not succeed if so, and end the process with the status that it stands for."""
    log.to_people(sys.stderr, as_json=as_json)
    with ExitStack() as after:
        error = _run(lambda notice: job(notice, after))
        status, message = errors.explain(error) if error else (errors.DONE, "")
        if error:
            say = log.warn if status == errors.AGAIN else log.error
            lost = isinstance(error, errors.PeerError)
            say("run.end", message, status=status, lost=lost, traceback=_trace(error, debug=debug))
    sys.exit(status)


def tell(job: Callable[[Notice], None], given: Task, rank: int, *, debug: bool) -> None:
    """Run `job`, one of the processes that train, keep in `given` how it ended, and end it.

    Who started it says so to the user: of several that fail, the others fail because of the first.
    """
    error = _run(job)
    status, message = errors.explain(error) if error else (errors.DONE, "done")
    with contextlib.suppress(OSError):  # of a full disk: the job sees our status, and finds the disk full itself
        lost, fault = isinstance(error, errors.PeerError), getattr(error, "fault", "")
        given.ended(Outcome(rank, status, message, time.time(), lost=lost, fault=fault))
    if error:
        log.detail("worker.end", message, rank=rank, status=status, traceback=_trace(error, debug=debug))
    sys.exit(status)


def stuck(given: Task, rank: int) -> Callable[[str, bool], None]:
    """What a process that stands still does: it says so, and ends, whatever it is in the midst of.

    It is told why, and whether it is `lost`: it waits for another one in vain.
    """

    def end(why: str, lost: bool) -> None:  # noqa: FBT001 - of one caller
        status = errors.AGAIN if lost else errors.FAILED
        try:
            given.ended(Outcome(rank, status, why, time.time(), lost=lost))
            log.detail("worker.stuck", why, rank=rank)
        finally:
            os._exit(status)

    return end


def _run(job: Callable[[Notice], None]) -> BaseException | None:
    notice = preemption.Notice()
    try:
        try:
            notice.listen()
            job(notice)
        finally:
            notice.conclude()
    except (Exception, errors.Preempted) as e:  # noqa: BLE001 - the one place where errors become statuses
        notice.conclude()  # again, if a request came in the moment before the first time
        return _find_interruption(e, notice) or e
    return None


def _find_interruption(error: BaseException, notice: Notice) -> BaseException | None:
    """Return the exception that `notice` interrupted the job with, if `error` came of it.

    An interruption is raised wherever the main thread is, also below C code, and some of that
    code raises an error of its own in its place, such as a SystemError.
    """
    link: BaseException | None = error
    while link is not None and link is not notice.interruption:
        # An error of ours that was raised while the interruption was handled, such as by the
        # release of the lease, is another one; one that was raised from it is the same.
        ours = isinstance(link, errors.JobError)
        link = link.__cause__ if ours else link.__cause__ or link.__context__
    if link is not None and link is not error:
        log.detail("run.interrupted", f"the interruption was turned into {error!r}")
    return link


def _trace(error: BaseException, *, debug: bool) -> str:
    text = "".join(traceback.format_exception(error))
    if debug:
        print(text, file=sys.stderr)  # noqa: T201 - asked for
    return text
