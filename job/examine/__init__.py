"""What the result is like: opened as its users open it, compared with what was trained, and asked questions.

It happens in a process of its own that knows nothing of the job; what does not fit into the memory of this machine, or
into ``examine.minutes``, is left out, and that is said.
"""

from job.examine.look import Models, results

__all__ = ["Models", "results"]
