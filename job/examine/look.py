"""What is verified: the models of a result, as folders, and what is to be told of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import config, log, paths
from job.card import CALLED
from job.examine.runner import Program

if TYPE_CHECKING:
    from job.examine.inquiry import Inquiry
    from job.examine.questions import Questions


@dataclass(frozen=True)
class Models:
    """What is to be looked at, as folders."""

    base: Path
    adapter: Path
    merged: Path | None
    other: Callable[[], Path | None]
    """Makes the merge into the other base (see ``merge.base``), if there is one."""


def results(
    models: Models,
    settings: config.Config | config.Merging,
    figures: Path | None,
    scratch: Path,
    gpus: tuple[str, ...],
    program: Program,
) -> dict[str, Any]:
    """Verify the `models` with the examples in `figures`, on the `gpus` if there are any.

    Return what the report tells of them, and write it into `figures` too. Raises
    `errors.ModelError` if the merged model cannot be opened, or does not compute what the base with
    the adapter does.
    """
    seen: dict[str, Any] = {"left": {}}
    if models.merged and not settings.examine.minutes:
        why = "only its sums were checked, because examine.minutes is 0 (merge: --verify sums)"
        seen["left"]["merged"] = why
        log.event("examine.sums", f"{CALLED['merged']}: {why}")
    if settings.examine.minutes:
        from job.examine.questions import Questions  # late: it imports what takes seconds

        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        questions = Questions.about(models, settings, _held_out(figures), gpus, scratch)
        if questions.names:
            seen = _verify(questions, program)
        program.stop()
        shutil.rmtree(scratch)
    if figures:
        text = json.dumps(seen, indent=1, ensure_ascii=False)
        (figures / paths.SEEN).write_text(text, encoding="utf-8")
    return seen


def _verify(questions: "Questions", program: Program) -> dict[str, Any]:
    from job.examine import judge

    inquiry = questions.inquiry(program)
    inquiry.ask(questions.names, questions.question, questions.plain_examples())
    inquiry.release_reserve()
    compared = _compare(questions, inquiry)
    left = questions.compare_bases(inquiry)  # only now: the merge has passed
    seen = (
        judge.summarize(
            inquiry.found,
            questions.split,
            questions.prompts,
            questions.scratch,
            questions.standard(inquiry),
        )
        | compared
    )
    seen["left"] |= inquiry.left | left | questions.left()
    if inquiry.fallbacks:
        seen["fallbacks"] = inquiry.fallbacks
    return seen | questions.facts(inquiry)


def _compare(questions: "Questions", inquiry: "Inquiry") -> dict[str, Any]:
    """Compare the merged model with what it should compute, in float32 where bfloat16 is too coarse.

    Raises `errors.ModelError` if it computes something else.
    """
    from job.examine import judge

    standard = questions.standard(inquiry)
    if judge.is_certain(inquiry.found, questions.scratch, standard):
        return judge.check(inquiry.found, questions.scratch, standard)
    order = judge.order_by_difference(inquiry.found, questions.scratch, standard)
    again, why = questions.compare_in_float32(inquiry, order)
    if not judge.are_compared(again.found, standard):
        return judge.check(inquiry.found, questions.scratch, standard, why)
    inquiry.fallbacks += again.fallbacks
    return judge.check({**inquiry.found, **again.found}, again.scratch, questions.standard(again))


def _held_out(figures: Path | None) -> dict[str, Any] | None:
    """Return the examples that training kept; None if there are none."""
    path = figures / paths.HELD_OUT if figures else None
    if not path or not path.is_file():  # a merge alone, or a run that an older version trained
        return None
    held_out: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held_out if held_out.get("examples") else None
