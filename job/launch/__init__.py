"""Start training on every GPU of this machine, and see it to its end.

What the processes make is in ``task.out``; how each of them ended is in ``task.outcomes()``.
"""

from job.launch.compatibility import check_hardware
from job.launch.kernels import check_machine
from job.launch.planning import Plan, check_gpu_memory, check_offloaded, plan
from job.launch.processes import die_with, digests, over, task, training
from job.launch.strategy import choose, place
from job.launch.team import check_environment, environment, team

__all__ = [
    "Plan",
    "check_environment",
    "check_gpu_memory",
    "check_hardware",
    "check_machine",
    "check_offloaded",
    "choose",
    "die_with",
    "digests",
    "environment",
    "over",
    "place",
    "plan",
    "task",
    "team",
    "training",
]
