"""What training will take of GPUs, host memory and disk, known before the model is downloaded."""

from dataclasses import dataclass
from pathlib import Path

from job import checkpoint, cluster, config, errors, log
from job.inputs import Team
from job.launch import strategy
from job.launch.strategy import Need
from job.model import footprint


@dataclass(frozen=True)
class Plan:
    """The team with its strategy, and what it needs beside GPUs."""

    team: Team
    scratch: int = 0
    """Bytes of the disk for checkpoints and the adapter; 0 if nobody counted them, as on a CPU."""
    offloaded: int = 0
    """Bytes in the host memory of each machine with distributed.offload: of base and optimizer."""
    on_gpu: int = 0
    """Bytes that each GPU needs whatever the examples are; 0 if nobody counted them."""


def plan(settings: config.Config, base: Path, team: Team, memory: int | None) -> Plan:
    """Return how `team` will train the model whose config.json is in the folder `base`.

    `memory` is that of the smallest GPU. Raises `errors.ConfigError` if GPUs or host memory cannot
    hold it, and `errors.ModelError` if transformers does not know the model, or lora.targets does
    not fit it.
    """
    sizes = footprint.ask(settings, base)
    if sizes is None:
        return Plan(strategy.place(settings, sizes, team, memory))
    need = strategy.estimate(settings, sizes)
    free, total = cluster.free_memory(), cluster.total_memory()
    room = free - _count_copies(settings) * (need.adapter + need.optimizer)
    chosen = strategy.place(settings, sizes, team, memory, room)
    check_host_memory(settings, need, chosen, free, total)
    # the newest checkpoint and the one being written or the best one; the adapter as trained and as
    # published
    scratch = int(2 * (need.adapter + need.optimizer) + 2 * need.adapter)
    offloaded = int(_count_offloaded(need, chosen) + need.zero_offload / chosen.nodes)
    return Plan(chosen, scratch, offloaded, int(strategy.count_certain(need, chosen)))


def check_host_memory(
    settings: config.Config,
    need: Need,
    team: Team,
    free: int,
    total: int,
) -> None:
    """Raise `errors.ConfigError` if the host memory of the first machine is too small.

    It has `total` bytes, `free` of them now; if only those are too few, `errors.HostMemoryError` is
    raised, which is worth another start. Counted are the copies of the state on their way to the
    store, and with distributed.offload this machine's share of the base and of ZeRO's optimizer.
    The processes themselves take more besides.
    """
    state, copies = need.adapter + need.optimizer, _count_copies(settings)
    offloaded = _count_offloaded(need, team)
    optimizer = need.zero_offload / team.nodes
    needs = (
        f"up to {copies} copies of the training state, of {log.size(state)} each, are in host "
        "memory on their way to the store"
    )
    if offloaded:
        needs += f", and {log.size(offloaded)} of the base (distributed.offload)"
    if optimizer:
        needs += f", and {log.size(optimizer)} of the optimizer (distributed.offload)"
    size = copies * state + offloaded + optimizer
    remedies = _list_remedies(settings, team, mostly_base=offloaded > copies * state)
    _check_room(size, needs, remedies, free, total)


def check_offloaded(offloaded: int, free: int, total: int) -> None:
    """Raise as `check_host_memory`, on a machine that has only its share of base and optimizer."""
    needs = f"{log.size(offloaded)} of the model are in host memory (distributed.offload)"
    _check_room(offloaded, needs, ["use machines with as much memory as the first"], free, total)


def check_gpu_memory(on_gpu: int, memory: int | None) -> None:
    """Raise `errors.ConfigError` if this machine's GPUs are too small for what the first one chose.

    `on_gpu` are the bytes that each GPU needs whatever the examples are, `memory` those of the
    smallest GPU here, None if the driver does not report them.
    """
    if memory is not None and on_gpu > memory:
        raise errors.ConfigError(
            f"each GPU needs {log.size(on_gpu)} for the base and the adapter, which those of the "
            f"first machine have, but one of this machine has {log.size(memory)}: use machines "
            "with equal GPUs, or start the run with this one as the first"
        )


def _count_copies(settings: config.Config) -> int:
    """Return how many copies of the training state are in host memory at most."""
    return checkpoint.most_copies(keep_best=settings.train.keep_best)


def _count_offloaded(need: Need, team: Team) -> float:
    """Return the bytes of the base that the processes of one machine keep in host memory."""
    return need.base * team.processes / team.shards if need.offload else 0.0


def _list_remedies(settings: config.Config, team: Team, *, mostly_base: bool) -> list[str]:
    """Return what lowers the need for host memory, of the base or else of the training state."""
    remedies = []
    if mostly_base:
        if settings.model.quantization not in ("nf4", "fp4"):
            remedies.append("set model.quantization to nf4")
        if team.shards == team.size:  # else each machine holds a whole copy
            remedies.append("use more machines")
        return remedies
    zero = team.strategy.startswith("zero")  # which takes no other optimizer
    if settings.train.optimizer != "paged_adamw_8bit" and not zero:
        remedies.append("use train.optimizer paged_adamw_8bit")
    return [*remedies, "lower lora.r"]


def _check_room(size: float, needs: str, remedies: list[str], free: int, total: int) -> None:
    """Raise if `size` bytes exceed the `total` or `free` ones here; `needs` says what they are."""
    too_small = f"{needs}, but this machine"
    if size > total:
        too_small += f" or its container has {log.size(total)}: "
        raise errors.ConfigError(too_small + ", or ".join(["give the job more memory", *remedies]))
    if size > free:
        too_small += f" has {log.size(free)} of its {log.size(total)} free: "
        first = "end what else uses its memory"
        raise errors.HostMemoryError(too_small + ", or ".join([first, *remedies]))
