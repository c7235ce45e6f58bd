"""Recognize a failed GPU, exhausted memory or a lost process by the texts of the libraries.

Sources of the texts: torch's ProcessGroupNCCL.cpp and c10/cuda (public copies, not the tag of
2.13), public issues for NCCL and cuDNN, Triton's backends/nvidia/driver.c, and the strings in
bitsandbytes 0.50.2's CUDA library. None of them was seen on a GPU of our own.
"""

import re
from dataclasses import dataclass
from typing import Literal

from job import errors
from job.config import Config

Kind = Literal["gpu", "gpu memory", "host memory", "shared memory", "peer"]

# In the order in which they are looked for at one place of the text; the first place counts.
_SAYS = re.compile(
    r"(?P<full>CUDA out of memory\.(?:(?! If reserved)[^\n])*)"  # torch's advice is set already
    r"|CUDA(?: driver)? error: (?P<torch>[^\n]+)"
    r"|Cuda failure (?:\d+ )?'(?P<nccl>[^'\n]+)'"
    r"|Triton Error \[CUDA\]: (?P<triton>[^\n]+)"
    r"|(?P<cudnn>cuDNN error: \w+)"
    # what its C++ writes to stderr before it calls exit(1)
    r"|^Error (?P<bitsandbytes>[^\n]+) at line \d+ in file \S+$"
    r"|(?P<host>DefaultCPUAllocator: (?:can't allocate|not enough) memory[^\n]*|std::bad_alloc"
    r"|Unable to allocate [^\n]+ for an array|Cannot allocate memory)"
    r"|(?P<shared>Error while creating shared memory segment[^\n]*"
    r"|unable to allocate shared memory[^\n]*)"
    r"|(?P<peer>remote process exited or there was a network error|ncclRemoteError"
    r"|Watchdog caught collective operation timeout[^\n]*)",
    re.MULTILINE,
)
_SOURCES: dict[str, Kind] = {
    "full": "gpu memory", "host": "host memory", "shared": "shared memory", "peer": "peer",
}  # fmt: skip
_SPEAKERS = {"nccl": "NCCL: ", "triton": "Triton: ", "bitsandbytes": "bitsandbytes: "}
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|HOST_ALLOCATION_FAILED", re.IGNORECASE)
# What cuBLAS and cuDNN say when there is no memory for their workspace, or the driver is broken.
_NO_HANDLE = "STATUS_NOT_INITIALIZED"
_AT_EXIT = "driver shutting down"  # of a process that ends anyway
# Bytes. With so much free a library's own few hundred megabytes were not refused for want of it.
_WORKSPACE = 1 << 30
_HARDWARE = re.compile(
    r"ECC|NVLink|hardware|busy or unavailable|unknown error|fallen off|is lost|no CUDA-capable"
    r"|launch timed out",
    re.IGNORECASE,
)
_TOO_OLD = re.compile(r"no kernel image|driver version is insufficient|unsupported toolchain")
_TALKS_TO_OTHERS = re.compile(r"NCCL|ProcessGroup|c10d|[Gg]loo|TCPStore|DistBackendError")
_TRIED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_UNUSED = re.compile(r"([\d.]+ \w+) is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Failure:
    """A failure of a device, of memory or of another process, as a library reported it."""

    kind: Kind
    said: str


def find(text: str, free: int | None = None) -> Failure | None:
    """Return the first failure in `text`; the later ones mostly follow from it.

    `free` is the number of bytes that were free on the GPU then, if known: if there were plenty,
    CUDA's "out of memory" means that it could not pin host memory.
    """
    for match in _SAYS.finditer(text):
        source, said = str(match.lastgroup), match[str(match.lastgroup)].strip(" .")
        if _AT_EXIT not in said:
            return Failure(_kind(source, said, free), _SPEAKERS.get(source, "") + said)
    return None


def lost_another(text: str) -> bool:
    """Return True if these last words of an aborted process only report the loss of another one.

    Words that mention no other process mean that the aborted one failed itself.
    """
    failure = find(text)
    return failure.kind == "peer" if failure else bool(_TALKS_TO_OTHERS.search(text))


def explain(failure: Failure, settings: Config, more: str = "") -> errors.JobError:
    """Return the error for `failure`, with what to do; `more` says where it happened."""
    if failure.kind == "gpu memory":
        told = f"the GPU's memory is too small{more}: {failure.said}"
        if _is_fragmented(failure.said):
            fragmented = "torch had enough unused memory, but fragmented: start the job again"
            return errors.GpuBusyError(f"{told}. {fragmented}")
        return errors.GpuMemoryError(f"{told}. {_less_on_the_gpu(settings)}")
    if failure.kind == "host memory":
        return errors.HostMemoryError(
            f"the host's memory is used up{more}: {failure.said}. {_less_on_the_host(settings)}"
        )
    if failure.kind == "shared memory":
        return errors.HostMemoryError(
            f"the shared memory is too small{more}: {failure.said}. Give the container more "
            "(docker: --shm-size, Kubernetes: sizeLimit of the volume shm)"
        )
    if failure.kind == "peer":
        return errors.PeerError(f"another process of the run was lost{more}: {failure.said}")
    return _gpu_error(failure.said, more)


def killed_for_memory(settings: Config, limit: int | None) -> errors.HostMemoryError:
    """Return the error for a training process that the kernel's OOM killer ended.

    `limit` is the memory limit of the container in bytes, None if it has none.
    """
    killed = "the kernel killed the training process because host memory ran out"
    within = f" (the container's limit is {limit / 2**30:.1f} GiB)" if limit else ""
    return errors.HostMemoryError(f"{killed}{within}. {_less_on_the_host(settings)}")


def _kind(source: str, said: str, free: int | None) -> Kind:
    if source in _SOURCES:
        return _SOURCES[source]
    if _NO_MEMORY.search(said):
        host = "HOST" in said or (free is not None and free > _WORKSPACE)
        return "host memory" if host else "gpu memory"
    if _NO_HANDLE in said and free is not None and free < _WORKSPACE:
        return "gpu memory"
    return "gpu"


def _is_fragmented(said: str) -> bool:
    """Return True if torch had at least as much unused memory as it could not allocate."""
    tried, unused = _TRIED.search(said), _UNUSED.search(said)
    return bool(tried and unused and _bytes(unused[1]) >= _bytes(tried[1]))


def _bytes(size: str) -> float:
    count, unit = size.split()
    return float(count) * _UNITS.get(unit, 1)


def _less_on_the_gpu(settings: Config) -> str:
    """Return which keys of this config to change, those that keep the result the same first."""
    changes = []
    if settings.train.micro_batch_size > 1:
        changes.append(
            f"lower train.micro_batch_size ({settings.train.micro_batch_size}; the result stays "
            "the same, and the run goes on from its last checkpoint)"
        )
    if not settings.train.gradient_checkpointing:
        changes.append("set train.gradient_checkpointing to true")
    if settings.model.quantization == "none":
        changes.append("set model.quantization to nf4")
    changes.append(f"lower data.max_length ({settings.data.max_length})")
    if settings.distributed.strategy != "fsdp":
        changes.append("use more GPUs with distributed.strategy fsdp")
    elif not settings.distributed.offload:
        changes.append("set distributed.offload to true")
    return f"Change one of these: {'; '.join(changes)}"


def _less_on_the_host(settings: Config) -> str:
    changes = ["give the container or the machine more memory", "start fewer processes on it"]
    if settings.distributed.offload:
        changes.append("set distributed.offload to false")
    return f"Change one of these: {'; '.join(changes)}"


def _gpu_error(said: str, more: str) -> errors.JobError:
    told = f"CUDA error{more}: {said}"
    if _TOO_OLD.search(said):
        return errors.PermanentError(
            f"{told}. The GPU or its driver is older than this build of torch supports: use "
            "another GPU, or a newer driver"
        )
    if "device-side assert" in said:
        return errors.GpuError(
            f"{told}. A kernel got an index out of range, such as a token ID beyond the embedding. "
            "The failed assertion is in the lines above; start again with CUDA_LAUNCH_BLOCKING=1 "
            "to see which call launched the kernel"
        )
    look = "look at `dmesg | grep -i xid` and `nvidia-smi -q -d ECC` there"
    if _HARDWARE.search(said):
        out = "The GPU or its link is broken: take the node out of service"
    else:
        out = "If this happens again on the same node, take the node out of service"
    return errors.GpuError(f"{told}. {out}, and {look}")
