"""What a checkpoint costs, and how often it is worth that."""

import math


class Cost:
    """Seconds that training loses for a checkpoint: the copy, and what steps take longer while it is on its way.

    The latter is nothing where a GPU trains, and more than the copy where the processors train that hash and send.
    """

    def __init__(self) -> None:
        self._stall, self._checkpoints = 0.0, 0
        self._seconds, self._steps = {True: 0.0, False: 0.0}, {True: 0, False: 0}

    def copied(self, stall: float) -> None:
        """A checkpoint kept training waiting for `stall` seconds."""
        self._stall, self._checkpoints = stall, self._checkpoints + 1

    def stepped(self, seconds: float, *, disturbed: bool) -> None:
        """A step took so long, with a checkpoint on its way or not."""
        self._seconds[disturbed] += seconds
        self._steps[disturbed] += 1

    @property
    def seconds(self) -> float | None:
        """The mean so far; None before the first checkpoint."""
        if not self._checkpoints:
            return None
        slower = 0.0
        if all(self._steps.values()):
            slower = self._seconds[True] / self._steps[True] - self._seconds[False] / self._steps[False]
        return self._stall + max(0.0, slower) * self._steps[True] / self._checkpoints


def interval(cost: float, upload: float, between: float) -> float:
    """Seconds between two checkpoints that lose the least, all arguments in seconds.

    The square root of 2 C M (J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM
    17(9), 1974), where C is what a checkpoint costs training (`Cost`) and M the mean time `between` two preemptions.
    Never less than the `upload` takes, which goes on while training does: more often than they reach the store
    checkpoints are worth nothing.
    """
    return max(math.sqrt(2 * cost * between), upload)
