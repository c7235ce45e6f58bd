"""Everything that the next training steps depend on: in host memory, in files, and back in a training loop.

A checkpoint is canonical: the adapter and the optimizer's state by parameter name, unsharded, in safetensors; the rest
in JSON. No pickle, and nothing that depends on how many GPUs wrote it.
"""

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from job import errors

ADAPTER, OPTIMIZER, STATE, TRAINER = "adapter.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json"
_SCHEDULE = ("last_epoch", "_step_count", "_last_lr", "base_lrs")

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

    @functools.cached_property
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


def write(state: State, inputs: Mapping[str, str], directory: Path) -> None:
    """Write `state`, with the digests of what it was trained from, as the files of a checkpoint.

    Raises `errors.ModelError` if the adapter is not finite: such a state is never kept.
    """
    broken = [name for name, tensor in state.adapter.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise errors.ModelError(
            f"step {state.step}: the adapter holds NaN or Inf ({broken[0]} and {len(broken) - 1} "
            "more): lower train.learning_rate"
        )
    save_file(state.adapter, directory / ADAPTER)
    save_file(_apart(state.optimizer), directory / OPTIMIZER)
    told = {"step": state.step, "inputs": dict(inputs), **state.scalars}
    (directory / STATE).write_text(json.dumps(told, indent=1), encoding="utf-8")
    (directory / TRAINER).write_text(state.trainer, encoding="utf-8")


def inputs(directory: Path) -> dict[str, str]:
    """The digests of what the checkpoint at `directory` was trained from."""
    told: dict[str, str] = json.loads((directory / STATE).read_text(encoding="utf-8"))["inputs"]
    return told


def capture(step: int, loop: Loop, trainer: str, unlogged: Mapping[str, Any], spare: State | None = None) -> State:
    """Copy everything that changes while training to host memory.

    `unlogged` is what has been measured since the last line of the log, as JSON values, which the function of that
    name gives back. The memory of `spare`, a state that is not needed any more, is used again: the pages of a new one
    take longer to come than the copy.
    """
    used = {**spare.optimizer, **spare.adapter} if spare else {}
    tensors: Tensors = {}
    copied: dict[int, torch.Tensor] = {}  # by the object: 8-bit optimizers share tables between all parameters
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, name in loop.names.items():
        for what, value in loop.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                key = f"{name}/{what}"
                if id(value) not in copied:
                    copied[id(value)] = _on_host(value, used.get(key))
                tensors[key] = copied[id(value)]
            else:
                numbers.setdefault(name, {})[what] = value
    schedule = loop.scheduler.state_dict()
    scalars = {
        "optimizer": numbers,
        "rates": [group["lr"] for group in loop.optimizer.param_groups],
        "scheduler": {what: schedule[what] for what in _SCHEDULE if what in schedule},
        "scaler": loop.scaler.state_dict() if loop.scaler else None,
        "unlogged": copy.deepcopy(dict(unlogged)),
    }
    adapter = {name: _on_host(parameter, used.get(name)) for parameter, name in loop.names.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies were only begun
    return State(step, adapter, tensors, scalars, trainer)


def unlogged(directory: Path) -> dict[str, Any]:
    """What had been measured since the last line of the log when the checkpoint at `directory` was made."""
    told: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8")).get("unlogged", {})
    return told


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
    names = loop.names
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


def _apart(tensors: Tensors) -> Tensors:
    """The same with memory of its own for each, as safetensors wants it."""
    found: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _on_host(tensor: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
        room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return room.copy_(tensor.detach(), non_blocking=True)
