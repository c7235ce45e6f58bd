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
    """The team with its strategy, and what it writes."""

    team: Team
    scratch: int = 0
    """Bytes of the disk for checkpoints and the adapter; 0 if nobody counted them, as on a CPU."""


def plan(settings: config.Config, base: Path, team: Team, memory: int | None) -> Plan:
    """Return how `team` will train the model whose config.json is in the folder `base`.

    `memory` is that of the smallest GPU. Raises `errors.ConfigError` if GPUs or host memory cannot
    hold it, and `errors.ModelError` if transformers does not know the model, or lora.targets does
    not fit it.
    """
    sizes = footprint.ask(settings, base)
    chosen = strategy.place(settings, sizes, team, memory)
    if sizes is None:
        return Plan(chosen)
    need = strategy.estimate(settings, sizes)
    check_host_memory(settings, need, chosen, cluster.free_memory(), cluster.total_memory())
    # the newest checkpoint and the one being written or the best one; the adapter as trained and as
    # published
    return Plan(chosen, int(2 * (need.adapter + need.optimizer) + 2 * need.adapter))


def check_host_memory(settings: config.Config, need: Need, team: Team, free: int, total: int) -> None:
    """Raise `errors.ConfigError` if what training keeps in host memory exceeds the `total` bytes of this machine.

    Raises `errors.HostMemoryError`, which is worth another start, if it only exceeds those that are `free` now.

    That is the copies of the state that are on their way to the store (on the first machine), and
    with distributed.offload this machine's share of the base. The processes themselves take more
    besides.
    """
    state = need.adapter + need.optimizer
    copies = checkpoint.most_copies(keep_best=settings.train.keep_best)
    offloaded = need.base * team.processes / team.shards if settings.distributed.offload else 0.0
    if copies * state + offloaded <= free:
        return
    base = f" and {log.size(offloaded)} of the base (distributed.offload)" if offloaded else ""
    needs = (
        f"up to {copies} copies of the training state, of {log.size(state)} each, are in host memory on their way to "
        f"the store{base}"
    )
    smaller = "use train.optimizer paged_adamw_8bit, or lower lora.r"
    if copies * state + offloaded > total:
        raise errors.ConfigError(
            f"{needs}, but this machine or its container has {log.size(total)}: give the job more memory, {smaller}"
        )
    raise errors.HostMemoryError(
        f"{needs}, but this machine has {log.size(free)} of its {log.size(total)} free: end what else uses its "
        f"memory, {smaller}"
    )
