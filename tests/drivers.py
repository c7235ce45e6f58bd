"""Stand-ins for the libraries of NVIDIA's driver, for machines without a GPU, compiled by gcc.

What they stand in for is in C, so everything above them is the real thing: pynvml, Triton's driver
module with its launcher, and the loader of shared libraries.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, need

TRITON = re.findall(r"^triton==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
"""The pin of Triton, which comes with the GPU's torch; the CPU's does without."""
KERNELS, DTYPES = ("_forward_kernel", "_backward_kernel"), ("*bf16", "*fp16", "*fp32")
CUDA = """\
/* As much of libcuda as Triton 3.7 calls to load a kernel and to launch it. Nothing is computed. */
#include <string.h>
static int modules, launches;
int standin_modules(void) { return modules; }
int standin_launches(void) { return launches; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no such thing here"; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1 << 20; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &modules; return 0; }
int cuCtxGetCurrent(void **context) { *context = &modules; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\\177ELF", 4) != 0) return 200; /* CUDA_ERROR_INVALID_IMAGE */
  *module = &modules; modules++; return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = &launches; return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer; return 0;
}
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  launches++; return 0;
}
"""
NVML = """\
/* As much of NVML as pynvml is asked to find one GPU that is not cut by MIG. */
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = device; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { *count = 0; return 0; }
"""


def build(folder: Path, *, cuda: str = CUDA, gpu: bool = False) -> Path:
    """Compile libcuda.so.1, and with `gpu` also NVML with one GPU, into `folder`."""
    need("a C compiler (gcc)", shutil.which("gcc"))
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"libcuda.so.1": cuda, **({"libnvidia-ml.so.1": NVML} if gpu else {})}
    for name, source in sources.items():
        code = folder / f"{name}.c"
        code.write_text(source)
        line = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, code]
        subprocess.run(line, check=True)
    return folder


def triton_site(folder: Path) -> Path | None:
    """Return a folder with Triton in it, for PYTHONPATH; None if this environment has Triton.

    The CPU's torch comes without. Beside it, in the environment, Triton would change what TRL and
    torch do in all other tests.
    """
    present = [sys.executable, "-c", "import triton"]
    if subprocess.run(present, capture_output=True, check=False).returncode == 0:
        return None
    options = ("--quiet", "--no-deps", "--disable-pip-version-check")
    line = [sys.executable, "-m", "pip", "install", *options, "--target", folder, TRITON]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    if ended.returncode and not os.environ.get("CI"):
        pytest.skip(f"{TRITON} cannot be installed: {ended.stderr[-300:]}")
    assert ended.returncode == 0, ended.stderr
    return folder


def run_script(name: str, *arguments: object, environ: dict[str, str]) -> list[dict[str, Any]]:
    """Run a script of this folder in a process of its own; returns the lines of JSON it printed."""
    line = [sys.executable, str(ROOT / "tests" / name), *map(str, arguments)]
    ended = subprocess.run(line, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads(each) for each in ended.stdout.splitlines() if each.startswith("{")]


def check_launched(lines: list[dict[str, Any]], cards: Sequence[str]) -> None:
    """Assert that `launch_loss_kernels.py` compiled and launched every variant for every card."""
    *variants, counted = lines
    wanted = itertools.product(KERNELS, DTYPES, (False, True), cards)
    keys = ("kernel", "dtype", "softcap", "card")
    assert {tuple(each[key] for key in keys) for each in variants} == set(wanted)
    assert all(each["elf"] and each["bytes"] > 5000 for each in variants)
    forward = [each["constants"] for each in variants if each["kernel"] == "_forward_kernel"]
    # The trainer logs the entropy and the accuracy.
    assert all(each["HAS_ENTROPY"] and each["HAS_IS_TOP1"] for each in forward)
    assert sum(each["constants"].get("n_cols") == 1 for each in variants) == len(variants) // 3
    assert counted["modules"] == len(variants)
    assert counted["launches"] > 2 * len(variants)
