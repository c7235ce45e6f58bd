"""The same state under DeepSpeed's ZeRO, which spreads it over the processes: gathered by parameter name, and put back.

All of it is collective: every process of the team does it at the same step.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import distributed

from job.checkpoint.state import Loop, Tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, the only optimizer that is allowed under ZeRO


class ZeroLoop(Loop):
    """A loop whose `optimizer` is DeepSpeed's; torch's own, inside it, knows flat pieces without names."""

    collective: ClassVar[bool] = True

    def adapter(self) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter, name in self.names.items():
            yield name, safe_get_full_fp32_param(parameter)

    def moments(self) -> Iterator[tuple[str, str, Any]]:
        steps = [state["step"] for state in self._inside.state.values() if "step" in state]
        if not steps:
            return
        for parameter, name in self.names.items():
            yield name, "step", steps[0].detach().clone()
            for what in _MOMENTS:
                yield name, what, safe_get_full_optimizer_state(parameter, what).to("cpu")

    def weigh(self, adapter: Tensors) -> None:
        """DeepSpeed's copy in float32 was made from one that it had rounded."""
        for parameter, name in self.names.items():
            _set(parameter, adapter[name], None)

    def put_back(self, moments: Mapping[str, Mapping[str, Any]]) -> None:
        step = next(iter(moments.values()))["step"]
        for piece in self._pieces:
            zeros = {what: torch.zeros_like(piece) for what in _MOMENTS}
            self._inside.state[piece] = {"step": step.clone(), **zeros}
        if hasattr(
            self.optimizer, "_lazy_init_hp_params_optimizer_state"
        ):  # ZeRO-1 and 2 would do it at the first step
            self.optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - there is no other way
        for parameter, name in self.names.items():
            for what in _MOMENTS if name in moments else ():  # none of one that never had a gradient
                _set(parameter, moments[name][what], what)

    @property
    def _pieces(self) -> list[torch.Tensor]:
        """What the optimizer inside updates: this process's share of all parameters, laid end to end."""
        wrapper: Any = self.optimizer
        third = hasattr(wrapper, "fp32_partitioned_groups_flat")
        return list(wrapper.fp32_partitioned_groups_flat if third else wrapper.single_partition_of_fp32_groups)

    @property
    def _inside(self) -> torch.optim.Optimizer:
        inside: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]  # DeepSpeed's wrapper
        return inside


def _set(parameter: torch.nn.Parameter, whole: torch.Tensor, what: str | None) -> None:
    """Set `what` of the optimizer's state, or the weight in float32, to `whole`; each process keeps its share."""
    value = whole.to(parameter.device)
    if not hasattr(parameter, "ds_tensor"):
        if what is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, what)
        return
    # ZeRO-3 fills the last share up to the size of the others, and its own way to set the whole forgets that.
    size, flat = parameter.ds_tensor.numel(), value.flatten()
    filled = torch.nn.functional.pad(flat, (0, size * distributed.get_world_size() - flat.numel()))
    share = filled.narrow(0, size * distributed.get_rank(), size)
    if what is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, what)
