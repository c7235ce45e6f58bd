"""Everything that the next training steps depend on: in host memory, in files, and back in a training loop.

A checkpoint is canonical: the adapter and the optimizer's state by parameter name, unsharded, in safetensors; the rest
in JSON. No pickle, and nothing that depends on how many GPUs wrote it.
"""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from job import errors
from job.checkpoint.kept import STATE

ADAPTER, OPTIMIZER, TRAINER = "adapter.safetensors", "optimizer.safetensors", "trainer_state.json"
_PAGED = {"state1", "state2"}  # bitsandbytes' names of an optimizer's moments
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
    collective: ClassVar[bool] = False
    """Whether all processes must capture the state at the same time."""

    @functools.cached_property
    def names(self) -> dict[nn.Parameter, str]:
        """The name of every parameter that is trained."""
        return {parameter: name for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def adapter(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter that is trained, whole, with its name."""
        for parameter, name in self.names.items():
            yield name, parameter

    def moments(self) -> Iterator[tuple[str, str, Any]]:
        """The optimizer's state, whole: the parameter's name, what it is of it, and a tensor or a JSON value."""
        for parameter, name in self.names.items():
            for what, value in self.optimizer.state.get(parameter, {}).items():
                yield name, what, value

    def weigh(self, adapter: Tensors) -> None:
        """Give the optimizer the adapter where it keeps a copy of its own; this one works on the network's."""

    def put_back(self, moments: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the optimizer the state that `moments` told, by the parameter's name and by what it is of it."""
        ordered = [self.names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {index: dict(moments[name]) for index, name in enumerate(ordered) if name in moments}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if getattr(self.optimizer, "is_paged", False):
            self._page()

    def _page(self) -> None:
        """Move the state to memory that the GPU may page out, as the optimizer itself does only for a fresh one."""
        optimizer: Any = self.optimizer
        for parameter, values in optimizer.state.items():
            for what in _PAGED.intersection(values):
                paged = optimizer.get_state_buffer(parameter, dtype=values[what].dtype)
                values[what] = paged.copy_(values[what])


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

    def write(self, inputs: Mapping[str, str], directory: Path) -> None:
        """Write it, with the digests of what it was trained from, as the files of a checkpoint.

        Raises `errors.ModelError` if the adapter is not finite: such a state is never kept.
        """
        broken = [name for name, tensor in self.adapter.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise errors.ModelError(
                f"step {self.step}: the adapter holds NaN or Inf ({broken[0]} and {len(broken) - 1} "
                "more): lower train.learning_rate"
            )
        save_file(self.adapter, directory / ADAPTER)
        save_file(_apart(self.optimizer), directory / OPTIMIZER)
        told = {"step": self.step, "inputs": dict(inputs), **self.scalars}
        (directory / STATE).write_text(json.dumps(told, indent=1), encoding="utf-8")
        (directory / TRAINER).write_text(self.trainer, encoding="utf-8")


def capture(step: int, loop: Loop, trainer: str, unlogged: Mapping[str, Any], spare: State | None = None) -> State:
    """Copy everything that changes while training to host memory.

    `unlogged` is what has been measured since the last line of the log, as JSON values, which the function of that
    name gives back. The memory of `spare`, a state that is not needed any more, is used again: the pages of a new one
    take longer to come than the copy.
    """
    used = {**spare.optimizer, **spare.adapter} if spare else {}
    tensors: Tensors = {}
    # By the object, which is kept alive here: 8-bit optimizers share tables between all parameters.
    copied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, what, value in loop.moments():
        if isinstance(value, torch.Tensor):
            key = f"{name}/{what}"
            if id(value) not in copied:
                copied[id(value)] = (value, _on_host(value, used.get(key)))
            tensors[key] = copied[id(value)][1]
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
    adapter = {name: _on_host(parameter, used.get(name)) for name, parameter in loop.adapter()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies were only begun
    return State(step, adapter, tensors, scalars, trainer)


def unlogged(directory: Path) -> dict[str, Any]:
    """What had been measured since the last line of the log when the checkpoint at `directory` was made."""
    told: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8")).get("unlogged", {})
    return told


def adapter(directory: Path) -> Tensors:
    """The adapter of the checkpoint at `directory`."""
    found: Tensors = load_file(directory / ADAPTER)
    return found


def restore_adapter(directory: Path, network: nn.Module) -> None:
    """Put the adapter of the checkpoint at `directory` into `network`, in float32 as it was.

    Raises `errors.ModelError` if names or shapes differ.
    """
    saved = adapter(directory)
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
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars["optimizer"].items()}
    for key, tensor in load_file(directory / OPTIMIZER).items():
        name, _, what = key.rpartition("/")
        by_name.setdefault(name, {})[what] = tensor
    loop.weigh(adapter(directory))
    loop.put_back(by_name)
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
