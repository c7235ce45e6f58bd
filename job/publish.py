"""Put the results into the store, each whole or not at all, and say last that the run is done."""

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from job import config, errors, goodput, log, manifest, paths, storage
from job.config import Config
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
    confirm()
    old = store.read(paths.DONE)
    record = {
        "run": settings.run.name,
        "inputs": facts["inputs"],
        "training": {k: v for k, v in facts.items() if k != "inputs"},
        "artefacts": {place: _digest(store, place) for place in _places(settings)},
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "attempt": number,
        "time": spent.to_json(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for left in store.list(paths.PROBE):  # by starts that were killed at the wrong moment
        store.delete(left.key)
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


def trained(store: Store, began: int) -> bool:
    """Whether what training makes is in the store, made since attempt `began`."""
    return bool(storage.sealed(store, paths.REPORT)) and _made(store, paths.ADAPTER, began)


def merged(store: Store, began: int) -> bool:
    """Whether the merged model is in the store, made since attempt `began`."""
    return _made(store, paths.MERGED, began)


def progress(store: Store, began: int) -> tuple[int, int, int]:
    """How far the run is: the attempt that began it, the directories published since, and its newest checkpoint."""
    found = (
        paths.step(entry.key) for entry in store.list(paths.CHECKPOINTS) if entry.key.endswith(f"/{manifest.NAME}")
    )
    sealed = [step for step, attempt in found if attempt >= began]
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
    changed = [place for place in _places(settings) if named.get(place) != _digest(store, place)]
    if changed:
        log.warn(
            "publish.changed",
            f"{store.url} was done, but {', '.join(changed)} is no longer what {paths.DONE} says: making it again",
            places=changed,
        )
        return None
    return record


def _made(store: Store, place: str, began: int) -> bool:
    told = store.read(place + paths.TRAINING)
    if told is None or storage.sealed(store, place) is None:
        return False
    return int(json.loads(told.data)["inputs"].get("began", 0)) == began


def _places(settings: Config) -> list[str]:
    return [paths.ADAPTER, paths.REPORT, *([paths.MERGED] if settings.merge.enabled else [])]


def _digest(store: Store, place: str) -> str | None:
    whole = storage.sealed(store, place)
    return whole.digest if whole else None
