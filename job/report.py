"""The run in one page of Markdown, for the person who asked for it."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job import card, goodput, paths
from job.config import Config

NAME = "report.md"
_BAR = 40  # characters of the longest bar


def write(config: Config, facts: Mapping[str, Any], spent: goodput.Spent, directory: Path, store_url: str) -> Path:
    """Write the report beside the figures that training left in `directory` and return the directory."""
    data = json.loads((directory / "data.json").read_text(encoding="utf-8"))
    told = directory / paths.SEEN
    seen = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    sample = (directory / "sample.txt").read_text(encoding="utf-8")
    sections = [
        _head(config, facts, store_url),
        *([f"## The result\n{compared}"] if (compared := _result(seen)) else []),
        *([_answers(seen["answers"])] if seen.get("answers") else []),
        _data(data),
        _time(spent),
        f"## What the model saw\nTrained tokens stand between ⟦ and ⟧.\n\n{_quoted(sample)}",
        _settings(config),
    ]
    path = directory / NAME
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return directory


def summary(record: Mapping[str, Any]) -> str:
    """What ``done.json`` tells, in a phrase: the losses, and where the time went."""
    time = record.get("time")
    if time is None:  # of a run that an older version finished
        return losses(record["training"])
    took = dt.timedelta(seconds=round(sum(time["seconds"].values())))
    return (
        f"{losses(record['training'])}; {time['attempts']} attempt(s), {time['goodput']:.0%} of {took} in training "
        "steps that count"
    )


def losses(facts: Mapping[str, Any]) -> str:
    """Loss before and after, in a phrase."""
    return f"{facts['loss_measured_on']} loss {facts['loss_before']:.4f} before, {facts['loss_after']:.4f} after"


def _head(config: Config, facts: Mapping[str, Any], store_url: str) -> str:
    rows = {
        "Base model": f"{facts['base']} (digest {facts['inputs']['base']})",
        "Data": f"digest {facts['inputs']['data']}",
        "Steps": f"{facts['steps']} ({facts['epochs']:.2f} epochs, {facts['tokens']:,} tokens); "
        f"the adapter is that of step {facts['step_kept']}",
        "Loss": losses(facts),
        "Adapter": f"{store_url}/adapter/",
        "Merged model": f"{store_url}/merged/, in {config.merge.dtype}, into the {config.merge.base} base"
        if config.merge.enabled
        else "not asked for",
    }
    return f"# {config.run.name}\n\n" + "\n".join(f"- **{name}**: {value}" for name, value in rows.items())


def _result(seen: Mapping[str, Any]) -> str:
    """Whether the merged model is what was trained, and what each way to use it costs."""
    opened = (
        f"Plain transformers opens the merged model as {seen['class']}. Its logits are within {seen['off']:.2%} of "
        f"those of the base with the adapter ({seen['dtype']}), which differ from the base's by {seen['effect']:.2%}."
        if "off" in seen
        else ""
    )
    return "\n\n".join(part for part in (opened, card.losses(seen), card.left(seen), _devices(seen)) if part)


def _devices(seen: Mapping[str, Any]) -> str:
    """Return a list of the devices that the models were verified on, and of those that were not up to it."""
    used = [f"- {card.CALLED[name]}: on {where}" for name, where in seen.get("on_devices", {}).items()]
    failed = [f"- {message}" for message in seen.get("fallbacks", ())]
    return "\n".join(["Verified:", "", *used, *failed]) if used else ""


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    """Held-out examples, answered by the base and by what it became: the likeliest words, cut where time was short."""
    parts = ["## Answers before and after"]
    for number, each in enumerate(answers, 1):
        parts += [f"### {number}\n{_quoted(each['prompt'])}"]
        for name, key in (("The base", "base"), ("Tuned", "tuned"), ("In the data", "wanted")):
            said = _quoted(each[key]) or "    (ends at once)"
            parts.append(f"**{name}**{_cut(each, key)}\n\n{said}")
    return "\n\n".join(parts)


def _cut(answer: Mapping[str, Any], key: str) -> str:
    """Return a note for an answer that ended because examine.minutes ran out."""
    tokens = answer.get("cut", {}).get(key)
    return "" if tokens is None else f" (cut after {tokens} tokens: the time was over)"


def _data(data: Mapping[str, Any]) -> str:
    lines = [
        "## Data",
        "| split | records | bad | cut to length | equal to others | in the other split | used | tokens | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {split} | {c['records']} | {c['bad']} | {c['truncated']} | {c['repeated']} | {c['leaked'] or '-'} | "
        f"{c['examples']} | {c['tokens']} | {c['trained_tokens'] / c['tokens']:.1%} |"
        for split, c in data.items()
    ]
    return "\n".join([*lines, *(_lengths(split, c["lengths"]) for split, c in data.items())])


def _lengths(split: str, told: Mapping[str, Any]) -> str:
    """A histogram of the examples' lengths, as text."""
    most = max(count for _, count in told["histogram"])
    bars = "\n".join(
        f"    up to {upto:>6} {count:>9} {'█' * round(_BAR * count / most)}" for upto, count in told["histogram"]
    )
    return (
        f"\nTokens in an example of the {split} split: {told['mean']:.0f} on average; half have up to {told['p50']}, "
        f"90% up to {told['p90']}, 99% up to {told['p99']}.\n\n{bars}"
    )


def _time(spent: goodput.Spent) -> str:
    shown = {**spent.seconds, "all": spent.total}
    rows = [f"| {name} | {seconds:.0f} | {seconds / spent.total:.1%} |" for name, seconds in shown.items()]
    note = (
        f"{spent.goodput:.1%} of the time of {spent.attempts} attempt(s) went into training steps that count; "
        f"{spent.lost_steps} step(s) were done twice. `start` is what comes before the first step of the job, `load` "
        "the libraries and the model, `compile` what the first training step took longer than the others, `save` the "
        "copies to memory, `upload` the wait for the last checkpoint. Of an attempt that was killed, up to its last "
        "minute is missing."
    )
    return "\n".join(["## Where the time went", note, "", "| phase | seconds | share |", "| --- | --- | --- |", *rows])


def _settings(config: Config) -> str:
    return "## Config\n```json\n" + json.dumps(config.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n```"


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
