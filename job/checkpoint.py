"""Which training steps are safe in the store: save, find the latest, restore, and forget the old ones.

A checkpoint is canonical: the adapter and the optimizer's state by parameter name, unsharded, in safetensors; the rest
in JSON. No pickle, and nothing that depends on how many GPUs wrote it.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from job import errors, log, manifest, paths, storage

ADAPTER, OPTIMIZER, STATE, TRAINER = "adapter.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json"
_SCHEDULE = ("last_epoch", "_step_count", "_last_lr", "base_lrs")
_NAME = re.compile(rf"^{paths.CHECKPOINTS}(\d+)-(\d+)/")

Tensors = dict[str, torch.Tensor]


class Stateful(Protocol):
    """What a learning-rate schedule and a loss scaler have in common."""

    def state_dict(self) -> dict[str, Any]:
        """Counters, as JSON values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the counters."""


@dataclass(frozen=True)
class Loop:
    """The parts of a training loop whose state is kept; `scaler` only when training in float16."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Stateful
    scaler: Stateful | None

    def names(self) -> dict[nn.Parameter, str]:
        """The name of every parameter that is trained."""
        return {parameter: name for name, parameter in self.network.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class State:
    """Everything that the steps after this one depend on, in host memory.

    `optimizer` holds tensors by ``parameter name/what``; `scalars` everything else, as JSON values; `trainer` is the
    loop's own state as JSON text.
    """

    step: int
    adapter: Tensors
    optimizer: Tensors
    scalars: Mapping[str, Any]
    trainer: str


@dataclass(frozen=True)
class Found:
    """A checkpoint on the local disk, verified."""

    step: int
    path: Path


class Checkpoints:
    """The checkpoints of one run, as one attempt sees them."""

    def __init__(
        self, store: storage.Store, attempt: int, inputs: Mapping[str, str], keep: int, scratch: Path,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._attempt, self._inputs, self._keep = store, attempt, dict(inputs), keep
        self._scratch, self._confirm = scratch, confirm

    def save(self, state: State, best_step: int | None) -> None:
        """Write, upload and seal `state`; afterwards remove what neither retention nor `best_step` keeps.

        Raises `errors.ModelError` if the adapter is not finite: such a state is never kept.
        """
        broken = [name for name, tensor in state.adapter.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise errors.ModelError(
                f"step {state.step}: the adapter holds NaN or Inf ({broken[0]} and {len(broken) - 1} "
                "more): lower train.learning_rate"
            )
        local = self._scratch / f"save-{state.step}"
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        save_file(state.adapter, local / ADAPTER)
        save_file(state.optimizer, local / OPTIMIZER)
        (local / STATE).write_text(
            json.dumps({"step": state.step, "inputs": self._inputs, **state.scalars}, indent=1), encoding="utf-8"
        )
        (local / TRAINER).write_text(state.trainer, encoding="utf-8")
        whole = storage.push(self._store, local, paths.checkpoint(state.step, self._attempt), self._confirm)
        shutil.rmtree(local)
        log.event(
            "checkpoint.saved",
            f"checkpoint at step {state.step} sealed ({log.size(whole.size)})",
            step=state.step,
            bytes=whole.size,
        )
        self._forget(best_step)

    def latest(self) -> Found | None:
        """The newest checkpoint that verifies, pulled to the local disk; older ones stand in for damaged ones.

        Raises `errors.ModelError` if it was made from another base model or other data.
        """
        for name, step in reversed(self._sealed()):
            found = self._fetch(name, step)
            if found:
                return found
        return None

    def at(self, step: int) -> Found:
        """The checkpoint of `step`; raises `errors.StoreError` if it is gone."""
        for name, number in reversed(self._sealed()):
            found = self._fetch(name, number) if number == step else None
            if found:
                return found
        raise errors.StoreError(
            f"the checkpoint of step {step}, the best one, is missing or damaged in "
            f"{self._store.url}/{paths.CHECKPOINTS}"
        )

    def _fetch(self, name: str, step: int) -> Found | None:
        target = self._scratch / name.removeprefix(paths.CHECKPOINTS).rstrip("/")
        try:
            whole = storage.fetch(self._store, name, target)
        except errors.DamagedError as e:
            log.warn("checkpoint.damaged", f"{self._store.url}/{name} is damaged and skipped: {e}", checkpoint=name)
            return None
        if whole is None:
            log.warn("checkpoint.incomplete", f"{self._store.url}/{name} is incomplete and skipped", checkpoint=name)
            return None
        self._same_inputs(target, name)
        return Found(step, target)

    def _same_inputs(self, directory: Path, name: str) -> None:
        theirs = json.loads((directory / STATE).read_text(encoding="utf-8"))["inputs"]
        for what, digest in self._inputs.items():
            if theirs.get(what) != digest:
                raise errors.ModelError(
                    f"{self._store.url}/{name} was trained with another {what} (digest {theirs.get(what)}, "
                    f"now {digest}): "
                    "put the old one back, or use another run.url"
                )

    def _sealed(self) -> list[tuple[str, int]]:
        """Names and steps of all checkpoints with a manifest, oldest first."""
        keys = [entry.key for entry in self._store.list(paths.CHECKPOINTS)]
        names = {
            m[0]: (int(m[1]), int(m[2]))
            for key in keys
            if key.endswith(f"/{manifest.NAME}") and (m := _NAME.match(key))
        }
        return [(name, step) for name, (step, _) in sorted(names.items(), key=lambda item: item[1])]

    def _forget(self, best_step: int | None) -> None:
        self._confirm()
        sealed = self._sealed()
        kept = {name for name, step in sealed[-self._keep :]} | {name for name, step in sealed if step == best_step}
        everything = {m[0]: int(m[2]) for entry in self._store.list(paths.CHECKPOINTS) if (m := _NAME.match(entry.key))}
        for name, attempt in everything.items():
            if name not in kept and attempt <= self._attempt:
                storage.remove(self._store, name)


def capture(step: int, loop: Loop, trainer: str) -> State:
    """Copy everything that changes while training to host memory."""
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, name in loop.names().items():
        for what, value in loop.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{what}"] = _on_host(value)
            else:
                numbers.setdefault(name, {})[what] = value
    schedule = loop.scheduler.state_dict()
    scalars = {
        "optimizer": numbers,
        "rates": [group["lr"] for group in loop.optimizer.param_groups],
        "scheduler": {what: schedule[what] for what in _SCHEDULE if what in schedule},
        "scaler": loop.scaler.state_dict() if loop.scaler else None,
    }
    adapter = {name: _on_host(parameter) for parameter, name in loop.names().items()}
    return State(step, adapter, tensors, scalars, trainer)


def restore_adapter(directory: Path, network: nn.Module) -> None:
    """Put the adapter of the checkpoint at `directory` into `network`, in float32 as it was.

    Raises `errors.ModelError` if names or shapes differ.
    """
    saved = load_file(directory / ADAPTER)
    ours = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    wrong = sorted(saved.keys() ^ ours.keys()) or sorted(n for n in saved if saved[n].shape != ours[n].shape)
    if wrong:
        raise errors.ModelError(
            f"{directory / ADAPTER} does not fit the model: {wrong[0]} and {len(wrong) - 1} more differ"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.data = saved[name].to(parameter.device)


def restore_optimizer(directory: Path, loop: Loop) -> None:
    """Put the optimizer, the schedule and the loss scale back to where they were."""
    scalars = json.loads((directory / STATE).read_text(encoding="utf-8"))
    names = loop.names()
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars["optimizer"].items()}
    for key, tensor in load_file(directory / OPTIMIZER).items():
        name, _, what = key.rpartition("/")
        by_name.setdefault(name, {})[what] = tensor
    ordered = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[names[parameter]] for index, parameter in enumerate(ordered) if names[parameter] in by_name}
    loop.optimizer.load_state_dict({"state": state, "param_groups": loop.optimizer.state_dict()["param_groups"]})
    for group, rate in zip(loop.optimizer.param_groups, scalars["rates"], strict=True):
        group["lr"] = rate  # a scheduler restores its own counters only
    loop.scheduler.load_state_dict({**loop.scheduler.state_dict(), **scalars["scheduler"]})
    if loop.scaler and scalars["scaler"]:
        loop.scaler.load_state_dict(scalars["scaler"])


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
