"""Put the results into the store, each whole or not at all, and say last that the run is done."""

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from job import config, errors, goodput, log, manifest, paths, storage
from job.config import Config
from job.preemption import Notice
from job.storage import Store

_VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "boto3")


def directory(store: Store, local: Path, place: str, confirm: Callable[[], None]) -> None:
    """Upload the local directory to `place` in the store, manifest last; `confirm` that we may before that."""
    whole = storage.push(store, local, place, confirm)
    log.event(
        "publish.directory",
        f"published {store.url}/{place} ({log.size(whole.size)})",
        place=place,
        digest=whole.digest,
    )


def done(
    store: Store, settings: Config, facts: Mapping[str, Any], spent: goodput.Spent, number: int,
    confirm: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Write ``done.json``: what came in, what went out, and how it went. Returns its content."""
    artefacts = {place: _digest(store, place) for place in _places(settings)}
    if lost := [place for place, digest in artefacts.items() if digest is None]:
        raise errors.StoreError(f"{store.url}: {', '.join(lost)} is not whole any more: start again to make it anew")
    confirm()
    old = store.read(paths.DONE)
    record = {
        "run": settings.run.name,
        "inputs": facts["inputs"],
        "training": {k: v for k, v in facts.items() if k != "inputs"},
        "artefacts": artefacts,
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "attempt": number,
        "time": spent.to_json(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for left in store.list(paths.PROBE):  # by starts that were killed at the wrong moment
        store.delete(left.key)
    if store.list(paths.PREPARED):  # for machines that have seen the end of training
        storage.remove(store, paths.PREPARED)
    for place in (paths.CHECKPOINTS, *_places(settings)):
        store.sweep(place)
    if not settings.merge.enabled and store.list(paths.MERGED) and not merged(store, int(facts["inputs"]["began"])):
        storage.remove(store, paths.MERGED)
        log.warn(
            "publish.removed",
            f"{store.url}/{paths.MERGED} was of the run before the restart, and this one merges nothing: removed",
        )
    confirm()
    text = json.dumps(record, indent=1).encode()
    try:
        if old:
            store.replace(paths.DONE, text, old.version)
        else:
            store.create(paths.DONE, text)
    except errors.ConflictError:
        confirm()  # who lost because the run is another's now, hears that instead
        raise
    return record


@contextlib.contextmanager
def tidied(store: Store, number: int, notice: Notice) -> Iterator[None]:
    """Leave no part of a checkpoint behind when attempt `number` finds in the block that another one owns the run.

    What was on its way when this machine was paused arrives when it wakes up, in places that are this attempt's alone;
    the other one may have finished, and then nobody else would remove it. Where the cluster asked to stop, seconds are
    short, and the next attempt tidies up.
    """
    try:
        yield
    except (errors.FencedError, errors.Preempted):
        if notice.reason:
            raise
        try:
            for name in {at.name for entry in store.list(paths.CHECKPOINTS) if (at := _of(entry.key, number))}:
                if storage.sealed(store, name) is None:
                    storage.remove(store, name)
        except (errors.JobError, OSError) as e:
            log.warn("publish.untidy", f"parts of checkpoints of attempt {number} may be left in {store.url}: {e}")
        raise


def trained(store: Store, began: int) -> bool:
    """Whether what training makes is in the store, made since attempt `began`."""
    made = _made(store, paths.ADAPTER)
    return bool(storage.sealed(store, paths.REPORT)) and made is not None and _began(made) == began


def merged(store: Store, began: int) -> bool:
    """Whether the merged model is in the store, made since attempt `began` and of the adapter there."""
    made = _made(store, paths.MERGED)
    return made is not None and _began(made) == began and made.get("adapter") == _digest(store, paths.ADAPTER)


def progress(store: Store, began: int) -> tuple[int, int, int]:
    """How far the run is: the attempt that began it, the directories published since, and its newest checkpoint."""
    keys = (entry.key for entry in store.list(paths.CHECKPOINTS))
    found = (paths.parsed(key) for key in keys if key.endswith(f"/{manifest.NAME}"))
    sealed = [at.step for at in found if at and at.attempt >= began]
    published = trained(store, began) + merged(store, began)
    return began, published, 0 if published else max(sealed, default=0)


def finished(store: Store, settings: Config, began: int) -> dict[str, Any] | None:
    """The content of ``done.json`` if the run that attempt `began` began is done and still whole; None otherwise."""
    blob = store.read(paths.DONE)
    if blob is None:
        return None
    try:
        record: dict[str, Any] = json.loads(blob.data)
        named, inputs = dict(record["artefacts"]), dict(record["inputs"])
        made_with = inputs["config"]
    except (ValueError, KeyError, TypeError) as e:
        log.warn(
            "publish.unreadable", f"{store.url}/{paths.DONE} cannot be read ({e!r}): looking at the results instead"
        )
        return None
    if int(inputs.get("began", 0)) != began:
        return None  # it is of the run before a restart
    if made_with != config.digest(settings):
        raise errors.ConfigError(f"{store.url}/{paths.DONE} is of a run with another config: use another run.url")
    changed = [place for place in _places(settings) if named.get(place) != (_digest(store, place) or "nothing")]
    if changed:
        log.warn(
            "publish.changed",
            f"{store.url} was done, but {', '.join(changed)} is no longer what {paths.DONE} says: making it again",
            places=changed,
        )
        return None
    return record


def _of(key: str, number: int) -> paths.Place | None:
    """The checkpoint that this is a file of, if it is one of attempt `number`."""
    at = paths.parsed(key)
    return at if at and at.attempt == number else None


def _made(store: Store, place: str) -> dict[str, Any] | None:
    """What is kept of how the directory at `place` was made; None if it is not there, or not whole."""
    told = store.read(place + paths.TRAINING)
    if told is None or storage.sealed(store, place) is None:
        return None
    made: dict[str, Any] = json.loads(told.data)
    return made


def _began(made: Mapping[str, Any]) -> int:
    return int(made["inputs"].get("began", 0))


def _places(settings: Config) -> list[str]:
    return [paths.ADAPTER, paths.REPORT, *([paths.MERGED] if settings.merge.enabled else [])]


def _digest(store: Store, place: str) -> str | None:
    whole = storage.sealed(store, place)
    return whole.digest if whole else None
