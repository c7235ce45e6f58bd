"""The script that checks one GPU in ten minutes runs here on tiny shapes, so that it works when a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KERNELS = [
    "machine", "copy-kernels", "gathered-block", "two-processes", "compiler", "loss-kernel",
    "determinism", "pace", "speed",
]  # fmt: skip
RUNS = ["resume-packed", "resume-padded", "merge", "float16"]


def run_check(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "benchmarks/gpu_check.py", "--device=cpu", f"--out={out}", f"--work={out}"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)


def read_results(out: Path) -> dict[str, dict[str, object]]:
    lines = (out / "gpu_check.jsonl").read_text().splitlines()
    return {line["part"]: line for line in map(json.loads, lines)}


def test_every_kernel_check_passes_on_the_cpu(tmp_path: Path) -> None:
    """Each writes a line with its figures; what a CPU cannot show is called skipped."""
    ended = run_check(tmp_path, "--parts", *KERNELS)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = read_results(tmp_path)
    outcomes = {name: line["outcome"] for name, line in results.items()}
    assert outcomes == {**dict.fromkeys(KERNELS, "passed"), "compiler": "skipped"}
    assert results["loss-kernel"]["loss_off"] < 1e-6  # float32 here, against float64
    assert results["two-processes"]["stored"] == {
        "torch.uint8": "same output", "torch.bfloat16": "same output",  # copies on a CPU keep NaNs
    }  # fmt: skip
    fast, slow = results["two-processes"]["layer_seconds"]
    assert fast < 0.1 <= slow
    assert results["two-processes"]["pass_seconds"][0] >= 0.07  # rank 0 waited
    assert results["pace"]["taken"] >= 0.1
    steps = results["determinism"]["steps"]
    assert [(step["length"], step["packed"]) for step in steps] == [
        (48, False), (48, True), (160, False), (160, True)
    ]  # fmt: skip
    assert not list(tmp_path.glob("gpu-check-*"))


@pytest.mark.slow
def test_every_whole_job_check_passes_on_the_cpu(tmp_path: Path) -> None:
    """A stopped run, one in float16, and a merge with its verification."""
    ended = run_check(tmp_path, "--minutes=30", "--parts", *RUNS)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {name: line["outcome"] for name, line in read_results(tmp_path).items()} == dict.fromkeys(RUNS, "passed")


def test_a_part_that_takes_too_long_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """It fails with what is known of it, what was found before stays, and what is left is called not reached."""
    ended = run_check(tmp_path, "--parts", "machine", "resume-packed", "merge", "--minutes=0.4")

    assert ended.returncode != 0
    assert "cut off or failed: resume-packed" in ended.stderr
    outcomes = {name: line["outcome"] for name, line in read_results(tmp_path).items()}
    assert outcomes.keys() == {"machine", "resume-packed", "merge"}
    assert outcomes["merge"] == "not reached"
    assert outcomes["resume-packed"] == "cut off"
    assert not list(tmp_path.glob("gpu-check-*"))
