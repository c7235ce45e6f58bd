"""Checks in ten minutes on one GPU what no CPU can show; on a CPU it runs the same code on tiny shapes.

`make gpu-check` runs it. The most valuable part comes first. Each part has a time limit and writes one JSON line to
`gpu_check.jsonl` in the output folder, so that what was found is kept whatever happens later. Nothing is downloaded.
The exit status is 0 if every part that ran passed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpu_scale import PROGRESS, SCALES  # noqa: E402 - after the path

RESULTS = "gpu_check.jsonl"
_PATIENCE = {"cuda": 1, "cpu": 4}  # times the seconds of a part: a CPU mostly has other work too
_CUDA_ENVIRONMENT = {  # before CUDA starts, as the job sets them for its workers
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Part:
    """One check: where its function is, how long it may take, and what it decides."""

    module: str
    function: str
    seconds: int
    """The limit on a GPU; see `_PATIENCE`."""
    decides: str

    @property
    def name(self) -> str:
        """Return the name on the command line and in the results."""
        return self.function.removeprefix("check_").replace("_", "-")


PARTS = (
    Part("gpu_kernels", "check_machine", 120, "versions, driver, compute capability, compiler"),
    Part("gpu_kernels", "check_copy_kernels", 30, "which dtypes the sharding kernels keep"),
    Part("gpu_kernels", "check_gathered_block", 30, "4-bit weights after FSDP2's copies"),
    Part("gpu_sharding", "check_two_processes", 90, "FSDP2 between two processes, over gloo"),
    Part("gpu_kernels", "check_compiler", 120, "whether the loss needs a C compiler"),
    Part("gpu_kernels", "check_loss_kernel", 60, "the loss kernel against full logits in float64"),
    Part("gpu_kernels", "check_determinism", 120, "the same step twice, bit by bit, and its cost"),
    Part("gpu_runs", "check_resume_packed", 150, "a stopped run against an undisturbed one"),
    Part("gpu_runs", "check_resume_padded", 150, "the same with padded batches"),
    Part("gpu_sharding", "check_pace", 30, "the clock that finds a slow process, by CUDA events"),
    Part("gpu_speed", "check_preset_fits", 150, "a preset of 24 GB under that card's limit"),
    Part("gpu_speed", "check_speed", 120, "tokens/s, memory and kernel time of a micro batch"),
    Part("gpu_runs", "check_merge", 150, "merge, verification and generation"),
    Part("gpu_runs", "check_float16", 120, "the loss scaler of float16, also across a resume"),
    Part("gpu_runs", "check_tests", 180, "tests/test_gpu.py"),
)


class Results:
    """The JSON lines of one invocation, kept in a file and shown as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failed: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def add(self, name: str, outcome: str, seconds: float, figures: dict[str, Any]) -> None:
        """Keep how the part called `name` ended: passed, failed, skipped, cut off by the total time, or not reached."""
        line = {"part": name, "outcome": outcome, "seconds": round(seconds, 1), **figures}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)  # noqa: T201 - the result
        if outcome in ("failed", "cut off"):
            self.failed.append(name)


def main() -> None:
    """Run the parts, each within its limit and all of them within the given minutes."""
    options = _parse_arguments()
    if options.worker:
        _work(options.parts, options.device, options.work)
        return
    device = options.device or _find_device()
    results = Results(options.out / RESULTS)
    ends = time.monotonic() + options.minutes * 60
    work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=options.work))
    try:
        _run_parts([part for part in PARTS if part.name in options.parts], device, work, ends, results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if results.failed:
        sys.exit(f"cut off or failed: {', '.join(results.failed)}; {options.out / RESULTS} has the figures")


def _parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, epilog="parts: " + ", ".join(names))
    parser.add_argument("--device", choices=SCALES, help="cuda where there is a GPU, else cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder on a disk with 40 GB free; by default that of tempfile")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _find_device() -> str:
    """Return cuda if torch can use a GPU; asked of another process, so that none here holds CUDA."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "cuda" if "True" in answer else "cpu"


def _run_parts(parts: Sequence[Part], device: str, work: Path, ends: float, results: Results) -> None:
    """Run the parts in one process after another: the next one takes over where one was lost or failed."""
    left = list(parts)
    while left and time.monotonic() < ends:
        done = _run_worker(left, device, work, ends, results)
        left = left[done:]
    for part in left:
        results.add(part.name, "not reached", 0.0, {"decides": part.decides})


def _run_worker(parts: Sequence[Part], device: str, work: Path, ends: float, results: Results) -> int:
    """Let one process run `parts` until one fails or takes too long; return how many have an outcome."""
    names = [part.name for part in parts]
    command = [
        sys.executable, __file__, "--worker", "--device", device, "--work", str(work), "--parts", *names,
    ]  # fmt: skip
    log = work / "worker.log"
    with (
        log.open("a+b") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**_CUDA_ENVIRONMENT, **os.environ},
        ) as process,
    ):
        answers = _Answers(process)
        for number, part in enumerate(parts, start=1):
            begun = time.monotonic()
            own_limit = part.seconds * _PATIENCE[device]
            limit = min(own_limit, ends - begun)
            answer = answers.next(limit)
            seconds = time.monotonic() - begun
            if answer is None:
                _kill_group(process)
                cut = limit < own_limit and seconds >= limit
                figures = {**_read_progress(work), **_explain(process, limit, log)}
                results.add(part.name, "cut off" if cut else "failed", seconds, figures)
                return number
            outcome = answer.pop("outcome")
            results.add(part.name, outcome, seconds, answer)
            if outcome == "failed":  # a fault of CUDA stays in its process
                _kill_group(process)
                return number
        _kill_group(process)  # which may hang when CUDA ends
    return len(parts)


class _Answers:
    """The lines that a worker prints, each waited for no longer than a given time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: Iterator[str] = iter(process.stdout or ())

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer, or None if none came in time or the worker is gone."""
        timer = _kill_after(self._process, seconds)
        try:
            for line in self._lines:
                if line.startswith('{"outcome"'):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
            return None
        finally:
            timer()


def _kill_after(process: "subprocess.Popen[str]", seconds: float) -> Callable[[], None]:
    """End the `process` group after so many seconds unless the returned function is called before."""
    import threading

    timer = threading.Timer(max(0.0, seconds), _kill_group, (process,))
    timer.start()
    return timer.cancel


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill the worker with the jobs that it started."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_progress(work: Path) -> dict[str, Any]:
    """Return the rows that a part had measured before it was lost."""
    progress = work / PROGRESS
    if not progress.exists():
        return {}
    lines = progress.read_text(encoding="utf-8").splitlines()
    progress.unlink()
    return {"rows": [json.loads(line) for line in lines]}


def _explain(process: "subprocess.Popen[str]", limit: float, log: Path) -> dict[str, Any]:
    """Return what is known of a part whose worker gave no answer."""
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
    return {"error": f"no answer within {limit:.0f} s", "status": process.returncode, "last": words}


def _work(names: Sequence[str], device: str, work: Path) -> None:
    """Run the parts called `names` in this process and print one JSON line for each."""
    import importlib
    import traceback

    for part in PARTS:
        if part.name not in names:
            continue
        (work / PROGRESS).unlink(missing_ok=True)
        try:
            check = getattr(importlib.import_module(part.module), part.function)
            figures = check(SCALES[device], work)
            outcome = "skipped" if "skipped" in figures else "passed"
        except Exception as e:  # noqa: BLE001 - whatever a part raises is its result
            traceback.print_exc()
            figures, outcome = {"error": f"{type(e).__name__}: {e}"[:2000]}, "failed"
        print(json.dumps({"outcome": outcome, **figures}), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
