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
    """Bytes of the base in the host memory of each machine, with distributed.offload."""


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
    return Plan(chosen, scratch, int(_count_offloaded(need, chosen)))


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
    store, and with distributed.offload this machine's share of the base. The processes themselves
    take more besides.
    """
    state, copies = need.adapter + need.optimizer, _count_copies(settings)
    offloaded = _count_offloaded(need, team)
    base = f" and {log.size(offloaded)} of the base (distributed.offload)" if offloaded else ""
    needs = (
        f"up to {copies} copies of the training state, of {log.size(state)} each, are in host "
        f"memory on their way to the store{base}"
    )
    smaller = ", use train.optimizer paged_adamw_8bit, or lower lora.r"
    _check_room(copies * state + offloaded, needs, smaller, free, total)


def check_offloaded(offloaded: int, free: int, total: int) -> None:
    """Raise as `check_host_memory`, on a machine that has only `offloaded` bytes of the base."""
    needs = f"{log.size(offloaded)} of the base are in host memory (distributed.offload)"
    _check_room(offloaded, needs, ", or use more machines", free, total)


def _count_copies(settings: config.Config) -> int:
    """Return how many copies of the training state are in host memory at most."""
    return checkpoint.most_copies(keep_best=settings.train.keep_best)


def _count_offloaded(need: Need, team: Team) -> float:
    """Return the bytes of the base that the processes of one machine keep in host memory."""
    return need.base * team.processes / team.shards if need.offload else 0.0


def _check_room(size: float, needs: str, smaller: str, free: int, total: int) -> None:
    """Raise if `size` bytes exceed the `total` or `free` ones here; `needs` says what they are."""
    too_small = f"{needs}, but this machine"
    if size > total:
        too_small += f" or its container has {log.size(total)}: give the job more memory"
        raise errors.ConfigError(too_small + smaller)
    if size > free:
        too_small += f" has {log.size(free)} of its {log.size(total)} free"
        too_small += ": end what else uses its memory"
        raise errors.HostMemoryError(too_small + smaller)
