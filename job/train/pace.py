"""How long this process's own share of the forward passes takes, without what it waits for the others."""

import time
from typing import Any

import torch
from torch import nn


class Pace:
    """Measures from now on; on a GPU by its own clock, without making anything wait."""

    def __init__(self, network: nn.Module) -> None:
        self._gpu = torch.cuda.is_available()
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []
        network.register_forward_pre_hook(self._start)
        network.register_forward_hook(self._stop)

    def taken(self) -> float:
        """Seconds since this was asked last."""
        passes, self._passes = self._passes, []
        if not self._gpu:
            return float(sum(end - begun for begun, end in passes))
        torch.cuda.synchronize()
        return float(sum(begun.elapsed_time(end) for begun, end in passes)) / 1000

    def _start(self, _network: nn.Module, _inputs: object) -> None:
        self._begun = self._now()

    def _stop(self, _network: nn.Module, _inputs: object, _outputs: object) -> None:
        self._passes.append((self._begun, self._now()))

    def _now(self) -> Any:
        if not self._gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return event
