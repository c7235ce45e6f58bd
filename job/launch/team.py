"""How many processes train, in which way they share the model, and what their environment tells the libraries."""

from collections.abc import Mapping
from pathlib import Path

from job import cluster, errors, log
from job.cluster import Node
from job.config import Config
from job.inputs import Team
from job.launch import kernels

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


# What CUDA's libraries read when they start, so it cannot be set later. cuBLAS: its documentation, section "Results
# reproducibility"; flash-attention: transformers' modeling_flash_attention_utils.py; NCCL: sums made in the switch
# (NVLS) are in no fixed order, those of rings and trees are (Megatron-LM demands the same in its deterministic mode).
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_NVLS_ENABLE": "0",
}
_EXPANDABLE = "expandable_segments:True"  # less fragmentation by examples of different lengths
_PINNED = "pinned_max_round_threshold_mb"
_REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS; torch refuses any other in deterministic mode


def environment(
    environ: Mapping[str, str],
    team: Team,
    gpus: tuple[str, ...],
    address: str | None,
    *,
    kernel_cache: Path,
    deterministic: bool,
    offload: bool,
) -> dict[str, str]:
    """Return the environment of the processes of `team` on this machine, whose `address` the others know.

    All of them keep what Triton compiles in `kernel_cache`: its own default is the user's home,
    which may be read-only. What the user has set is left alone.
    """
    ours = {n: v for n, v in environ.items() if n not in _OF_A_LAUNCHER and not n.startswith("TORCHELASTIC_")}
    chosen = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # we say what there is to say
    ours["TRITON_CACHE_DIR"] = str(kernels.cache_folder(environ, kernel_cache))
    if gpus:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: team.processes])
        ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the driver counts, from which the numbers are
        if "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name
            chosen["PYTORCH_ALLOC_CONF"] = _EXPANDABLE
    if gpus and offload:
        ours["PYTORCH_ALLOC_CONF"] = _bound_pinned_memory(environ)
    if gpus and deterministic:
        chosen |= _DETERMINISTIC
    if team.processes > 1:
        chosen["OMP_NUM_THREADS"] = str(max(1, cluster.cpus() // team.processes))
    if address and (interface := cluster.interface(address)):
        chosen["GLOO_SOCKET_IFNAME"] = interface  # it would take the one of the host's name, often the loopback
        # NCCL would take any that is up, such as the USB link to a server's management controller.
        # "=": this very name. InfiniBand and RoCE need it only to find each other; their devices
        # are chosen by NCCL_IB_HCA.
        chosen["NCCL_SOCKET_IFNAME"] = f"={interface}"
    if team.strategy.startswith("zero"):
        ours["ACCELERATE_USE_DEEPSPEED"] = "true"
    return {**chosen, **ours}


def _bound_pinned_memory(environ: Mapping[str, str]) -> str:
    """Return the allocator's settings with which pinned host memory takes what was asked for.

    torch rounds each pinned tensor up to a power of two otherwise: an offloaded base then takes 1.1
    to 1.9 times its size (ATen/core/CachingHostAllocator.h). The user's settings are kept.
    """
    older = environ.get("PYTORCH_CUDA_ALLOC_CONF", _EXPANDABLE)
    settings = environ.get("PYTORCH_ALLOC_CONF", older)
    return settings if _PINNED in settings else f"{settings},{_PINNED}:1"


def check_environment(settings: Config, environ: Mapping[str, str]) -> None:
    """Raise `errors.ConfigError` if a variable of the user makes `train.deterministic` impossible.

    Warn if one only weakens it.
    """
    if not settings.train.deterministic:
        return
    for name in ("FLASH_ATTENTION_DETERMINISTIC", "NCCL_NVLS_ENABLE"):
        if environ.get(name, _DETERMINISTIC[name]) != _DETERMINISTIC[name]:
            log.warn(
                "launch.nondeterministic",
                f"{name} is {environ[name]}: with it a resumed run may end with other bits although "
                "train.deterministic is true. Unset it to keep that promise",
            )
    workspace = environ.get("CUBLAS_WORKSPACE_CONFIG", _REPRODUCIBLE_WORKSPACES[0])
    if workspace not in _REPRODUCIBLE_WORKSPACES:
        raise errors.ConfigError(
            f"CUBLAS_WORKSPACE_CONFIG is {workspace}, and train.deterministic needs :4096:8 or :16:8. Unset the "
            "variable, or set train.deterministic to false"
        )
