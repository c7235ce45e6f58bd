"""Where Triton caches what it compiles, and whether this machine can compile at all.

TRL's loss is a Triton kernel on CUDA. The kernels themselves need no C compiler, but at the first
use Triton 3.7 compiles one C file, its driver module, against Python.h and libcuda, and loads the
result from its cache (triton/runtime/build.py and triton/backends/nvidia/driver.py). Without Triton
TRL computes the loss by torch operations (trl/kernels/chunked_logprob.py), and nothing is compiled.
"""

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from job import cluster, errors, log

_SOURCE = """\
#include "cuda.h"
#include <stdlib.h>
#include <Python.h>
int probe(void) { int version = 0; return Py_IsInitialized() + cuDriverGetVersion(&version); }
"""
_LIBCUDA = "libcuda.so.1"
_NO_PYTHON_H = re.compile(r"Python\.h'?:? (No such file|file not found)")  # gcc, clang
_MAY_PASS = re.compile("No space left on device|Cannot allocate memory|Killed signal")
_BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_SHOWN = 600  # characters of a compiler's last words
# Without Triton TRL's loss keeps 7 to 8 float32 copies of a tile of 4096 tokens x 32768 words.
_TORCH_LOSS_GB = 4
_LOAD = "import ctypes, os, sys; ctypes.PyDLL(sys.argv[1], os.RTLD_NOW)"


@dataclass(frozen=True)
class Toolchain:
    """What Triton compiles its driver module with."""

    environ: Mapping[str, str]
    triton: Path | None
    """The folder of the package; None if it is not installed."""
    python_include: Path
    """The folder in which Triton looks for Python.h."""

    @classmethod
    def of_this_python(cls, environ: Mapping[str, str]) -> "Toolchain":
        """Return the toolchain that Triton would use in this interpreter."""
        spec = importlib.util.find_spec("triton")
        package = Path(spec.origin).parent if spec and spec.origin else None
        scheme = sysconfig.get_default_scheme()
        # Debian's own scheme adds "local", where no headers are. Triton replaces it in this way.
        paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
        return cls(environ, package, Path(paths["include"]))

    @property
    def compiler(self) -> str | None:
        """The C compiler: CC as it is, else gcc, else clang; None if there is none."""
        path = self.environ.get("PATH")
        found = shutil.which("gcc", path=path) or shutil.which("clang", path=path)
        return self.environ.get("CC", found)

    def command(self, package: Path, source: Path, library: Path) -> list[str]:
        """Return the command that makes `library` of `source`, as Triton in `package` would."""
        return [
            self.compiler or "", str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi",
            "-o", str(library), f"-l:{_LIBCUDA}",
            *(f"-L{folder}" for folder in find_libcuda(self.environ)),
            f"-I{package / 'backends' / 'nvidia' / 'include'}", f"-I{source.parent}",
            f"-I{self.python_include}",
        ]  # fmt: skip


def cache_folder(environ: Mapping[str, str], default: Path) -> Path:
    """Return the folder of Triton's cache: where the user's own variables say, else `default`."""
    if own := environ.get("TRITON_CACHE_DIR"):
        return Path(own)
    home = environ.get("TRITON_HOME")
    return Path(home) / ".triton" / "cache" if home else default


def find_libcuda(environ: Mapping[str, str]) -> list[str]:
    """Return the folders in which Triton finds the driver's library."""
    if own := environ.get("TRITON_LIBCUDA_PATH"):
        return [own]
    try:
        listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, check=False)
    except FileNotFoundError:  # Triton asks this program first, and cannot go on without it
        return []
    lines = listing.stdout.decode(errors="ignore").splitlines()
    folders = [str(Path(line.split()[-1]).parent) for line in lines if _LIBCUDA in line]
    folders = folders or environ.get("LD_LIBRARY_PATH", "").split(":")
    return [folder for folder in folders if folder and (Path(folder) / _LIBCUDA).exists()]


def check_machine(environ: Mapping[str, str], default_cache: Path) -> None:
    """Raise `errors.MachineError` if this machine trains on a GPU, and Triton cannot compile on it.

    Triton's cache is at `default_cache` if the user's own variables do not say otherwise. Warns if
    Triton is not installed.
    """
    if cluster.gpus(environ):
        check_compiler(Toolchain.of_this_python(environ), cache_folder(environ, default_cache))


def check_compiler(toolchain: Toolchain, cache: Path) -> None:
    """Compile a few lines of C as Triton does, load the result from its cache, and remove it again.

    Raises `errors.MachineError`, which names what to install or to set, if that is not possible.
    Only warns if Triton is not installed: TRL then trains without it, and nothing is compiled.
    """
    if toolchain.triton is None:
        log.warn(
            "launch.triton",
            f"Triton is not installed for {sys.executable}, so torch operations compute the loss, "
            f"which is slower and needs up to {_TORCH_LOSS_GB} GB more GPU memory: install the "
            "triton version that constraints.txt pins",
        )
        return
    if toolchain.compiler is None:
        raise errors.MachineError(
            "Triton finds no C compiler (gcc or clang in PATH), which it needs on a GPU: the loss "
            f"is a Triton kernel. {_advice()}"
        )
    if not find_libcuda(toolchain.environ):
        raise errors.MachineError(
            f"Triton finds no {_LIBCUDA}, the library of the NVIDIA driver, in `/sbin/ldconfig -p` "
            "or LD_LIBRARY_PATH. Run ldconfig as root, or set TRITON_LIBCUDA_PATH to its folder; "
            "in a container set NVIDIA_DRIVER_CAPABILITIES to compute,utility"
        )
    with tempfile.TemporaryDirectory(prefix="triton-probe-") as scratch:
        built = _compile_probe(toolchain, toolchain.triton, Path(scratch))
        _load_probe(built, cache, toolchain.environ)


def _compile_probe(toolchain: Toolchain, package: Path, scratch: Path) -> Path:
    """Return a library compiled in `scratch`; raises `errors.MachineError` if there is none."""
    source, library = scratch / "probe.c", scratch / "probe.so"
    source.write_text(_SOURCE, encoding="ascii")
    command = toolchain.command(package, source, library)
    environ = {**toolchain.environ, "LC_ALL": "C"}  # the messages are looked at
    try:
        ended = _run(command, environ)
    except OSError as e:
        raise errors.MachineError(
            f"Triton cannot start the C compiler {command[0]!r} ({e.strerror}). Set CC to the path "
            f"of a compiler, without options, or unset it. {_advice()}"
        ) from e
    if ended.returncode == 0:
        return library
    said = ended.stderr.decode(errors="replace").strip()
    if _NO_PYTHON_H.search(said):
        raise errors.MachineError(
            f"Triton needs Python.h of Python {_version()}, which is not in "
            f"{toolchain.python_include}. {_advice()} (a Python that did not come with the system "
            "has its own headers)"
        )
    kind = errors.JobError if _MAY_PASS.search(said) else errors.MachineError
    raise kind(
        f"The C compiler {command[0]} cannot build what Triton needs on a GPU. {_advice()} Its "
        f"last words: {said[-_SHOWN:]}"
    )


def _load_probe(built: Path, folder: Path, environ: Mapping[str, str]) -> None:
    """Load the library `built` from the file system of `folder`, and leave nothing there.

    In a process of its own: this one has no use for the driver, and must outlive a crash.
    """
    setting = _setting(environ)
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryDirectory(prefix=".triton-probe-", dir=existing) as place:
            library = shutil.copy(built, place)
            noexec = bool(os.statvfs(place).f_flag & os.ST_NOEXEC)
            command = [sys.executable, "-I", "-S", "-c", _LOAD, library]
            loaded = _run(command, environ)
    except OSError as e:
        if e.errno not in _BARRED:
            raise
        raise errors.MachineError(
            f"Triton cannot write its cache {folder}: {e.filename}: {e.strerror}. Set {setting} to "
            "a folder in which this user may write"
        ) from e
    if loaded.returncode == 0:
        return
    if noexec:
        raise errors.MachineError(
            f"Triton cannot load what it compiles from {folder}: that file system is mounted "
            f"noexec. Mount it with exec, or set {setting} to a folder on another one"
        )
    said = loaded.stderr.decode(errors="replace").strip().splitlines()
    reason = said[-1] if said else f"status {loaded.returncode}"
    raise errors.MachineError(
        f"Triton cannot load what it compiles from {folder}: {reason}. If the NVIDIA driver is in "
        f"order (`nvidia-smi`), set {setting} to a folder from which libraries may be loaded"
    )


def _run(command: list[str], environ: Mapping[str, str]) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(  # noqa: S603 - Triton's command, or ours
        command,
        env=environ,
        capture_output=True,
        check=False,
    )


def _setting(environ: Mapping[str, str]) -> str:
    """Return the name of what decides where Triton's cache is."""
    names = ("TRITON_CACHE_DIR", "TRITON_HOME")
    return next((name for name in names if environ.get(name)), "TRITON_CACHE_DIR or run.cache")


def _advice() -> str:
    """Return what to install, with the names of the packages for the version of this Python."""
    version = _version()
    return (
        f"Install gcc, libc6-dev and python{version}-dev (Debian, Ubuntu) or gcc and "
        f"python{version}-devel (RHEL), or set CC to a C compiler."
    )


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
