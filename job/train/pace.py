"""How long this process's own share of the forward passes takes, without its waits for others."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

_PENDING = 4096  # passes whose times are not added up yet: on a GPU each holds two events


class Pace:
    """Measures from now on; on a GPU by its own clock, without making anything wait.

    Under FSDP2 the hooks of a sharded layer gather its weights before its forward pass, in which a
    fast process waits for a slow one, and free them after it. Ours are put between: what they
    measure begins when the weights are there. To be made after the model was sharded. Not for
    ZeRO-3, which gathers inside the layers.
    """

    def __init__(self, network: nn.Module) -> None:
        self._gpu = torch.cuda.is_available()
        self._begun: dict[nn.Module, Any] = {}
        self._passes: list[tuple[Any, Any]] = []
        self._seconds = 0.0
        for module in _computing(network):
            module.register_forward_pre_hook(self._start)  # FSDP2's is prepended: it comes first
            module.register_forward_hook(self._stop, prepend=True)

    def taken(self) -> float:
        """Return the seconds since this was asked last."""
        passes, self._passes = self._passes, []
        seconds, self._seconds = self._seconds + self._sum(passes), 0.0
        return seconds

    def _start(self, module: nn.Module, _inputs: object) -> None:
        # a pass that is broken off leaves its beginning: checkpointing does so when it has
        # recomputed what it needs
        self._begun[module] = self._now()

    def _stop(self, module: nn.Module, _inputs: object, _outputs: object) -> None:
        self._passes.append((self._begun.pop(module), self._now()))
        if len(self._passes) > _PENDING:  # the older half is long done: nothing waits for it
            older, self._passes = self._passes[: _PENDING // 2], self._passes[_PENDING // 2 :]
            self._seconds += self._sum(older)

    def _now(self) -> Any:
        if not self._gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return event

    def _sum(self, passes: Sequence[tuple[Any, Any]]) -> float:
        if not self._gpu or not passes:
            return float(sum(end - begun for begun, end in passes))
        passes[-1][1].synchronize()
        return float(sum(begun.elapsed_time(end) for begun, end in passes)) / 1000


def _computing(network: nn.Module) -> list[nn.Module]:
    """Return the modules that wait for nobody in a forward pass: sharded layers, else the whole."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    return [module for module in sharded if not _contains_sharded(module)] or [network]


def _contains_sharded(module: nn.Module) -> bool:
    return any(isinstance(inner, FSDPModule) for inner in module.modules() if inner is not module)
