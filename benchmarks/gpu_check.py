"""Checks in ten minutes on one GPU what no CPU can show; on a CPU the same code, on tiny shapes.

`make gpu-check` runs it. The most valuable part comes first. Each part has a time limit and writes
one JSON line to `gpu_check.jsonl` in the output folder, so that what was found is kept whatever
happens later. Nothing is downloaded. It stops after `--minutes`, and the last line names the parts
that it did not reach. The exit status is 0 if every part that ran passed.

On a borrowed machine that ends a command after ten minutes and returns only the files in $OUT:

    python benchmarks/gpu_check.py --device cuda --out "$OUT"
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BEGUN = time.monotonic()  # --minutes count from here, with the search for a GPU
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpu_scale import PROGRESS, SCALES  # noqa: E402 - after the path

RESULTS, LOG = "gpu_check.jsonl", "gpu_check.log"
_PATIENCE = {"cuda": 1, "cpu": 4}  # times the seconds of a part: a CPU mostly has other work too
_START_SECONDS = 90  # for a worker's imports and CUDA's start, before the clock of its first part
_MOST_FAILED_STARTS = 2  # in a row
_KILL_SECONDS = 10  # that a killed process may take to end; one stuck in the driver never does
_SHOWN = 600  # characters of a line on stdout: some machines return only the last 12,000
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
    """The JSON lines of one invocation: whole in a file, their beginnings on stdout."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self._device = path, device
        self._names: dict[str, list[str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def add(self, name: str, outcome: str, seconds: float, figures: dict[str, Any]) -> None:
        """Store how a part ended: passed, failed, skipped, cut off by --minutes, or not reached."""
        line = json.dumps(
            {
                "part": name,
                "device": self._device,
                "outcome": outcome,
                "seconds": round(seconds, 1),
                **figures,
            }
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line[:_SHOWN], flush=True)  # noqa: T201 - the result
        self._names.setdefault(outcome, []).append(name)

    @property
    def failed(self) -> bool:
        """Return True if a part failed or was cut off."""
        return bool(self._names.keys() & {"failed", "cut off"})

    def summarize(self) -> str:
        """Return one line that names the parts of each outcome, and the file with the figures."""
        outcomes = [f"{outcome}: {', '.join(names)}" for outcome, names in self._names.items()]
        return "; ".join([f"device: {self._device}", *outcomes, f"figures: {self.path}"])


class Worker:
    """A process that runs parts and prints one JSON line for each."""

    def __init__(self, parts: Sequence[Part], device: str, work: Path, log: Path) -> None:
        self._log = log
        command = [
            sys.executable, __file__, "--worker", "--device", device, "--work", str(work),
            "--parts", *(part.name for part in parts),
        ]  # fmt: skip
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # nothing is written: it ends when this process does
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env={**_CUDA_ENVIRONMENT, **os.environ},
            )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read_answers, daemon=True).start()

    def next_answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer, or None if none comes in time or the worker is gone."""
        try:
            return self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def kill(self) -> None:
        """Kill the worker with the jobs that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_SECONDS)

    def explain(self) -> dict[str, Any]:
        """Return how the killed worker ended, and the last lines of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"status": self._process.returncode, "last": lines[-5:]}

    def _read_answers(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith('{"outcome"'):
                self._answers.put(json.loads(line))
        self._answers.put(None)


def main() -> None:
    """Run the parts, each within its limit and all of them within the given minutes."""
    options = _parse_arguments()
    if options.worker:
        _work(options.parts, options.device, options.work)
        return
    signal.signal(signal.SIGTERM, _stop)
    device = options.device or find_device()
    results = Results(options.out / RESULTS, device)
    parts = [part for part in PARTS if part.name in options.parts]
    with make_work_folder(options.work) as work:
        _run_parts(parts, device, work, _BEGUN + options.minutes * 60, results)
    if results.failed:
        sys.exit(results.summarize())
    print(results.summarize())  # noqa: T201 - the result


def _parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="parts: " + ", ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=SCALES, help="cuda where there is a GPU, else cpu")
    out = ROOT / "benchmarks" / "out"
    parser.add_argument("--out", type=Path, default=out, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder with 50 GB free; by default tempfile's")
    parser.add_argument("--minutes", type=float, default=8, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _stop(signum: int, _frame: object) -> None:
    """End by SystemExit, which kills the worker and removes its files on the way."""
    signal.signal(signum, signal.SIG_IGN)  # a second one must not interrupt that
    sys.exit(128 + signum)


def find_device() -> str:
    """Return cuda if torch can use a GPU, cpu if the machine has none.

    Another process asks torch, so that none here holds CUDA. Exits if torch cannot be imported, or
    cannot use the GPU of this machine: the tiny shapes for CPUs would pass and show nothing.
    """
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"Cannot import torch:\n{ended.stderr.strip()}")
    if "True" in ended.stdout:
        return "cuda"
    if _has_gpu():
        sys.exit(
            "This machine has an NVIDIA GPU, but torch cannot use it. Correct the driver, torch's "
            "build or CUDA_VISIBLE_DEVICES; give --device cpu to run the tiny shapes.\n"
            + ended.stderr.strip()
        )  # fmt: skip
    return "cpu"


def _has_gpu() -> bool:
    """Return True if the kernel or NVIDIA's own tool shows a GPU."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    return subprocess.run([tool], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def make_work_folder(parent: Path | None) -> Iterator[Path]:
    """Yield a new folder and remove it at the end; first remove those that a kill left behind."""
    place = parent or Path(tempfile.gettempdir())
    for folder in place.glob("gpu-check-*"):
        with contextlib.suppress(OSError), _lock(folder):
            shutil.rmtree(folder)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=place))
    try:
        with _lock(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with this process; raise OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _run_parts(
    parts: Sequence[Part], device: str, work: Path, ends: float, results: Results
) -> None:  # fmt: skip
    """Run the parts in one process after another: the next one takes over where one failed."""
    log = results.path.with_name(LOG)
    log.write_bytes(b"")
    patience, left, failed_starts = _PATIENCE[device], list(parts), 0
    while left and failed_starts < _MOST_FAILED_STARTS and time.monotonic() < ends:
        worker = Worker(left, device, work, log)
        try:
            limit = _START_SECONDS * patience
            if _await_outcome(worker, "start", limit, ends, work, results) != "ready":
                failed_starts += 1
                continue
            failed_starts = 0
            while left and time.monotonic() < ends:
                part = left.pop(0)
                limit = part.seconds * patience
                outcome = _await_outcome(worker, part.name, limit, ends, work, results)
                if outcome in ("failed", "cut off"):  # a fault of CUDA stays in its process
                    break
        finally:
            worker.kill()  # also at the end: CUDA may hang there
    for part in left:
        results.add(part.name, "not reached", 0.0, {"decides": part.decides})


def _await_outcome(
    worker: Worker, name: str, limit: float, ends: float, work: Path, results: Results
) -> str:  # fmt: skip
    """Return the outcome of what the worker does now, and store it unless the worker got ready.

    Without an answer within `limit` seconds, or at `ends`, the worker is killed.
    """
    begun = time.monotonic()
    wait = min(limit, ends - begun)
    answer = worker.next_answer(wait)
    seconds = time.monotonic() - begun
    if answer is None:
        worker.kill()
        late = seconds >= wait
        answer = {
            "outcome": "cut off" if late and wait < limit else "failed",
            **_read_progress(work),
            "error": f"no answer within {wait:.0f} s" if late else "the worker ended",
            **worker.explain(),
        }
    outcome: str = answer.pop("outcome")
    if outcome != "ready":
        results.add(name, outcome, seconds, answer)
    return outcome


def _read_progress(work: Path) -> dict[str, Any]:
    """Return the rows that a part measured before it ended."""
    progress = work / PROGRESS
    if not progress.exists():
        return {}
    lines = progress.read_text(encoding="utf-8").splitlines()
    progress.unlink()
    return {"rows": [json.loads(line) for line in lines]}


def _work(names: Sequence[str], device: str, work: Path) -> None:
    """Run the parts called `names` in this process and print one JSON line for each."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _import_parts(device)
    _print_answer("ready", {})
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
        _print_answer(outcome, {**_read_progress(work), **figures})


def _die_with_parent() -> None:
    """Kill this process and its jobs when stdin ends: a parent that was killed cannot do it."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _import_parts(device: str) -> None:
    """Import all modules of parts and start CUDA, so that no part's limit has to cover that."""
    for module in sorted({part.module for part in PARTS}):
        with contextlib.suppress(Exception):  # a part of it raises it again, as its result
            importlib.import_module(module)
    if device == "cuda":
        import torch

        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def _print_answer(outcome: str, figures: dict[str, Any]) -> None:
    print(json.dumps({"outcome": outcome, **figures}), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
