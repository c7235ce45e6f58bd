"""A month on spot machines, simulated with the times that `checkpoint.py` measured.

    python benchmarks/goodput.py [--measured benchmarks/results/checkpoint.json] [--keep benchmarks/results/goodput]

Machines live for exponentially distributed times. A life begins with a fresh machine (`start_fresh` until the first
new step); what training gains in it counts if it is in the store when it ends. Goodput is the share of the paid time
that counts. Stock is the Trainer of transformers with a callback that uploads each checkpoint before it goes on: it
hears no notice, and saves every 500 steps (its default) or as often as is best for what a checkpoint costs it, which
it would have to be told. It gets this job's start, though it has none of its own that finds the last whole checkpoint.
--keep writes NAME.md and NAME.svg.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lab
import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job.checkpoint.cadence import interval  # noqa: E402 - after the path

MONTH, HOUR = 30 * 24 * 3600.0, 3600.0
BETWEEN = {"10 min": 600.0, "20 min": 1200.0, "30 min": 1800.0, "1 h": HOUR, "2 h": 2 * HOUR, "4 h": 4 * HOUR,
           "8 h": 8 * HOUR, "24 h": 24 * HOUR}  # fmt: skip
MONTHS = 20  # of which the mean is shown
DEFAULT_SAVE_STEPS = 500  # transformers.TrainingArguments.save_steps
GUESS, REMEMBERED = 4 * HOUR, 20  # as in job/attempts.py
REQUEUED = 60.0  # seconds until the next machine runs where a scheduler requeues at once
BACKOFF, LONGEST = 10.0, 600.0  # a Kubernetes Job's wait, doubled with every pod that failed, also of ignored failures

Measured = dict[str, float]
Gained = Callable[[float, float], tuple[float, float]]
"""From the seconds that a life left for training and the mean time between preemptions: seconds that count, and paid
beyond the end of the life."""


def this_job(measured: Measured, *, notice: bool) -> Gained:
    """Saves in the background as often as Young's formula says, and once more when a notice comes."""
    cost = measured["stall"] + max(0.0, measured["disturbed"] - measured["step"])

    def gained(seconds: float, between: float) -> tuple[float, float]:
        every = interval(cost, measured["upload"], between)
        if notice:
            return seconds - cost * (seconds // (every + cost)), measured["exit"]
        return every * max(0, (seconds - measured["upload"]) // (every + cost)), 0.0

    return gained


def stock(measured: Measured, *, tuned: bool) -> Gained:
    """Saves while training waits, and dies of the signal."""
    cost = measured["stock_stall"]

    def gained(seconds: float, between: float) -> tuple[float, float]:
        every = math.sqrt(2 * cost * between) if tuned else DEFAULT_SAVE_STEPS * measured["step"]
        return every * (seconds // (every + cost)), 0.0

    return gained


def month(gained: Gained, start: float, between: float, waits: Iterator[float], dice: random.Random) -> list[float]:
    """Shares of the paid time, and of the month, that count."""
    clock = paid = counts = 0.0
    lives: list[float] = []
    while clock < MONTH:
        life = dice.expovariate(1 / between)
        seen = lives[-REMEMBERED:]
        believed = (sum(seen) + GUESS) / (len(seen) + 1)
        more, after = gained(max(0.0, life - start), believed) if life > start else (0.0, 0.0)
        counts, paid = counts + more, paid + life + after
        clock += life + next(waits)
        lives.append(life)
    return [counts / paid, counts / clock]


def mean(gained: Gained, start: float, between: float, waits: Callable[[], Iterator[float]]) -> list[float]:
    """The same over many months."""
    months = [month(gained, start, between, waits(), random.Random(seed)) for seed in range(MONTHS)]
    return [statistics.fmean(values) for values in zip(*months, strict=True)]


def requeued() -> Iterator[float]:
    """A scheduler that starts the job again after a minute."""
    return itertools.repeat(REQUEUED)


def backing_off() -> Iterator[float]:
    """One Kubernetes Job, whose controller waits longer each time and never forgets."""
    return (min(LONGEST, BACKOFF * 2.0 ** min(number, 10)) for number in itertools.count())


def table(rows: dict[str, list[float]], heads: list[str]) -> list[str]:
    """Percentages by mean time between preemptions."""
    shown = [f"| {name} | {' | '.join(f'{value:.1%}' for value in values)} |" for name, values in rows.items()]
    return [f"| mean time between preemptions | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *shown]


def plot(rows: dict[str, list[float]], heads: list[str], path: Path) -> None:
    """Goodput over the mean time between preemptions."""
    mpl.rcParams["svg.hashsalt"] = "goodput"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(7, 4))
    for column, head in enumerate(heads):
        axes.plot(
            [BETWEEN[name] / HOUR for name in rows], [100 * row[column] for row in rows.values()], "o-", label=head
        )
    axes.set(xscale="log", ylim=(0, 100), xlabel="mean time between preemptions", ylabel="goodput, %")
    axes.set_xticks([seconds / HOUR for seconds in BETWEEN.values()], list(BETWEEN))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Simulate, print, and keep if asked to."""
    results = ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=results / "checkpoint.json")
    parser.add_argument("--keep", type=Path, help="write NAME.md and NAME.svg")
    given = parser.parse_args()
    measured: Measured = json.loads(given.measured.read_text(encoding="utf-8"))
    ways = {
        "this job, with a notice": this_job(measured, notice=True),
        "this job, killed": this_job(measured, notice=False),
        "stock, at its best interval": stock(measured, tuned=True),
        f"stock, every {DEFAULT_SAVE_STEPS} steps": stock(measured, tuned=False),
    }
    start = measured["start_fresh"]
    paid = {
        name: [mean(way, start, between, requeued)[0] for way in ways.values()] for name, between in BETWEEN.items()
    }
    schedulers = {"requeued after a minute": requeued, "a Kubernetes Job that backs off": backing_off}
    noticed = ways["this job, with a notice"]
    calendar = {
        name: [mean(noticed, start, between, waits)[1] for waits in schedulers.values()]
        for name, between in BETWEEN.items()
    }
    used = ", ".join(f"{name} {value:.2f}" for name, value in measured.items())
    text = [
        f"# A simulated month on spot, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/goodput.py`, mean of {MONTHS} months; measured seconds: {used}.",
        "",
        "## Share of the paid time that went into steps that count",
        "",
        *table(paid, list(ways)),
        "",
        "## Share of the month, for this job with a notice",
        "",
        *table(calendar, list(schedulers)),
        "",
        "A Job's controller doubles its wait with every failed pod, from 10 s to 10 minutes, also if the failure is",
        "ignored by its policy; JobSet and Slurm do not.",
    ]
    if given.keep:
        plot(paid, list(ways), given.keep.with_suffix(".svg"))
        text[-2:-2] = [f"![goodput]({given.keep.with_suffix('.svg').name})", ""]
    lab.tell(text, given.keep and given.keep.with_suffix(".md"))


if __name__ == "__main__":
    main()
