"""Asks the program about models, and again with the next placement where a device failed."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job import log
from job.card import CALLED
from job.examine.devices import Placement
from job.examine.runner import Program

NO_MEMORY = "there was not enough memory"
_OF_DEVICE = ("memory", "gpu")
"""What says nothing about the model, only about the device that it was on."""

Question = Callable[[str, Placement], Mapping[str, Any]]


@dataclass
class Inquiry:
    """One verification: what is known of each model so far, and where each may be tried yet."""

    program: Program
    scratch: Path
    minutes: float
    ends: float
    """By `time.monotonic`."""
    choices: dict[str, list[Placement]]
    """For each model, the placement in use and those that were not tried yet."""
    together: frozenset[str]
    """Models that are compared, and so are always on the same devices in the same format."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Models that were not verified, and why."""
    fallbacks: list[str] = field(default_factory=list)
    nowhere: str = NO_MEMORY
    """Why a model without choices has none."""
    left_out: str = "not verified"
    """What the log says of a model that is left out."""
    reserve: float = 0
    """Seconds after `ends` that are kept for later questions."""

    def ask(
        self,
        names: Iterable[str],
        question: Question,
        examples: Sequence[Mapping[str, Any]],
    ) -> None:
        """Ask about the models of those `names` until each is found or left out."""
        pending = list(names)
        for name in [name for name in pending if not self.choices[name]]:
            self._leave([name], self.nowhere)
            pending.remove(name)
        while pending:
            if time.monotonic() >= self.ends:
                self._leave(pending, self._over())
                return
            models = [question(name, self.choices[name][0]) for name in pending]
            outcome = self.program.ask(models, examples, self.scratch, self.ends)
            pending = self._sort(
                pending,
                outcome.answers,
                outcome.unanswered,
                timed_out=outcome.timed_out,
            )

    def extend(self, seconds: float) -> None:
        """Let it end so many seconds later."""
        self.ends += seconds

    def release_reserve(self) -> None:
        """Let it end later by the time that was kept for the questions that follow."""
        self.extend(self.reserve)
        self.reserve = 0

    def placement(self, name: str) -> Placement | None:
        """Return where the model was verified, if it was."""
        return self.choices[name][0] if name in self.found else None

    def _sort(
        self,
        asked: Sequence[str],
        answers: Mapping[str, dict[str, Any]],
        why: str,
        *,
        timed_out: bool,
    ) -> list[str]:
        """Keep what was answered, and return the models that have to be asked about again."""
        missing = [name for name in asked if name not in answers]
        if timed_out:
            self._leave(missing, self._over())
            missing = []
        faults = {}
        for name in answers:
            answer = answers[name]
            fault = next((answer[kind] for kind in _OF_DEVICE if kind in answer), None)
            if fault is None or timed_out:
                self.found[name] = answers[name]
            else:
                faults[name] = str(fault)
            if "gpu" in answers[name]:
                self.program.stop()
        if missing and why:  # it died at the first of them
            faults[missing[0]] = why
        again = [name for name in missing if name not in faults]
        for name, fault in faults.items():
            if name not in again:  # else its partner has failed too, and took it along
                again += self._fall_back(name, fault, answers.get(name))
        order = list(self.choices)
        return sorted(set(again), key=order.index)

    def _fall_back(self, name: str, fault: str, answer: dict[str, Any] | None) -> list[str]:
        """Choose the next placement for a model and its partner; return whom to ask about."""
        if len(self.choices[name]) < 2:  # noqa: PLR2004 - the one in use is the last
            if answer is None:
                self._leave([name], fault)
            else:
                self.found[name] = answer
            return []
        both = sorted(self.together) if name in self.together else [name]
        used, *remaining = self.choices[name]
        for each in both:
            self.choices[each] = remaining
            self.found.pop(each, None)
        message = f"{CALLED[name]} could not be verified on {used} ({fault}): trying {remaining[0]}"
        self.fallbacks.append(message)
        log.warn("examine.fallback", message)
        return both

    def _leave(self, names: Sequence[str], why: str) -> None:
        if names:
            self.left |= dict.fromkeys(names, why)
            log.warn(
                "examine.left",
                f"{', '.join(CALLED[name] for name in names)}: {self.left_out}, because {why}",
            )

    def _over(self) -> str:
        return f"its share of examine.minutes ({self.minutes:g}) ran out"
