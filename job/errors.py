"""What can go wrong, and the exit status that each failure ends the process with.

A message says what was seen, where, and what to do. Only ``entrypoint.py`` ends the process with them.
"""

import errno

DONE = 0
FAILED = 1
PERMANENT = 64
AGAIN = 75
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class JobError(Exception):
    """A failure that may not happen again: the next start may succeed."""

    status: int = FAILED
    fault: str = ""
    """Which part of the machine failed, if one did: "gpu", "gpu memory" or "host memory"."""


class PermanentError(JobError):
    """A failure that every further start would repeat: somebody has to change something first."""

    status = PERMANENT


class ConfigError(PermanentError):
    """The config does not say something that the job can do."""


class DataError(PermanentError):
    """The training or evaluation data cannot be used as they are."""


class ModelError(PermanentError):
    """The base model or the adapter is not what the job needs."""


class MachineError(PermanentError):
    """This machine lacks something that the run needs, or has another version of it."""


class StoreError(JobError):
    """The store failed in a way that may pass: timeouts, resets, overload, a damaged transfer. Worth another try."""


class ExpiredError(StoreError):
    """The credentials were good and are not any more; there may be new ones where they came from."""


class DamagedError(StoreError):
    """What arrived is not what was stored: a wrong size or checksum."""


class CorruptError(DamagedError):
    """What is stored is not what was sealed: it arrived wrong in the same way every time."""


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


class OwnedError(JobError):
    """Another attempt owns the run and lives."""

    status = AGAIN


class FencedError(JobError):
    """This attempt was taken for dead and replaced: it must not write any more."""

    status = AGAIN


class PeerError(JobError):
    """Another machine of this attempt failed, stopped or was lost: what is safe in the store counts."""

    status = AGAIN


class DiskFullError(JobError):
    """The local disk has no room for what the job must keep there; another machine's may."""


class GpuError(JobError):
    """A GPU failed, or what ran on it did: another one may not. Counted, so retries end."""

    fault = "gpu"


class GpuMemoryError(PermanentError):
    """Training needs more memory than its GPU has, and every further start would."""

    fault = "gpu memory"


class GpuBusyError(JobError):
    """A GPU's memory was used up by something that the next start may not find there."""

    fault = "gpu memory"


class HostMemoryError(JobError):
    """The memory of the machine or of its container was used up; another machine may have more."""

    fault = "host memory"


class WorkerError(JobError):
    """A process that this one started failed, and said why; its status becomes ours."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Preempted(BaseException):
    """The cluster asked the job to stop, and everything worth keeping is safe."""

    status = AGAIN


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status that `error` stands for, and what to tell the user."""
    if isinstance(error, (JobError, Preempted)):
        return error.status, str(error)
    full = "No space left on device" in str(error)  # also when safetensors says it, in an error of its own
    if full or (isinstance(error, OSError) and error.errno in _FULL):
        where = getattr(error, "filename", None) or "the cache or the store"
        return FAILED, f"no space left on the disk of {where}: free space, or set run.cache to a larger disk"
    if isinstance(error, OSError) and error.errno in _BARRED:
        return PERMANENT, f"{error.filename}: {error.strerror}: correct run.url or run.cache, or its permissions"
    return FAILED, f"unexpected {type(error).__name__}: {error} (--debug shows where)"
