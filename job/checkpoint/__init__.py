"""Which training steps are safe in the store: save, find the latest, restore, and forget the old ones.

`job.checkpoint.state`, which needs torch, is imported by who trains.
"""

from job.checkpoint.background import Background, most_copies
from job.checkpoint.cadence import Cost, interval
from job.checkpoint.kept import Checkpoints, Found

__all__ = ["Background", "Checkpoints", "Cost", "Found", "interval", "most_copies"]
