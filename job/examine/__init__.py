"""Verification: the result opened as its users open it, compared with what was trained, and asked questions.

It happens in a process of its own that knows nothing of the job; what does not fit into the memory of this machine, or
into ``examine.minutes``, is left out, and that is said. Importing this package imports no heavy library, so that the
process can be started before the merge and imports while that works.
"""

from job.examine.look import Models, results
from job.examine.runner import Program, started

__all__ = ["Models", "Program", "results", "started"]
