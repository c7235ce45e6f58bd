"""What can go wrong, and the exit status that each failure ends the process with.

A message says what was seen, where, and what to do. Only ``entrypoint.py`` turns these into exit statuses.
"""

DONE = 0
FAILED = 1
PERMANENT = 64
AGAIN = 75


class JobError(Exception):
    """A failure that may not happen again: the next start may succeed."""

    status: int = FAILED


class PermanentError(JobError):
    """A failure that every further start would repeat: somebody has to change something first."""

    status = PERMANENT


class ConfigError(PermanentError):
    """The config does not say something that the job can do."""


class DataError(PermanentError):
    """The training or evaluation data cannot be used as they are."""


class ModelError(PermanentError):
    """The base model or the adapter is not what the job needs."""


class StoreError(JobError):
    """The store failed in a way that may pass: timeouts, resets, overload, a damaged transfer. Worth another try."""


class ExpiredError(StoreError):
    """The credentials were good and are not any more; there may be new ones where they came from."""


class DamagedError(StoreError):
    """What arrived is not what was stored: a wrong size or checksum."""


class UnsupportedError(PermanentError):
    """The store cannot do what was asked of it, however often it is asked."""


class NotFoundError(PermanentError):
    """A bucket, key or file that must exist does not."""


class DeniedError(PermanentError):
    """The store refused the credentials, or what they ask for. Never read as "not there"."""


class ChangedError(JobError):
    """What is being read was overwritten meanwhile: a new start reads the new version from its beginning."""


class ConflictError(JobError):
    """A conditional write lost: the key exists already, or somebody else changed it first."""


class DiskFullError(JobError):
    """The local disk has no room for what the job must keep there; another machine's may."""


class WorkerError(JobError):
    """A process that this one started failed, and said why; its status becomes ours."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Preempted(BaseException):
    """The cluster asked the job to stop, and everything worth keeping is safe."""

    status = AGAIN
