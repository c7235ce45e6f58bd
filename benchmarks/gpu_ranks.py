"""What several processes do on one device: gather a sharded block, and time their own share of a step."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_base import make_base
from gpu_kernels import RECIPE, adapt, load, make_batch, require, synchronize
from gpu_scale import Scale

from job.train.pace import Pace

_PROGRAM = Path(__file__).with_name("gpu_gather.py")
_RANKS = 2
_SECONDS = 60  # for both processes
_LEAST = 0.5  # of the time that a forward pass takes from outside: the rest is Python's


def check_two_processes(scale: Scale, work: Path) -> dict[str, Any]:
    """Gather a sharded 4-bit block in two processes on one device, with the check that a run begins with.

    NCCL refuses two processes on one GPU, so the bytes go through gloo; FSDP2's copies before and
    after that are the GPU's own.
    """
    store = work / "two-processes"
    store.unlink(missing_ok=True)
    running = [
        subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(store), scale.device, str(scale.hidden), str(scale.intermediate)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(_RANKS)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(_RANKS)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [errors[-400:] for process, (_, errors) in zip(running, outputs, strict=True) if process.returncode]
    require(not failed, f"a process failed: {failed}")
    found: dict[str, Any] = json.loads(outputs[0][0].strip().splitlines()[-1])
    return found


def check_pace(scale: Scale, work: Path) -> dict[str, Any]:
    """Compare what `Pace` measures of a forward pass, on a GPU by CUDA's events, with a clock around it."""
    model = adapt(load(make_base(scale, scale.few_layers, work), RECIPE))
    batch = make_batch(scale, 2, scale.lengths[0], packed=False)
    pace = Pace(model)
    shares = []
    for _ in range(3):  # the first pass compiles kernels
        pace.taken()
        synchronize()
        begun = time.monotonic()
        with torch.autocast(scale.device, torch.bfloat16):
            model(**batch, fused_lm_head=True)
        synchronize()
        shares.append(pace.taken() / (time.monotonic() - begun))
    require(_LEAST < shares[-1] <= 1, f"Pace measures {shares} of the time that a forward pass takes")
    return {"share_of_time": [round(share, 3) for share in shares]}
