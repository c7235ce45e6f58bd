"""What Triton needs is found missing before a download; and what TRL's kernels compute with it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import drivers
import hosts
import pytest
from conftest import ROOT, command, need

from job import errors
from job.launch import kernels
from job.launch.kernels import Toolchain

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
DEBIAN, RHEL = f"gcc, libc6-dev and python{VERSION}-dev", f"gcc and python{VERSION}-devel"
PACKAGES = rf"Install {DEBIAN} \(Debian, Ubuntu\) or {RHEL}"
HEADER = "typedef int CUresult; CUresult cuDriverGetVersion(int *version);\n"


@pytest.fixture
def toolchain(tmp_path: Path) -> Toolchain:
    """This machine's compiler and headers, a driver that stands in, and Triton's header for it."""
    folder = drivers.build(tmp_path / "drivers")
    package = tmp_path / "site" / "triton"
    (package / "backends" / "nvidia" / "include").mkdir(parents=True)
    (package / "backends" / "nvidia" / "include" / "cuda.h").write_text(HEADER)
    (package / "__init__.py").write_text("raise ImportError('only looked at by the check')\n")
    environ = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(folder)}
    found = replace(Toolchain.of_this_python(environ), triton=package)
    if not (found.python_include / "Python.h").exists():
        pytest.skip(f"the headers of this Python are missing: install python{VERSION}-dev")
    return found


def program(path: Path, text: str) -> Path:
    """A shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory, mounted with these options."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root, and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_machine_with_a_compiler_and_headers_passes(toolchain: Toolchain, tmp_path: Path) -> None:
    """In well under a second, without torch, and without leaving anything in the cache."""
    before = sorted(tmp_path.rglob("*"))
    begun = time.monotonic()

    kernels.check_compiler(toolchain, tmp_path / "cache" / "triton")

    assert time.monotonic() - begun < 5  # 0.2 s on an idle machine
    assert sorted(tmp_path.rglob("*")) == before


def test_a_machine_without_triton_passes_with_a_warning(
    toolchain: Toolchain, tmp_path: Path, said: Callable[[], str]
) -> None:
    """TRL then computes the loss by torch operations, so no compiler and no driver library count."""
    bare = replace(toolchain, triton=None, environ={"PATH": "/nowhere"})

    kernels.check_compiler(bare, tmp_path / "cache")

    (line,) = said().splitlines()
    assert f"Triton is not installed for {sys.executable}" in line
    assert "slower and needs up to 4 GB more GPU memory" in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("compiler", ["CC", "clang"])
def test_the_compiler_is_the_one_that_triton_takes(
    compiler: str,
    toolchain: Toolchain,
    tmp_path: Path,
) -> None:
    """CC if it is set, whatever is in PATH; clang if there is no gcc."""
    record = f'echo "$@" >>{tmp_path}/called; PATH=$OWN exec gcc "$@"'
    script = program(tmp_path / "bin" / compiler, record)
    environ = {**toolchain.environ, "OWN": toolchain.environ["PATH"]}
    environ |= {"CC": str(script)} if compiler == "CC" else {"PATH": str(script.parent)}

    kernels.check_compiler(replace(toolchain, environ=environ), tmp_path / "cache")

    assert "-shared -fPIC" in (tmp_path / "called").read_text()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"PATH": "/nowhere"}, rf"no C compiler \(gcc or clang in PATH\).*{PACKAGES}"),
        ({"CC": "/nowhere/cc"}, r"cannot start the C compiler '/nowhere/cc' \(No such.*Set CC"),
        ({"CC": "gcc -m64"}, "cannot start the C compiler 'gcc -m64'.*without options"),
        (
            {"python_include": Path("/nowhere")},
            rf"Python.h of Python {VERSION}, which is not in /nowhere. {PACKAGES}",
        ),
        (
            {"LD_LIBRARY_PATH": "/nowhere"},
            "no libcuda.so.1.*NVIDIA_DRIVER_CAPABILITIES to compute,utility",
        ),
        (
            {"TRITON_LIBCUDA_PATH": "/nowhere"},
            f"cannot build what Triton needs.*{PACKAGES}.*cannot find -l:libcuda",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_is_missing_is_named_with_what_to_install(
    missing: dict[str, object], message: str, toolchain: Toolchain, tmp_path: Path
) -> None:
    """With status 64, and nothing is left in the cache."""
    if "LD_LIBRARY_PATH" in missing and kernels.find_libcuda({}):
        pytest.skip("this machine has an NVIDIA driver")
    own = {"python_include"} & missing.keys()
    fields = {name: missing[name] for name in own}
    environ = {**toolchain.environ, **{name: str(missing[name]) for name in missing.keys() - own}}

    with pytest.raises(errors.MachineError, match=f"(?s){message}") as caught:
        kernels.check_compiler(replace(toolchain, environ=environ, **fields), tmp_path / "cache")

    assert errors.explain(caught.value)[0] == errors.PERMANENT
    assert not (tmp_path / "cache").exists()


def test_a_compiler_without_the_headers_of_c_is_named_with_what_it_said(
    toolchain: Toolchain,
    tmp_path: Path,
) -> None:
    """The package gcc alone does not bring them on Debian."""
    script = program(tmp_path / "bin" / "cc", f'exec {shutil.which("gcc")} -nostdinc "$@"')
    environ = {**toolchain.environ, "CC": str(script)}

    with pytest.raises(errors.MachineError, match=rf"(?s){PACKAGES}.*stdlib.h: No such file"):
        kernels.check_compiler(replace(toolchain, environ=environ), tmp_path / "cache")


def test_a_full_disk_is_worth_another_start(toolchain: Toolchain, tmp_path: Path) -> None:
    """A compiler that ran out of space or memory is not one that is missing: status 1."""
    script = program(tmp_path / "bin" / "cc", "echo /tmp/x.s: No space left on device >&2; exit 1")
    environ = {**toolchain.environ, "CC": str(script)}

    with pytest.raises(errors.JobError, match="No space left on device") as caught:
        kernels.check_compiler(replace(toolchain, environ=environ), tmp_path / "cache")

    assert errors.explain(caught.value)[0] == errors.FAILED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("noexec", "is mounted noexec. Mount it with exec, or set TRITON_CACHE_DIR or run.cache"),
        ("ro", "Read-only file system. Set TRITON_CACHE_DIR or run.cache to a folder in which"),
    ],
)
def test_a_cache_that_cannot_hold_libraries_is_named_with_the_setting(
    options: str, message: str, toolchain: Toolchain, tmp_path: Path
) -> None:
    """A mount with noexec keeps what was compiled from being loaded; nothing is left there."""
    with mounted(tmp_path / "disk", options) as disk:
        with pytest.raises(errors.MachineError, match=message) as caught:
            kernels.check_compiler(toolchain, disk / "cache" / "triton")
        left = list(disk.iterdir())

    assert str(disk / "cache" / "triton") in str(caught.value)
    assert not left


def test_a_driver_that_cannot_be_loaded_is_told_from_a_bad_folder(
    toolchain: Toolchain,
    tmp_path: Path,
) -> None:
    """The message of the loader says what is wrong with it."""
    drivers.build(Path(toolchain.environ["LD_LIBRARY_PATH"]), cuda="int nothing;")

    with pytest.raises(errors.MachineError, match=r"cannot load .*undefined symbol.*`nvidia-smi`"):
        kernels.check_compiler(toolchain, tmp_path)


@pytest.mark.parametrize(
    ("own", "folder"),
    [
        ({}, "/cache/triton"),
        ({"TRITON_HOME": "/scratch"}, "/scratch/.triton/cache"),
        ({"TRITON_HOME": "/scratch", "TRITON_CACHE_DIR": "/kernels"}, "/kernels"),
    ],
)
def test_the_users_own_place_for_kernels_wins(own: dict[str, str], folder: str) -> None:
    """By the variables that Triton knows, in their order."""
    assert kernels.cache_folder(own, Path("/cache/triton")) == Path(folder)


@pytest.fixture
def gpu_machine(toolchain: Toolchain, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with one GPU, as far as the job looks before it trains."""
    assert toolchain.triton
    folder = drivers.build(tmp_path / "drivers", gpu=True)
    drivers.claim_cuda(toolchain.triton.parent)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": str(toolchain.triton.parent),
    }


def run_job(line: list[str], environ: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command of the job to its end."""
    return subprocess.run(line, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("asked", ["validate", "run"])
def test_a_gpu_without_a_compiler_ends_the_job_before_it_downloads(
    asked: str, gpu_machine: dict[str, str], tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Both commands say so with status 64; there is no attempt, and nothing in the cache."""
    environ = {**gpu_machine, "PATH": "/nowhere"}

    ended = run_job(command(asked, tiny_run()), environ)

    assert ended.returncode == errors.PERMANENT, ended.stderr
    assert "no C compiler" in ended.stderr
    assert not (tmp_path / "run" / "attempts").exists()
    assert not any((tmp_path / "cache").rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("lacks_triton", [False, True], ids=["compiler", "no triton"])
def test_a_gpu_with_a_compiler_or_without_triton_is_no_reason_to_stop(
    lacks_triton: bool,  # noqa: FBT001 - a parameter
    gpu_machine: dict[str, str],
    tiny_run: Callable[..., Path],
) -> None:
    """The same machine passes once there is a compiler, and also if nothing has to be compiled."""
    environ = gpu_machine
    if lacks_triton:
        shutil.rmtree(Path(gpu_machine["PYTHONPATH"]) / "triton")
        environ = {**gpu_machine, "CC": "/nowhere/cc"}

    ended = run_job(command("validate", tiny_run()), environ)

    assert ended.returncode == 0, ended.stderr
    assert ("warning: Triton is not installed" in ended.stderr) == lacks_triton


@pytest.mark.slow
def test_a_machine_without_a_compiler_ends_the_others_too(
    gpu_machine: dict[str, str], tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """It looks when it is asked to pull; both machines name the reason and end with 64."""
    need("network namespaces (root and iproute2)", hosts.possible() or None)
    config = tiny_run(train={"global_batch_size": 8, "micro_batch_size": 2})
    names = ("LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    environ = {name: gpu_machine[name] for name in names}
    paths = (os.environ["PATH"], "/nowhere")
    logs = [tmp_path / "h0.log", tmp_path / "h1.log"]

    with hosts.hosts(2) as network, ExitStack() as opened:
        started = []
        for rank, path in enumerate(paths):
            own = [f"{name}={value}" for name, value in {**environ, "PATH": path}.items()]
            line = ["/usr/bin/env", *own, *command("run", config)]
            line += ["--set", f"run.cache={tmp_path}/cache-{rank}"]
            log = opened.enter_context(logs[rank].open("w"))
            started.append(network.start(rank, line, stderr=log))
        statuses = [process.wait(120) for process in started]

    said = [log.read_text() for log in logs]
    assert statuses == [errors.PERMANENT, errors.PERMANENT], said
    assert all("no C compiler" in each for each in said), said
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture(scope="session")
def gpu_environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the real Triton, and with a driver that stands in."""
    site = drivers.triton_site(tmp_path_factory.mktemp("site"))
    folder = drivers.build(tmp_path_factory.mktemp("drivers"))
    paths = [str(path) for path in (ROOT, site) if path]
    cache = str(tmp_path_factory.mktemp("kernels"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
        "TRITON_CACHE_DIR": cache,
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
    }


@pytest.mark.slow
def test_the_check_compiles_with_the_options_that_triton_uses(
    gpu_environ: dict[str, str],
    tmp_path: Path,
) -> None:
    """The real Triton's call of the compiler is the same but for the names of the files."""
    record = f'printf "%s\\n" "$@" >{tmp_path}/$NAME; exec {shutil.which("gcc")} "$@"'
    script = program(tmp_path / "cc", record)
    environ = {**gpu_environ, "CC": str(script), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    ours = (
        "import os; from pathlib import Path; from job.launch import kernels as k; "
        "toolchain = k.Toolchain.of_this_python(os.environ); "
        "k.check_compiler(toolchain, Path(os.environ['TRITON_CACHE_DIR']))"
    )
    theirs = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
    for name, code in (("ours", ours), ("theirs", theirs)):
        subprocess.run([sys.executable, "-c", code], env={**environ, "NAME": name}, check=True)

    def options(name: str) -> set[str]:
        words = (tmp_path / name).read_text().split()
        # Names of files and their folders differ; Triton's folder of libraries holds no libcuda.
        other = re.compile(r"\.c$|\.so$|^-I/tmp/(tmp|triton-probe)|nvidia/lib$")
        return {word for word in words if not other.search(word)}

    assert options("ours") == options("theirs")


@pytest.mark.slow
def test_the_loss_compiles_for_every_gpu_that_is_supported(gpu_environ: dict[str, str]) -> None:
    """Each variant of SFT and DPO, to machine code, and through Triton's launcher to libcuda."""
    cards = ("75", "80", "90", "120")

    lines = drivers.run_script("launch_loss_kernels.py", *cards, environ=gpu_environ)

    drivers.check_launched(lines, cards)


@pytest.mark.slow
def test_the_kernels_compute_the_loss_of_full_logits(gpu_environ: dict[str, str]) -> None:
    """Loss and gradients of SFT and DPO are those of float64, up to four roundings."""
    environ = {**gpu_environ, "TRITON_INTERPRET": "1"}

    lines = drivers.run_script("interpret_loss_kernels.py", environ=environ)

    dtypes = ("float32", "float16", "bfloat16")
    assert {(line["method"], line["dtype"]) for line in lines} == {
        (method, f"torch.{dtype}") for method in ("sft", "dpo") for dtype in dtypes
    }
    assert len(lines) == 19
    assert not any(line["ignored"] for line in lines)  # gradients of tokens that are not learned
    wrong = [line for line in lines if max(line["errors"].values()) > line["tolerance"]]
    assert not wrong, json.dumps(wrong, indent=1)
