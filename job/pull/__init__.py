"""Bring the base model and the data to this machine, and say in the first second what cannot be brought.

Files of a ``file://`` URL are used where they lie; everything else is copied to the cache, once.
"""

from job.pull.bring import adapter, artefact, base, both, data, preflight, prepared

__all__ = ["adapter", "artefact", "base", "both", "data", "preflight", "prepared"]
