"""The checkpoints of a run in the store: save one, find the newest that is whole, forget the old ones."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job import errors, log, manifest, paths, storage

if TYPE_CHECKING:
    from job.checkpoint.state import State

STATE = "state.json"  # the file that names the inputs


@dataclass(frozen=True)
class Found:
    """The checkpoint `name` on the local disk, verified."""

    step: int
    path: Path
    name: str


class Checkpoints:
    """The checkpoints of one run, as one attempt sees them."""

    def __init__(
        self, store: storage.Store, attempt: int, inputs: Mapping[str, str], keep: int, scratch: Path,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._attempt, self._inputs, self._keep = store, attempt, dict(inputs), keep
        self._scratch, self._confirm = scratch, confirm
        self._began = int(inputs.get("began", 0))  # older attempts are of the run before a restart

    def save(self, state: "State", best_step: int | None) -> None:
        """Write, upload and seal `state`; afterwards remove what neither retention nor `best_step` keeps.

        Raises `errors.ModelError` if the adapter is not finite: such a state is never kept.
        """
        local = self._scratch / f"save-{state.step}"
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        state.write(self._inputs, local)
        whole = storage.push(self._store, local, paths.checkpoint(state.step, self._attempt), self._confirm)
        log.event(
            "checkpoint.saved",
            f"checkpoint at step {state.step} sealed ({log.size(whole.size)})",
            step=state.step,
            bytes=whole.size,
        )
        try:
            self._keep_here(local, paths.checkpoint(state.step, self._attempt), whole)
            self.forget(state.step, best_step)
        except (errors.StoreError, OSError) as e:  # what was to be kept is kept
            log.warn("checkpoint.untidy", f"after the checkpoint at step {state.step}: {e}; the next one tidies up")

    def forget(self, step: int, best_step: int | None) -> None:
        """Remove what neither retention nor `best_step` keeps. What is newer than `step` was unreadable: it stays."""
        self._confirm()
        sealed = self._sealed()
        newest = [name for name, number in sealed if number <= step][-self._keep :]
        kept = {*newest, *(name for name, number in sealed if number == best_step or number > step)}
        everything = {at for entry in self._store.list(paths.CHECKPOINTS) if (at := paths.parsed(entry.key))}
        for at in sorted(everything):
            if at.name not in kept and at.attempt <= self._attempt:
                storage.remove(self._store, at.name)

    def latest(self) -> Found | None:
        """The newest checkpoint that verifies, pulled to the local disk; older ones stand in for damaged ones.

        Raises `errors.ModelError` if it was made from another base model or other data.
        """
        for name, step in reversed(self._sealed()):
            found = self._fetch(name, step)
            if found:
                return found
        return None

    def named(self, name: str) -> Found:
        """The checkpoint that another machine of this attempt found; raises `errors.StoreError` if it is gone."""
        at = paths.parsed(name)
        target = self._here(name)
        if at is None or storage.fetch(self._store, name, target) is None:
            raise errors.StoreError(f"{self._store.url}/{name} is not whole although it was a moment ago; start again")
        self._only_here(target)
        return Found(at.step, target, name)

    def at(self, step: int) -> Found:
        """The checkpoint of `step`; raises `errors.PermanentError` if it is gone."""
        for name, number in reversed(self._sealed()):
            found = self._fetch(name, number) if number == step else None
            if found:
                return found
        if any(number == step for _, number in self._sealed()):
            raise errors.StoreError(f"the checkpoint of step {step}, the best one, arrives damaged; start again")
        raise errors.PermanentError(
            f"the checkpoint of step {step}, which had the best eval loss, is missing or damaged in "
            f"{self._store.url}/{paths.CHECKPOINTS}: put it back, or train anew with `--restart`"
        )

    def _fetch(self, name: str, step: int) -> Found | None:
        target = self._here(name)
        try:
            whole = storage.fetch(self._store, name, target)
        except errors.CorruptError as e:
            self._quarantine(name, f"is damaged: {e}")
            return None
        except errors.DamagedError as e:
            log.warn("checkpoint.damaged", f"{self._store.url}/{name} arrives damaged and is skipped: {e}")
            return None
        if whole is None:
            self._quarantine(name, "is incomplete")
            return None
        self._same_inputs(target, name)
        return Found(step, target, name)

    def _here(self, name: str) -> Path:
        return self._scratch.parent / paths.CHECKPOINTS / name.removeprefix(paths.CHECKPOINTS).rstrip("/")

    def _keep_here(self, local: Path, name: str, whole: manifest.Manifest) -> None:
        """Keep the newest checkpoint on this disk as if it had been fetched: a restart here need not wait for it."""
        (local / manifest.NAME).write_bytes(whole.to_json())
        with storage.alone(self._here(name)) as place:
            place.fill(local)
        self._only_here(self._here(name))

    @staticmethod
    def _only_here(newest: Path) -> None:
        for older in newest.parent.iterdir():
            if older != newest and older.is_dir():
                shutil.rmtree(older)

    def _quarantine(self, name: str, why: str) -> None:
        """Never believe in the checkpoint again. What is there stays until retention removes it."""
        self._confirm()
        renamed = ""
        if there := self._store.read(name + manifest.NAME):
            self._store.put(f"{name}quarantined-{manifest.NAME}", there.data)
            self._store.delete(name + manifest.NAME)
            renamed = f" (its manifest is now called quarantined-{manifest.NAME})"
        log.warn(
            "checkpoint.quarantined",
            f"{self._store.url}/{name} {why}. It is skipped and quarantined{renamed}",
            checkpoint=name,
        )

    def _same_inputs(self, directory: Path, name: str) -> None:
        theirs: dict[str, str] = json.loads((directory / STATE).read_text(encoding="utf-8"))["inputs"]
        for what, digest in self._inputs.items():
            if theirs.get(what, "0" if what == "began" else None) != digest:
                raise errors.ModelError(
                    f"{self._store.url}/{name} was trained with another {what} (digest {theirs.get(what)}, "
                    f"now {digest}): "
                    "put the old one back, or use another run.url"
                )

    def _sealed(self) -> list[tuple[str, int]]:
        """Names and steps of all checkpoints with a manifest, oldest first."""
        keys = (entry.key for entry in self._store.list(paths.CHECKPOINTS))
        found = {at for key in keys if key.endswith(f"/{manifest.NAME}") and (at := paths.parsed(key))}
        return [(at.name, at.step) for at in sorted(found) if at.attempt >= self._began]
