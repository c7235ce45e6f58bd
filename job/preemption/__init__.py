"""Has the cluster asked us to stop? Signals, spot notices and the time limit become one notice that all steps see."""

from job.preemption.limit import limit
from job.preemption.notice import SIGNALS, STOP, Notice
from job.preemption.spot import Endpoints, watch

__all__ = ["SIGNALS", "STOP", "Endpoints", "Notice", "limit", "watch"]
