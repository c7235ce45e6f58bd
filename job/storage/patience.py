"""How often and how long something is tried again that failed in a way that may pass.

Full jitter, as in Marc Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): many clients that fail
together do not come back together.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from job import errors

Outcome = TypeVar("Outcome")

CONNECT_SECONDS = 10.0  # until a connection stands
STALL_SECONDS = 30.0  # without a byte in either direction
ANSWER_SECONDS = 60.0  # for a request that the store works on, such as putting a large object's parts together
PART_SECONDS = 300.0  # for one try of a part; a try that brought something useful does not count as failed


_DICE = random.SystemRandom()  # of its own: a draw from the common one would change what training draws next


@dataclass(frozen=True)
class Patience:
    """At most `tries`, none begun later than `seconds` after the first failure; pauses grow from `first` seconds."""

    tries: int = 8
    seconds: float = 180.0
    first: float = 0.2
    longest: float = 20.0

    def keep_trying(
        self,
        attempt: Callable[[], Outcome],
        noted: Callable[[errors.StoreError, int], None],
        wait: Callable[[float], object] = time.sleep,
    ) -> Outcome:
        """Call `attempt` until it does not raise `errors.StoreError`; tell `noted` of every try that failed.

        Raises the last error, with what was tried, or at once what no further try can change.
        """
        failed, tried = 0.0, 0
        while True:
            try:
                return attempt()
            except errors.StoreError as e:
                failed = failed if tried else time.monotonic()
                tried += 1
                pause = _DICE.uniform(0, min(self.longest, self.first * 2**tried))
                passed = time.monotonic() - failed
                if tried >= self.tries or passed + pause > self.seconds:
                    raise type(e)(f"{e} (gave up after {tried} tries in {passed:.0f} s)") from e
                noted(e, tried)
                wait(pause)


USUAL = Patience()
FIRST = Patience(tries=5)  # until a store has answered anything: what never did is more likely a wrong URL than a pause
BRIEF = Patience(tries=3, seconds=20.0)  # to tidy up after a failure
