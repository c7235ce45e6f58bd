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
    """The team with its strategy, and what it needs besides GPUs."""

    team: Team
    scratch: int = 0
    """Bytes of the disk for checkpoints and the adapter; 0 if nobody counted them, as on a CPU."""
    offloaded: int = 0
    """Bytes of host memory on each machine, for what distributed.offload keeps there."""


def plan(settings: config.Config, base: Path, team: Team, memory: int | None) -> Plan:
    """Return how `team` will train the model whose config.json is in the folder `base`.

    `memory` is that of the smallest GPU. Raises `errors.ConfigError` if GPUs or host memory cannot
    hold it, and `errors.ModelError` if transformers does not know the model, or lora.targets does
    not fit it.
    """
    sizes = footprint.ask(settings, base)
    total = cluster.total_memory()
    chosen = strategy.place(settings, sizes, team, memory, total)
    if sizes is None:
        return Plan(chosen)
    need = strategy.estimate(settings, sizes)
    offloaded = count_offloaded(settings, need, chosen)
    check_host_memory(settings, need, offloaded, cluster.free_memory(), total)
    # the newest checkpoint and the one being written or the best one; the adapter as trained and as
    # published
    scratch = int(2 * (need.adapter + need.optimizer) + 2 * need.adapter)
    return Plan(chosen, scratch, offloaded)


def count_offloaded(settings: config.Config, need: Need, team: Team) -> int:
    """Return the bytes that distributed.offload keeps in the host memory of each machine."""
    if not settings.distributed.offload:
        return 0
    left = need.leave_on_gpus(team.strategy)
    base = (need.base - left.base) * team.processes / team.shards
    optimizer = (need.optimizer - left.optimizer) * team.processes / team.size
    return int(base + optimizer)


def check_host_memory(settings: config.Config, need: Need, offloaded: int, free: int, total: int) -> None:
    """Raise if host memory cannot hold what the first machine keeps there.

    That is the copies of the state that are on their way to the store, and the `offloaded` bytes.
    The processes themselves take more besides. Raises `errors.ConfigError` if it exceeds the
    `total` bytes of this machine, and `errors.HostMemoryError`, which is worth another start, if it
    only exceeds those that are `free` now.
    """
    state = need.adapter + need.optimizer
    copies = checkpoint.most_copies(keep_best=settings.train.keep_best)
    base = f" and {log.size(offloaded)} of distributed.offload" if offloaded else ""
    _check_memory(
        copies * state + offloaded,
        f"up to {copies} copies of the training state, of {log.size(state)} each, are in host memory on their way to "
        f"the store{base}",
        "use train.optimizer paged_adamw_8bit, or lower lora.r",
        free,
        total,
    )


def check_offloaded(offloaded: int, free: int, total: int) -> None:
    """Raise if the host memory of a machine other than the first cannot hold the `offloaded` bytes.

    Errors are those of `check_host_memory`.
    """
    _check_memory(
        offloaded,
        f"distributed.offload keeps {log.size(offloaded)} in the host memory of each machine",
        "or use more machines",
        free,
        total,
    )


def _check_memory(need: float, needs: str, smaller: str, free: int, total: int) -> None:
    if need <= free:
        return
    if need > total:
        raise errors.ConfigError(
            f"{needs}, but this machine or its container has {log.size(total)}: give the job more memory, {smaller}"
        )
    raise errors.HostMemoryError(
        f"{needs}, but this machine has {log.size(free)} of its {log.size(total)} free: end what else uses its "
        f"memory, {smaller}"
    )
