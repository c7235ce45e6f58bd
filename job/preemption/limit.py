"""The scheduler's own time limit: known from the start, so that a run stops before it and not by it."""

import threading
import time

from job import log
from job.preemption.notice import Notice

_LOOK_SECONDS = 5.0  # clocks are set now and then


def limit(ends: float, grace: float, notice: Notice) -> None:
    """Ask `notice` to stop `grace` seconds before `ends`, a time by the clock of this machine, unless it is over then.

    Raises nothing where the time is up already: then the scheduler's clock is another than ours, and its signals count.
    """
    if ends - grace > time.time():
        log.event("limit.watch", f"the scheduler ends this job in {(ends - time.time()) / 60:.0f} minutes", ends=ends)
        threading.Thread(target=_wait, args=(ends, grace, notice), daemon=True, name="limit").start()


def _wait(ends: float, grace: float, notice: Notice) -> None:
    pause = threading.Event()
    while (left := ends - grace - time.time()) > 0:
        pause.wait(min(left, _LOOK_SECONDS))
    notice.request("the scheduler's time limit", grace)
