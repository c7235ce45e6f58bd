"""Which training steps are safe in the store: save, find the latest, restore, and forget the old ones."""

from job.checkpoint.background import Background
from job.checkpoint.cadence import Cost, interval
from job.checkpoint.kept import Checkpoints, Found
from job.checkpoint.state import TRAINER, Loop, State, capture, restore_adapter, restore_optimizer, unlogged

__all__ = [
    "TRAINER",
    "Background",
    "Checkpoints",
    "Cost",
    "Found",
    "Loop",
    "State",
    "capture",
    "interval",
    "restore_adapter",
    "restore_optimizer",
    "unlogged",
]
