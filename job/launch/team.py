"""How many processes train, in which way they share the model, and what their environment tells the libraries."""

from collections.abc import Mapping

from job import cluster, errors
from job.cluster import Node
from job.config import Config
from job.inputs import Team

_OF_A_LAUNCHER = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


def team(settings: Config, here: Node, gpus: int) -> Team:
    """The processes that will train, one for each GPU if the config does not say otherwise; the strategy as given.

    Raises `errors.ConfigError` if the machine cannot run so many, or the global batch cannot be shared among them.
    """
    wanted = settings.distributed.processes_per_node
    processes = max(1, gpus) if wanted == "auto" else wanted
    if gpus and processes > gpus:
        raise errors.ConfigError(
            f"distributed.processes_per_node is {processes}, but this node has {gpus} GPU{'s' if gpus > 1 else ''}: "
            "use auto"
        )
    found = Team(here.count, here.rank, processes, settings.distributed.strategy, here.first, gpus=gpus > 0)
    try:
        settings.train.accumulation(found.size)
    except ValueError as e:
        raise errors.ConfigError(f"train: {e} (or another number of GPUs)") from e
    return found


def environment(environ: Mapping[str, str], team: Team, gpus: tuple[str, ...], address: str | None) -> dict[str, str]:
    """The environment of the processes of `team` on this machine, whose `address` the others know.

    What the user has set himself is left alone.
    """
    ours = {n: v for n, v in environ.items() if n not in _OF_A_LAUNCHER and not n.startswith("TORCHELASTIC_")}
    chosen = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # we say what there is to say
    if gpus:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: team.processes])
        ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the driver counts, from which the numbers are
        if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name
            chosen["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # examples differ in length: less lies waste
    if team.processes > 1:
        chosen["OMP_NUM_THREADS"] = str(max(1, cluster.cpus() // team.processes))
    if address and (interface := cluster.interface(address)):
        chosen["GLOO_SOCKET_IFNAME"] = interface  # it would take the one of the host's name, often the loopback
    if team.strategy.startswith("zero"):
        ours["ACCELERATE_USE_DEEPSPEED"] = "true"
    return {**chosen, **ours}
