"""Whose run is this URL: which config it was started with, and which attempt is at work."""

import json
import platform
import time
import uuid

from job import config, errors, log, paths
from job.config import Config
from job.storage import Store


def agree(store: Store, ours: Config) -> None:
    """Refuse to go on with a config that differs from the one that made what is already under the run URL.

    Raises `errors.ConfigError` with every key that differs.
    """
    there = store.read(paths.CONFIG)
    if there is None and _has_results(store):
        raise errors.ConfigError(
            f"{store.url} holds results but no {paths.CONFIG} that says what they were made with: put it back "
            "(`validate --json` prints it), or use another run.url"
        )
    if there is None:
        return
    changed = config.differences(ours, there.data)
    if changed and _has_results(store):
        listed = "\n".join(f"  {line}" for line in changed)
        raise errors.ConfigError(
            f"{store.url} holds a run with another config:\n{listed}\nUse another run.url for another run, "
            f"or the config kept in {store.url}/{paths.CONFIG}"
        )


def begin(store: Store, ours: Config) -> int:
    """Keep the config under the run URL and return the number of this attempt, which no other start gets."""
    there = store.read(paths.CONFIG)
    if there is None:
        _claim(store, ours)
    elif config.differences(ours, there.data):  # `agree` has seen that nothing was made with the old one
        store.replace(paths.CONFIG, config.claimed(ours), there.version)
        log.warn(
            "config.replaced", f"the config under {store.url} was replaced: nothing had been made with the old one"
        )
    taken = [
        int(name)
        for entry in store.list(paths.ATTEMPTS)
        if (name := entry.key.removeprefix(paths.ATTEMPTS).removesuffix(".jsonl")).isdigit()
    ]
    return _take(store, max(taken, default=0) + 1)


def _claim(store: Store, ours: Config) -> None:
    """Write the config; a start that is at the same point may be faster with the same one."""
    try:
        store.create(paths.CONFIG, config.claimed(ours))
    except errors.ConflictError:
        there = store.read(paths.CONFIG)
        if there is None or config.differences(ours, there.data):
            raise


def _take(store: Store, number: int) -> int:
    # The token makes two attempts' first lines differ, so that nobody takes another's success for his own.
    first = {
        "event": "attempt",
        "attempt": number,
        "time": time.time(),
        "host": platform.node(),
        "token": uuid.uuid4().hex,
    }
    try:
        store.create(paths.attempt(number), json.dumps(first).encode() + b"\n")
    except errors.ConflictError:
        return _take(store, number + 1)
    return number


def _has_results(store: Store) -> bool:
    return any(
        store.list(place) for place in (paths.CHECKPOINTS, paths.ADAPTER, paths.MERGED, paths.REPORT, paths.DONE)
    )
