"""The hardware that this process was given, seen without loading CUDA."""

import contextlib
import math
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from job import errors, log
from job.cluster.cgroup import memory_limit, unused_memory

_CGROUP = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it."""

    name: str
    """For messages: its number or UUID, and its model."""
    capability: tuple[int, int]
    """The compute capability, such as (8, 6)."""


def gpus(environ: Mapping[str, str], present: Sequence[str] | None = None) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES would be for each NVIDIA GPU that this process may use; none without a driver.

    `present` are those that there are, by default what the driver lets this process open. Of
    several MIG slices only the first counts: neither CUDA nor NCCL joins slices of one GPU in one
    training. Numbers are those of `nvidia-smi`, in the order of the PCI bus; raises
    `errors.ConfigError` if the user asked for CUDA's other order and they differ.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    shown = None if visible is None else [each.strip() for each in visible.split(",") if each.strip() not in ("", "-1")]
    if shown == []:
        return ()
    there = _present() if present is None else present
    fastest_first = environ.get("CUDA_DEVICE_ORDER") == "FASTEST_FIRST"
    if fastest_first and shown and any(each.isdecimal() for each in shown):
        _check_order(shown)
    named = [_at(there, each) for each in shown] if shown and there else there
    return tuple(named[:1] if any(device.startswith("MIG-") for device in named) else named)


def cpus(limit: Path = _CGROUP) -> int:
    """How many cores this process may keep busy: those it is bound to, or fewer by its container's quota."""
    bound = len(os.sched_getaffinity(0))
    quota, _, period = limit.read_text("ascii").partition(" ") if limit.exists() else ("max", "", "")
    return bound if quota == "max" else max(1, min(bound, math.ceil(int(quota) / int(period))))


def free_memory() -> int:
    """Return the bytes of host memory that this process can still take, also in its container."""
    free = int(psutil.virtual_memory().available)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        free = max(0, min(free, most - psutil.Process().memory_info().vms))
    unused = unused_memory()
    return free if unused is None else min(free, unused)


def total_memory() -> int:
    """Return the bytes of host memory that there are, or fewer by what this process or its container may have."""
    limits = [psutil.virtual_memory().total, memory_limit(), resource.getrlimit(resource.RLIMIT_AS)[0]]
    return min(int(limit) for limit in limits if limit is not None and limit != resource.RLIM_INFINITY)


def memory(gpus: tuple[str, ...]) -> int | None:
    """Return the bytes of memory of the smallest of these GPUs.

    None without any, or, with a warning, if the driver does not report it.
    """
    consequence = "distributed.strategy auto assumes that the model fits"
    found = _read_gpu_memory(gpus, "cluster.memory", consequence)
    return min(int(each.total) for each in found) if found else None


def memory_in_use(gpu: str) -> int:
    """Return the bytes of this GPU's memory that processes use; 0 if the driver does not say."""
    import pynvml

    try:
        handle = _handle(gpu, _opened())
        # version 2 leaves out what the driver keeps for itself, half a gigabyte on a large GPU
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except (pynvml.NVMLError, IndexError):
        return 0


def free_gpu_memory(gpus: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the free bytes of each of these GPUs, in CUDA's order.

    What this process itself has on them counts as used, its CUDA context too. None without any, or,
    with a warning, if the driver does not report it.
    """
    found = _read_gpu_memory(gpus, "cluster.free_memory", "the result is verified without a GPU")
    return tuple(int(each.free) for each in found) if found else None


def describe_gpus(gpus: Sequence[str]) -> list[Gpu]:
    """Return what the driver says of these GPUs; those that it does not answer for are left out."""
    import pynvml

    opened, found = _opened(), []
    for gpu in gpus:
        with contextlib.suppress(pynvml.NVMLError, IndexError):
            handle = _handle(gpu, opened)
            if gpu.startswith("MIG-"):  # a slice has the capability of the card that it is cut from
                handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(Gpu(f"{gpu} ({pynvml.nvmlDeviceGetName(handle)})", (int(major), int(minor))))
    return found


def driver_version() -> tuple[str, tuple[int, int]] | None:
    """Return the version of the driver and of the newest CUDA that it runs; None if it does not say.

    Where NVIDIA's forward compatibility package is installed, the CUDA version is that of its newer
    library.
    """
    import pynvml

    _opened()
    try:
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10)
    except pynvml.NVMLError:
        return None


def _check_order(shown: Sequence[str]) -> None:
    """Raise `errors.ConfigError` if numbers may mean other GPUs to CUDA than to the driver.

    CUDA's own order, FASTEST_FIRST, differs from that of the PCI bus only where the GPUs differ.
    """
    import pynvml

    models = sorted({str(pynvml.nvmlDeviceGetName(handle)) for handle in _opened()})
    if len(models) > 1:
        raise errors.ConfigError(
            f"CUDA_VISIBLE_DEVICES is {','.join(shown)} and CUDA_DEVICE_ORDER is FASTEST_FIRST, but "
            f"this machine has different GPUs ({', '.join(models)}), which the driver counts in "
            "another order: set CUDA_DEVICE_ORDER to PCI_BUS_ID and use the numbers of `nvidia-smi`, "
            "or name the GPUs by their UUIDs (`nvidia-smi -L`)"
        )


def _read_gpu_memory(gpus: Sequence[str], event: str, consequence: str) -> list[Any]:
    """Return NVML's memory report of each of these GPUs: its `total`, `free` and `used` bytes.

    An empty list, and a warning with the `consequence`, if the driver does not report all of them.
    """
    if not gpus:
        return []
    import pynvml

    opened = _opened()
    try:
        return [pynvml.nvmlDeviceGetMemoryInfo(_handle(gpu, opened)) for gpu in gpus]
    except (pynvml.NVMLError, IndexError) as e:
        report = f"the driver does not report the memory of GPU {', '.join(gpus)} ({e})"
        log.warn(event, f"{report}: {consequence}")
        return []


def _handle(gpu: str, opened: Sequence[Any]) -> Any:  # noqa: ANN401 - NVML's
    import pynvml

    return opened[int(gpu)] if gpu.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(_whole(gpu, opened))


def _at(there: Sequence[str], name: str) -> str:
    """What the GPU that CUDA_VISIBLE_DEVICES calls `name`, perhaps by its number, is called here."""
    return there[int(name)] if name.isdecimal() and int(name) < len(there) else name


def _present() -> list[str]:
    """The number of each GPU that this process may open, or the first slice if it is cut by MIG."""
    import pynvml

    found = []
    for number, handle in enumerate(_opened()):
        slices = []
        for each in range(_most_slices(handle)):
            with contextlib.suppress(pynvml.NVMLError):  # there is no such one, or it is somebody else's
                slices.append(str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, each))))
        found.append(slices[0] if slices else str(number))
    return found


def _most_slices(handle: Any) -> int:  # noqa: ANN401 - NVML's
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    except pynvml.NVMLError:  # this kind cannot be cut
        return 0


def _opened() -> list[Any]:
    """The handles of the GPUs that this process may open: in a container not all that the machine has."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as e:
        raise errors.JobError(
            f"the NVIDIA driver of this machine does not work: {e}. Look at `nvidia-smi` there; to train on the CPU, "
            "set CUDA_VISIBLE_DEVICES to nothing"
        ) from e
    found = []
    for number in range(count):
        with contextlib.suppress(pynvml.NVMLError):
            found.append(pynvml.nvmlDeviceGetHandleByIndex(number))
    return found


def _whole(uuid: str, opened: Sequence[Any]) -> str:
    """The whole UUID for one that CUDA lets users abbreviate."""
    import pynvml

    whole = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in opened]
    return next((each for each in whole if each.startswith(uuid)), uuid)


def interface(address: str) -> str | None:
    """The network interface with this address; None if there is none."""
    addresses = psutil.net_if_addrs().items()
    return next((name for name, found in addresses if any(each.address == address for each in found)), None)
