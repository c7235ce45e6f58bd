"""Training uses deterministic kernels, and names an operation that has none, with what to do about it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, command

from job import errors

ENABLED = """
import torch
from job.train import deterministic
deterministic.use_deterministic_kernels()
print(
    torch.are_deterministic_algorithms_enabled(),
    torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.utils.deterministic.fill_uninitialized_memory,
)
"""
# Loaded by Python in every process of the job: the model's MLP then uses an operation that torch has no
# deterministic kernel for, on the CPU too.
PLANTED = """
import sys
if "worker" in sys.argv:
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP
    forward = LlamaMLP.forward
    def with_put(self, hidden):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return forward(self, hidden)
    LlamaMLP.forward = with_put
"""


def test_the_mode_is_strict_and_fills_no_memory() -> None:
    """With `warn_only` attention would keep the backward pass that adds up in any order."""
    ended = subprocess.run([sys.executable, "-c", ENABLED], cwd=ROOT, capture_output=True, text=True, check=True)

    assert ended.stdout.split()[-3:] == ["True", "False", "False"]


@pytest.mark.slow
def test_an_operation_without_a_deterministic_kernel_is_named(tiny_run: Callable[..., Path], tmp_path: Path) -> None:
    """With status 64 and the key to change; the same run then goes on without it."""
    config = tiny_run(merge={"enabled": False})
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PLANTED)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def start(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command("run", config, *more), env=environ, capture_output=True, text=True, check=False)

    refused = start()
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    allowed = start("--set", "train.deterministic=false")

    assert refused.returncode == errors.PERMANENT, refused.stderr
    assert "train.deterministic: this model uses put_" in refused.stderr
    assert "Set train.deterministic to false" in refused.stderr
    assert not left & {"done.json", "adapter_model.safetensors", "optimizer.safetensors"}
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads((tmp_path / "run" / "done.json").read_text())["artefacts"]
