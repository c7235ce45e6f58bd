"""Where the seconds of a run went: what the logs of its attempts tell, and how much of it went into training.

Each process is in one phase at any time (`log.phase`), so a log that ends in the middle of a line still accounts for
every second up to there. Goodput is the share of the time that went into steps which the next attempt did not have to
do again (after Google's "ML Productivity Goodput", which calls it the runtime goodput).
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEGIN = "attempt.begin"
PHASES = (
    "start", "pull", "prepare", "load", "compile", "train", "save", "evaluate", "upload", "merge", "examine", "publish",
)  # fmt: skip


@dataclass(frozen=True)
class Account:
    """One attempt: seconds by phase, the step that it went on from (None if it did not train), the last one it did."""

    seconds: Mapping[str, float]
    resumed: int | None
    reached: int

    @property
    def pace(self) -> float:
        """Seconds of a step."""
        return self.seconds.get("train", 0.0) / max(1, self.reached - (self.resumed or 0))


@dataclass(frozen=True)
class Spent:
    """All attempts of a run: seconds by phase, those of steps that were done twice under ``lost``."""

    attempts: int
    seconds: Mapping[str, float]
    lost_steps: int

    @property
    def total(self) -> float:
        """Seconds of all attempts."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that count."""
        return self.seconds.get("train", 0.0) / max(self.total, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """For ``done.json``."""
        seconds = {name: round(value, 1) for name, value in self.seconds.items()}
        return {
            "attempts": self.attempts,
            "goodput": round(self.goodput, 4),
            "lost_steps": self.lost_steps,
            "seconds": seconds,
        }


def account(lines: Sequence[Mapping[str, Any]]) -> Account:
    """What the log of one attempt tells.

    The first step of each start also warms up (kernels are compiled and chosen, memory is taken): what it takes longer
    than the others is in ``compile``.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    phase, resumed, reached = "start", None, 0
    since = next((float(line["started"]) for line in lines if "started" in line), math.inf)
    for line in lines:
        now = float(line["time"])
        seconds[phase] += max(0.0, now - since)
        since = now
        if line["event"] == "phase":
            phase = str(line["phase"])
            resumed = line.get("step") if phase == "compile" and resumed is None else resumed
        if line["event"] in ("phase", "train.metrics") and resumed is not None:
            reached = max(reached, int(line.get("step", 0)))
    first = seconds["train"] / max(1, reached - (resumed or 0) - 1) if reached > (resumed or 0) + 1 else 0.0
    warm = min(first, seconds["compile"])
    seconds["train"] += warm
    seconds["compile"] -= warm
    return Account({name: seconds[name] for name in PHASES if seconds[name] > 0}, resumed, reached)


def spent(accounts: Sequence[Account]) -> Spent:
    """The sum over the attempts of a run, in their order."""
    seconds: defaultdict[str, float] = defaultdict(float)
    lost = 0
    for place, attempt in enumerate(accounts):
        for phase, value in attempt.seconds.items():
            seconds[phase] += value
        later = [other.resumed for other in accounts[place + 1 :] if other.resumed is not None]
        done = attempt.resumed is not None and bool(later)
        again = max(0, attempt.reached - max(min(later), attempt.resumed or 0)) if done else 0
        waste = min(again * attempt.pace, attempt.seconds.get("train", 0.0))
        seconds["train"] -= waste
        seconds["lost"] += waste
        lost += again
    return Spent(len(accounts), {name: seconds[name] for name in (*PHASES, "lost") if seconds[name] > 0}, lost)


def parse(text: bytes) -> list[dict[str, Any]]:
    """The whole lines of a log, or of a part of one; what a kill or the part's borders cut off is left out."""
    found = []
    for line in text.decode(errors="replace").splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and {"event", "message", "time"} <= parsed.keys():
            found.append(parsed)
    return found
