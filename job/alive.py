"""A sign of life for whoever started this process: a file that is young as long as the process is alive.

Kubernetes and Docker look at its age (k8s/base, the Dockerfile's HEALTHCHECK). It says that the interpreter runs, not
that the run gets on: training processes that stand still are found by `job.train.ranks`, and end the job.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from job import log

BEAT_SECONDS = 10.0


def keep(path: Path) -> Callable[[], None]:
    """Touch the file at `path` from now on, every ten seconds, until what is returned is called, which removes it.

    One that cannot be written is said, and nothing more: what looks at it will tell in its own way.
    """
    over = threading.Event()
    if not _touched(path):
        return over.set

    def beat() -> None:
        while not over.wait(BEAT_SECONDS) and _touched(path):
            pass

    def end() -> None:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)

    thread = threading.Thread(target=beat, daemon=True, name="alive")
    thread.start()
    return end


def _touched(path: Path) -> bool:
    """Whether the file is as young as can be now. One that others put there as a link is not followed."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.utime(file)
        finally:
            os.close(file)
    except OSError as e:
        log.warn(
            "alive.none",
            f"the sign of life {path} (FINETUNE_ALIVE) cannot be written ({e.strerror}): what looks at it will take "
            "this process for dead. Make the folder writable, as by --tmpfs /tmp, or set FINETUNE_ALIVE to nothing",
        )
        return False
    return True
