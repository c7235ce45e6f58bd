"""How often a checkpoint is worth its time."""

import math


def interval(stall: float, upload: float, between: float) -> float:
    """Seconds between two checkpoints that lose the least, all arguments in seconds.

    The square root of 2 C M (J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM
    17(9), 1974), where C is how long training stands still for a checkpoint (`stall`) and M the mean time `between`
    two preemptions. Never less than the `upload` takes, which goes on while training does: more often than they reach
    the store checkpoints are worth nothing.
    """
    return max(math.sqrt(2 * stall * between), upload)
