"""The script that checks one GPU in ten minutes runs here on tiny shapes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

KERNELS = [
    "machine", "copy-kernels", "gathered-block", "two-processes", "compiler", "loss-kernel",
    "determinism", "pace", "preset-fits", "speed", "tests",
]  # fmt: skip
RUNS = ["resume-packed", "resume-padded", "merge", "float16"]
SKIPPED = ["compiler", "tests"]  # what a CPU cannot show


def command(out: Path, *options: str) -> list[str]:
    script = [sys.executable, "benchmarks/gpu_check.py", f"--out={out}", f"--work={out}"]
    return [*script, *options]


def run_check(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    started = command(out, "--device=cpu", *options)
    return subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=False)


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "gpu_check.jsonl").read_text().splitlines()
    return {line["part"]: line for line in map(json.loads, lines)}


def read_outcomes(out: Path) -> dict[str, str]:
    return {name: line["outcome"] for name, line in read_results(out).items()}


@pytest.fixture
def load_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of the script."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_every_part_is_run_by_a_test(load_module: Callable[[str], ModuleType]) -> None:
    """A part that no test runs fails on the GPU, where there are ten minutes."""
    parts = [part.name for part in load_module("gpu_check").PARTS]

    assert sorted(parts) == sorted(KERNELS + RUNS)


def test_every_check_of_single_steps_passes_on_the_cpu(tmp_path: Path) -> None:
    """Each writes a line with its figures; what a CPU cannot show is called skipped."""
    ended = run_check(tmp_path, "--minutes=30", "--parts", *KERNELS)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = read_results(tmp_path)
    assert {line["device"] for line in results.values()} == {"cpu"}
    expected = dict.fromkeys(KERNELS, "passed") | dict.fromkeys(SKIPPED, "skipped")
    assert read_outcomes(tmp_path) == expected
    assert results["loss-kernel"]["loss_off"] < 1e-6  # float32 here, against float64
    assert results["two-processes"]["stored"] == {
        "torch.uint8": "same output", "torch.bfloat16": "same output",  # copies on a CPU keep NaNs
    }  # fmt: skip
    for name in ("copy-kernels", "gathered-block", "two-processes"):
        assert results[name]["premise_confirmed"] is False
    fast, slow = results["two-processes"]["layer_seconds"]
    assert fast < 0.1 <= slow
    assert results["two-processes"]["pass_seconds"][0] >= 0.07  # rank 0 waited
    assert results["pace"]["taken"] >= 0.1
    steps = results["determinism"]["steps"]
    assert [(step["length"], step["packed"]) for step in steps] == [
        (48, False), (48, True), (160, False), (160, True)
    ]  # fmt: skip
    profiled = [row["micro_batch"] for row in results["speed"]["rows"] if "kernel_share" in row]
    assert profiled == [1, 2]
    assert max(map(len, ended.stdout.splitlines()[:-1])) <= 600  # the file has all of it
    assert not list(tmp_path.glob("gpu-check-*"))


@pytest.mark.slow
def test_every_whole_job_check_passes_on_the_cpu(tmp_path: Path) -> None:
    """A stopped run, one in float16, and a merge with its verification and an answer."""
    ended = run_check(tmp_path, "--minutes=30", "--parts", *RUNS)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert read_outcomes(tmp_path) == dict.fromkeys(RUNS, "passed")
    results = read_results(tmp_path)
    starts = [row["start"] for row in results["resume-packed"]["rows"]]
    assert starts == ["whole-packed", "stopped-packed", "stopped-packed"]
    assert [row["start"] for row in results["merge"]["rows"]] == ["merge", "generate"]
    assert results["merge"]["answer"]


@pytest.mark.slow
@pytest.mark.every_commit
def test_a_part_that_takes_too_long_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """It fails with what is known of it, and the summary names the parts that were not reached."""
    ended = run_check(tmp_path, "--minutes=0.8", "--parts", "machine", *RUNS)

    assert ended.returncode == 1
    results = read_results(tmp_path)
    assert results["machine"]["outcome"] == "passed"
    (cut,) = (name for name, line in results.items() if line["outcome"] == "cut off")
    not_reached = RUNS[RUNS.index(cut) + 1 :]
    assert [results[name]["outcome"] for name in not_reached] == ["not reached"] * len(not_reached)
    assert f"cut off: {cut}; not reached: {', '.join(not_reached)}; " in ended.stderr
    assert "float16" in not_reached
    assert not list(tmp_path.glob("gpu-check-*"))


def find_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line names the folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def start_until_a_job_runs(out: Path) -> "subprocess.Popen[bytes]":
    """Start the script with a part that starts jobs, and return it when one runs."""
    process = subprocess.Popen(
        command(out, "--device=cpu", "--parts", "resume-packed"),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def has_job() -> bool:
        commands = [" ".join(each.info["cmdline"]) for each in find_processes(out)]
        return any("entrypoint.py" in command for command in commands)

    if not wait_until(has_job, 120):
        process.kill()
        pytest.fail("no job was started")
    return process


def test_sigterm_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    """The script kills its worker with the job that it started, and removes its files."""
    with start_until_a_job_runs(tmp_path) as process:
        process.terminate()

        assert process.wait(30) == 128 + signal.SIGTERM
    assert wait_until(lambda: not find_processes(tmp_path), 10)
    assert not list(tmp_path.glob("gpu-check-*"))


def test_sigkill_leaves_no_process(
    tmp_path: Path, load_module: Callable[[str], ModuleType]
) -> None:  # fmt: skip
    """The worker and its job end by themselves, and the next start removes their files."""
    with start_until_a_job_runs(tmp_path) as process:
        process.kill()

        assert wait_until(lambda: not find_processes(tmp_path), 10)
    assert list(tmp_path.glob("gpu-check-*"))
    with load_module("gpu_check").make_work_folder(tmp_path) as work:
        assert list(tmp_path.glob("gpu-check-*")) == [work]
    assert not list(tmp_path.glob("gpu-check-*"))


def test_the_folder_of_a_start_that_runs_stays(
    tmp_path: Path, load_module: Callable[[str], ModuleType]
) -> None:  # fmt: skip
    """Two starts on one machine keep their files apart."""
    make_work_folder = load_module("gpu_check").make_work_folder

    with make_work_folder(tmp_path) as first, make_work_folder(tmp_path) as second:
        assert first.exists()
        assert second != first


def search_device(folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Start the script without --device."""
    return subprocess.run(
        command(folder, "--parts", "compiler"),
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_ends_the_script(tmp_path: Path) -> None:
    """On the CPU nearly all would pass, and nothing would be shown of the GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)

    ended = search_device(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")

    assert ended.returncode == 1
    assert "This machine has an NVIDIA GPU, but torch cannot use it." in ended.stderr
    assert not (tmp_path / "gpu_check.jsonl").exists()


def test_a_torch_that_cannot_be_imported_is_named_with_its_reason(tmp_path: Path) -> None:
    """The reason is what torch's import said."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")

    ended = search_device(tmp_path, PYTHONPATH=str(tmp_path))

    assert ended.returncode == 1
    assert "libcudart.so.13: cannot open" in ended.stderr
    assert not (tmp_path / "gpu_check.jsonl").exists()


def test_a_worker_that_cannot_start_ends_the_script_at_the_second_try(tmp_path: Path) -> None:
    """No part is blamed for it, and the time is not spent on more starts."""
    starts = subprocess.run(
        command(tmp_path, "--device=cuda", "--parts", "machine", "pace"),
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert starts.returncode == 1
    assert "failed: start, start; not reached: machine, pace" in starts.stderr
    start = read_results(tmp_path)["start"]
    assert start["error"] == "the worker ended"
    assert start["last"]
    assert not list(tmp_path.glob("gpu-check-*"))


def test_time_of_kernels_is_counted_once(load_module: Callable[[str], ModuleType]) -> None:
    """Torch also adds it to the operation that started the kernel, and to annotations."""
    on_gpu: dict[str, Any] = {"device_type": DeviceType.CUDA, "use_device": "cuda", "stack": []}
    operation = FunctionEvent(0, "aten::mm", 0, 0, 50, use_device="cuda", stack=[])
    operation.append_kernel("gemm", 0, 400)
    kernel = FunctionEvent(1, "gemm", 0, 100, 500, **on_gpu)
    annotation = FunctionEvent(2, "step", 0, 0, 600, is_user_annotation=True, **on_gpu)
    events = EventList([operation, kernel, annotation], use_device="cuda")
    events._build_tree()
    averages = events.key_averages()
    assert sum(event.self_device_time_total for event in averages) == 400 + 400 + 600

    summary = load_module("gpu_speed").summarize_profile(averages, 800e-6)

    assert summary == {"kernel_share": 0.5, "kernels": 1, "operations": 1}


def test_a_straggler_check_without_a_wait_fails(load_module: Callable[[str], ModuleType]) -> None:
    """Where rank 0 waits for nobody, a clock that counts waits looks right."""
    require_straggler = load_module("gpu_sharding").require_straggler

    require_straggler([0.001, 0.1], [0.1, 0.1])
    with pytest.raises(RuntimeError, match="did not wait"):
        require_straggler([0.001, 0.1], [0.01, 0.1])
    with pytest.raises(RuntimeError, match="do not show that only rank 1 is slow"):
        require_straggler([0.1, 0.1], [0.1, 0.1])


@pytest.mark.parametrize(
    ("events", "device", "reason"),
    [
        ([], "cpu", "shows too little"),
        ([("examine.merged", ""), ("examine.nan", "NaN")], "cuda", "shows too little.*NaN"),
        ([("examine.merged", ""), ("examine.fallback", "CPU")], "cuda", "shows too little"),
        ([("examine.begin", "on the CPU"), ("examine.merged", "")], "cuda", "on the CPU"),
    ],
)
def test_a_merge_that_was_not_verified_fails(
    events: list[tuple[str, str]],
    device: str,
    reason: str,
    load_module: Callable[[str], ModuleType],
) -> None:
    """The job ends with 0 where a verification could not happen."""
    logged = [{"event": name, "message": message} for name, message in events]

    with pytest.raises(RuntimeError, match=reason):
        load_module("gpu_runs").require_verified(logged, device)


def run_scaler(state: dict[str, Any] | None, steps: int, overflows: int = 0) -> dict[str, Any]:
    """Return the state of torch's loss scaler after some steps, the first of which overflow."""
    scaler = torch.amp.GradScaler("cpu")
    if state:
        scaler.load_state_dict(state)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0)
    for step in range(steps):
        scaler.scale(weight.sum() * (float("inf") if step < overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scaler.state_dict()


def test_a_loss_scaler_that_began_anew_is_found(load_module: Callable[[str], ModuleType]) -> None:
    """Its count of steps or its scale tells, also where steps overflow after the resume."""
    require_resumed = load_module("gpu_runs").require_scaler_resumed
    stopped = {"step": 12, "scaler": run_scaler(None, 12, overflows=2)}

    for overflows in (0, 1):
        resumed = run_scaler(stopped["scaler"], 18, overflows)
        require_resumed([stopped, {"step": 30, "scaler": resumed}])
        with pytest.raises(RuntimeError, match="began anew"):
            require_resumed([stopped, {"step": 30, "scaler": run_scaler(None, 18, overflows)}])
    with pytest.raises(RuntimeError, match="no states"):
        require_resumed([{"step": 12, "scaler": None}, {"step": 30, "scaler": None}])


def test_only_whole_events_are_read_from_the_log(load_module: Callable[[str], ModuleType]) -> None:
    """Bars and words of libraries stand in it too."""
    parse_event = load_module("gpu_runs").parse_event

    assert parse_event('{"event": "a"}\n') == {"event": "a"}
    assert parse_event('50%|##   | 1/2 {"event": "a"}\n') == {"event": "a"}
    assert parse_event('{"event": \n') is None
    assert parse_event("{'loss': 1}\n") is None
