"""The run as frozen typed data, and the only reader of configs."""

from job.config.data import Data, Source
from job.config.identity import began, claimed, differences, digest
from job.config.merging import Merging, merging
from job.config.read import Places, all_keys, check, parse, read
from job.config.sampling import Sampling, sampling
from job.config.schema import Config, Model
from job.config.training import Checkpoint, Examine, Lora, Merge, Train
from job.config.urls import absolute

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Examine",
    "Lora",
    "Merge",
    "Merging",
    "Model",
    "Places",
    "Sampling",
    "Source",
    "Train",
    "absolute",
    "all_keys",
    "began",
    "check",
    "claimed",
    "differences",
    "digest",
    "merging",
    "parse",
    "read",
    "sampling",
]
