"""Can torch and bitsandbytes use the GPUs of this machine, as their files and the driver tell."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from job import cluster, errors
from job.config import Config

Version = tuple[int, int]

# The oldest for each major version of CUDA (CUDA Compatibility guide, table 1).
_DRIVERS = {12: "525 or newer", 13: "580 or newer"}
_CPU_INSTEAD = "To train on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing"


def check_hardware(settings: Config, gpus: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise `errors.ConfigError` if torch or bitsandbytes cannot use one of these GPUs.

    Or if the driver is too old for them.

    Imports neither of them, and starts no CUDA. What cannot be found out is no reason to refuse.
    """
    torch = _folder("torch")
    if not gpus or torch is None:
        return
    cuda = _read_cuda_version(torch)
    name = f"torch {importlib.metadata.version('torch')}"
    if cuda is None:
        raise errors.ConfigError(
            f"this machine has {len(gpus)} GPU(s), but {name} was built for CPUs: install the build "
            f"of torch for CUDA (`make setup` does it on a machine with a GPU). {_CPU_INSTEAD}"
        )
    _check_driver(cuda, name)
    libraries = {name: torch / "lib" / "libtorch_cuda.so"}
    bitsandbytes = _folder("bitsandbytes")
    needed = settings.model.quantization != "none" or settings.train.optimizer != "adamw_torch"
    if bitsandbytes and needed:
        version = importlib.metadata.version("bitsandbytes")
        libraries[f"bitsandbytes {version}"] = _choose_library(bitsandbytes, cuda, environ)
    for library, path in libraries.items():
        if path.is_file():
            _check_gpus(cluster.describe_gpus(gpus), library, cluster.read_code(path))


def _check_driver(needed: Version, torch: str) -> None:
    """Raise if the driver runs no CUDA of the same major version.

    With an older minor version code runs all the same: CUDA Compatibility guide, "Minor Version Compatibility".
    """
    told = cluster.driver_version()
    if told is None or told[1][0] >= needed[0]:
        return
    driver, newest = told
    oldest = _DRIVERS.get(needed[0], f"for CUDA {needed[0]}")
    raise errors.ConfigError(
        f"the NVIDIA driver {driver} of this machine runs CUDA {newest[0]}.{newest[1]}, but {torch} "
        f"needs CUDA {needed[0]}.{needed[1]}: install driver {oldest}. {_CPU_INSTEAD}"
    )


def _check_gpus(gpus: Sequence[cluster.Gpu], library: str, code: cluster.Code) -> None:
    for gpu in gpus:
        if not code.runs_on(gpu.capability):
            major, minor = gpu.capability
            raise errors.ConfigError(
                f"GPU {gpu.name} has compute capability {major}.{minor}, but {library} was built for "
                f"{code}: use another GPU (CUDA_VISIBLE_DEVICES chooses among those of a machine), or "
                "install a build for this one. "
                f"{_CPU_INSTEAD}"
            )


def _folder(package: str) -> Path | None:
    """Return where a package is installed, without importing it; None if it is not."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def _read_cuda_version(torch: Path) -> Version | None:
    """Return the CUDA version in torch's `version.py`; None of a build for CPUs."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*= *['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def _choose_library(bitsandbytes: Path, cuda: Version, environ: Mapping[str, str]) -> Path:
    """Return the library that bitsandbytes 0.50 loads beside a torch for that CUDA version.

    Of the same major version (cextension.py): the newest that is not newer, else the oldest. BNB_CUDA_VERSION
    overrides it, also when it is empty. Raises `errors.ConfigError` if there is none.
    """
    named = (re.fullmatch(r"libbitsandbytes_cuda(\d+)(\d)\.so", path.name) for path in bitsandbytes.iterdir())
    present = sorted((int(match[1]), int(match[2])) for match in named if match)
    forced = environ.get("BNB_CUDA_VERSION")
    if forced is not None:
        return _find_forced_library(bitsandbytes, forced, present)
    same = [version for version in present if version[0] == cuda[0]]
    if not same:
        there = ", ".join(f"{major}.{minor}" for major, minor in present) or "no CUDA version"
        raise errors.ConfigError(
            f"torch was built with CUDA {cuda[0]}.{cuda[1]}, but the installed bitsandbytes has "
            f"libraries for {there}: install versions that belong together, as in constraints.txt"
        )
    older = [version for version in same if version <= cuda]
    major, minor = max(older) if older else min(same)
    return bitsandbytes / f"libbitsandbytes_cuda{major}{minor}.so"


def _find_forced_library(bitsandbytes: Path, forced: str, present: Sequence[Version]) -> Path:
    """Return the library that BNB_CUDA_VERSION names by its value `forced`.

    bitsandbytes has no fallback: it imports without that library, and fails at the first weight
    that it quantizes. Raises `errors.ConfigError` if the library does not exist, or if the value
    is not digits only, which bitsandbytes refuses.
    """
    path = bitsandbytes / f"libbitsandbytes_cuda{forced}.so"
    if forced.isdigit() and path.is_file():
        return path
    values = ", ".join(f"{major}{minor}" for major, minor in present) or "none"
    raise errors.ConfigError(
        f"BNB_CUDA_VERSION is {forced!r}, but there is no {path}. Unset BNB_CUDA_VERSION, or set "
        f"it to a version that the installed bitsandbytes has: {values}"
    )
