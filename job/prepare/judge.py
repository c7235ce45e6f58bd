"""What is said of a split, and what of it stops the run."""

import math
from collections.abc import Sequence

from job import errors, log
from job.config import Data
from job.inputs import DataFile
from job.prepare.tally import Tally


def split(name: str, tally: Tally, files: Sequence[DataFile], data: Data) -> None:
    """Say what was read; raise `errors.DataError` if too much of it cannot be used, or nothing is left."""
    for url, kind in tally.formats.items():
        log.event("prepare.format", f"{url}: {kind} format", split=name, url=url, format=kind)
    if tally.ignored_keys:
        log.event(
            "prepare.ignored",
            f"{name}: keys that are not used: {', '.join(sorted(tally.ignored_keys))}",
            keys=dict(tally.ignored_keys),
        )
    if tally.bad:
        _bad(name, tally, data)
    if not tally.examples:
        where = ", ".join(file.url for file in files)
        if name == "eval" and data.eval_fraction:
            raise errors.DataError(
                f"data.eval_fraction {data.eval_fraction} holds out none of the records in {where}: raise it"
            )
        raise errors.DataError(
            f"{name}: no record in {where}; there is nothing to {'train on' if name == 'train' else 'evaluate'}"
        )
    if tally.truncated:
        log.warn(
            "prepare.truncated",
            f"{name}: {tally.truncated} of {tally.examples} examples were cut to data.max_length {data.max_length} "
            "tokens",
            split=name,
            truncated=tally.truncated,
        )


def method(url: str, kind: str, *, pairs: bool) -> None:
    """Raise `errors.DataError` if the format of a file is not what the method of training needs."""
    if pairs and kind not in ("preference", "unreadable"):
        raise errors.DataError(
            f"{url}: {kind} format, and train.method dpo needs pairs of answers: prompt, chosen and rejected"
        )
    if kind == "preference" and not pairs:
        raise errors.DataError(
            f"{url}: preference format, which train.method sft has no use for: set train.method: dpo"
        )


def share(name: str, tally: Tally, data: Data, sample: str) -> None:
    """Raise `errors.DataError` if every token would be learned although the records hold questions."""
    asks = data.loss_on != "all" and set(tally.formats.values()) != {"text"}
    if asks and tally.trained_tokens == tally.tokens:
        raise errors.DataError(
            f"{name}: every token would be learned, questions too, as in the first example:\n{sample}\n"
            "The chat template hides where answers begin: set data.template, or data.loss_on: all if it is meant"
        )


def repeated(name: str, tally: Tally, data: Data) -> None:
    """Say how many examples are there more than once."""
    if tally.repeated:
        done = "left out" if data.deduplicate else "kept; data.deduplicate: true leaves them out"
        log.event(
            "prepare.repeated",
            f"{name}: {tally.repeated} of {tally.examples} examples are equal to earlier ones: {done}",
            split=name,
            repeated=tally.repeated,
        )


def leaked(tally: Tally, data: Data, example: str) -> None:
    """Say how many eval examples are trained on too; raise `errors.DataError` if that is not allowed."""
    if not tally.leaked:
        return
    seen = f"eval: {tally.leaked} of {tally.examples} examples are in the training data too"
    if data.leaks == "refuse":
        raise errors.DataError(
            f"{seen}, so the eval loss would measure memory. The first is\n{example}\n"
            "Take them out of one of the two, or set data.leaks: drop to leave them out of training"
        )
    done = "they are not trained on" if data.leaks == "drop" else "as data.leaks allows, the eval loss measures memory"
    log.warn("prepare.leaked", f"{seen}: {done}", leaked=tally.leaked)


def chosen(train: Tally, weights: Sequence[float]) -> None:
    """Say what the weights made of the training data; raise `errors.DataError` if nothing is left."""
    if not train.examples:
        raise errors.DataError(
            "train: nothing is left to train on: every example is an eval example too, or its source's weight is so "
            "small that none was drawn"
        )
    if any(weight != 1 for weight in weights):
        log.event(
            "prepare.mixed",
            f"train: with the weights of the sources an epoch has {train.examples} examples",
            examples=train.examples,
        )


def _bad(name: str, tally: Tally, data: Data) -> None:
    part = tally.bad / tally.records
    listed = "\n".join(f"  {line}" for line in tally.complaints)
    more = f"\n  and {tally.bad - len(tally.complaints)} more" if tally.bad > len(tally.complaints) else ""
    seen = f"{name}: {tally.bad} of {tally.records} records read cannot be used:\n{listed}{more}"
    if part > data.skip_bad_share:
        enough = (math.floor(part * 100) + 1) / 100
        skip = f", or set data.skip_bad_share to {enough} to leave them out" if enough < 1 else ""
        raise errors.DataError(f"{seen}\nCorrect them{skip}")
    log.warn(
        "prepare.skipped",
        f"{seen}\nThey are left out, as data.skip_bad_share {data.skip_bad_share} allows",
        split=name,
        skipped=tally.bad,
    )
