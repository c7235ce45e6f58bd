"""Bring the base model and the data to this machine, and say in the first second what cannot be brought.

Files of a ``file://`` URL are used where they lie; everything else is copied to the cache, once.
"""

from job.pull.bring import Survey, adapter, artefact, base, both, data, preflight, prepared, survey

__all__ = ["Survey", "adapter", "artefact", "base", "both", "data", "preflight", "prepared", "survey"]
