"""A place in a store for one merged model: whose it is, and that nothing else is lost there."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from job import card, errors, log, manifest, paths, storage
from job.publish.run import directory
from job.storage import Store


@contextlib.contextmanager
def claimed(store: Store, claim: Mapping[str, str]) -> Iterator[Callable[[Path], None] | None]:
    """Make the whole store the place of one merged model, and give what puts its folder there; None if it is there.

    To publish replaces everything in a place, so only an empty one is taken, or one that this merge took before: its
    `claim` stands in ``training.json`` from the beginning, and says in ``made_of`` what of. It is given back if nothing
    can come of it. Raises `errors.ConfigError` if the place is somebody else's, or somebody's work would be lost there.
    """
    own: set[str] = set()  # names in the folder, when there is one
    if _is_there(store, claim["made_of"]):
        yield None
        return
    with contextlib.suppress(errors.ConflictError):  # whose it is now is looked at below
        if not _claim(store):
            store.create(paths.TRAINING, json.dumps(claim).encode())

    def confirm() -> None:
        if _claim(store).get("made_of") != claim["made_of"]:
            raise errors.ConfigError(f"--out: {store.url} {_taken(store)}: give a place of its own")
        if own:
            _nothing_else(store, own)

    def put(folder: Path) -> None:
        own.update(manifest.files(folder))
        directory(store, folder, "", confirm)

    confirm()
    try:
        yield put
    except errors.PermanentError:
        if [entry.key for entry in _held(store)] == [paths.TRAINING] and _claim(store) == claim:
            store.delete(paths.TRAINING)
        raise


def _is_there(store: Store, made_of: str) -> bool:
    """Whether the model is in the store; raises `errors.ConfigError` if something else is, or it was changed."""
    there = {entry.key: entry.size for entry in _held(store)}
    if _claim(store).get("made_of") != made_of:
        if there:
            raise errors.ConfigError(f"--out: {store.url} {_taken(store)}: give a place of its own")
        return False
    whole = _sealed(store)
    if whole is None:  # a start that ended early
        return False
    changed = {name for name, file in whole.files.items() if there.get(name, file.size) != file.size}
    if whole.files.keys() <= there.keys() and changed <= {card.NAME}:  # who has the model may write about it
        return True
    if changed:
        raise errors.ConfigError(
            f"--out: {store.url} holds {min(changed)}, which is not as the merge wrote it: remove it, and it is made "
            "again, or give another place"
        )
    _nothing_else(store, whole.files.keys())
    log.warn("publish.changed", f"{store.url} is not whole any more: making it again")
    return False


def _sealed(store: Store) -> manifest.Manifest | None:
    """What was sealed in the store, whether or not all of it is still there."""
    there = store.read(manifest.NAME)
    with contextlib.suppress(errors.DamagedError):  # it is being written anew
        return manifest.parse(there.data, manifest.NAME) if there else None
    return None


def _nothing_else(store: Store, own: Collection[str]) -> None:
    """Raise `errors.ConfigError` if there is a file that is not of the model, for to publish would remove it."""
    if strange := {entry.key for entry in _held(store)} - {*own, manifest.NAME, paths.TRAINING}:
        raise errors.ConfigError(
            f"--out: {store.url} holds {min(strange)}, which the merge did not write and would remove: move it, or "
            "give another place"
        )


def _taken(store: Store) -> str:
    """What is there instead."""
    claim = _claim(store)
    if "made_of" not in claim:
        other = next((entry.key for entry in _held(store) if entry.key != paths.TRAINING), paths.TRAINING)
        return f"holds something else already, such as {other}"
    what = f"the merge of {claim.get('adapter_url', 'another adapter')} into {claim.get('base', 'another base')}"
    if storage.sealed(store, ""):
        return f"holds something else already, {what}"
    return f"is taken by {what}, which has not ended (remove it if it never will)"


def _claim(store: Store) -> dict[str, Any]:
    """What is told of the model for which the store is taken, or that it holds; nothing if that cannot be read."""
    there = store.read(paths.TRAINING)
    with contextlib.suppress(ValueError):
        if there and isinstance(claim := json.loads(there.data), dict):
            return claim
    return {}


def _held(store: Store) -> list[storage.Entry]:
    return [entry for entry in store.list("") if not entry.key.startswith(paths.PROBE)]
