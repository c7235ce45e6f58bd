"""Where am I: which machine of how many, with which hardware; and in touch with the others."""

from job.cluster.cgroup import memory_limit, oom_kills
from job.cluster.fatbin import Code, read_code
from job.cluster.first import First
from job.cluster.hardware import (
    Gpu,
    cpus,
    describe_gpus,
    driver_version,
    free_gpu_memory,
    free_memory,
    gpus,
    interface,
    memory,
    memory_in_use,
    total_memory,
)
from job.cluster.line import Asked, Lost, listen
from job.cluster.node import Node, discover
from job.cluster.peers import Alone, Other

__all__ = [
    "Alone",
    "Code",
    "First",
    "Gpu",
    "Node",
    "Other",
    "cpus",
    "describe_gpus",
    "discover",
    "driver_version",
    "free_gpu_memory",
    "free_memory",
    "gpus",
    "interface",
    "join",
    "listen",
    "memory",
    "memory_in_use",
    "memory_limit",
    "oom_kills",
    "read_code",
    "total_memory",
]


def join(here: Node, run: str, config: str, gpus: int, asked: Asked, lost: Lost) -> Alone | First | Other:
    """Get in touch with the other machines of the run; to be used in a `with`, whose end they hear of.

    When another one was asked to stop, `asked` is called with the reason; when it failed or is gone, `lost`. Both are
    called in a thread of their own.
    """
    if here.count == 1:
        return Alone()
    return (Other if here.rank else First)(here, run, config, gpus, asked, lost)
