"""Has the cluster asked us to stop? Signals and the clouds' spot notices become one notice that every step can see."""

from job.preemption.notice import RISK, SIGNALS, Notice
from job.preemption.spot import Endpoints, watch

__all__ = ["RISK", "SIGNALS", "Endpoints", "Notice", "watch"]
