"""Which machine of how many this is, and where the first of them can be reached."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from job import errors, log

HERE = "127.0.0.1"
_PORT = 29400
_PORTS = 3000  # that Slurm's jobs are spread over, because two of them may share a machine; below those of clients
_LAST_PORT = 65535
_LOCAL = ("localhost", HERE, "::1")


@dataclass(frozen=True)
class Node:
    """One machine of the `count` that work on this run; `rank` counts them from 0.

    All of them reach the first one at the address `first`, where `port` is this job's.
    """

    rank: int = 0
    count: int = 1
    first: str = HERE
    port: int = _PORT
    told_by: str = "nobody"
    spare: bool = False
    """Another process of this machine does the work: this one has nothing to do."""
    ends: float | None = None
    """When the scheduler will end the job, in seconds of its clock since 1970; None if it does not say."""


def discover(environ: Mapping[str, str]) -> Node:
    """Read from the environment which of the cluster's machines this is; one that is alone if nothing says more.

    Understood are Slurm (`srun`, one task for each machine), torchrun, and torchrun's own variables ``PET_*``, which
    Kubeflow's trainer and the manifests under k8s/ set. Raises `errors.ConfigError` if they contradict each other.
    """
    node = _torchrun(environ) or _agreed(_pet(environ), _slurm(environ)) or _alone(environ)
    if "SLURM_JOB_END_TIME" in environ:
        node = dataclasses.replace(node, ends=float(_number(environ, "SLURM_JOB_END_TIME", "Slurm")))
    if not 0 <= node.rank < node.count:
        raise errors.ConfigError(f"{node.told_by} says that this is node {node.rank} of {node.count}: count from 0")
    if node.count == 1:
        return dataclasses.replace(node, first=HERE)
    if node.port > _LAST_PORT:
        raise errors.ConfigError(f"{node.told_by} gives port {node.port}: the last one is {_LAST_PORT}")
    if node.first in _LOCAL:
        raise errors.ConfigError(
            f"{node.told_by} names {node.first} as the first of {node.count} nodes: the others cannot reach it there; "
            "give its name or address in the cluster's network"
        )
    return node


def _agreed(pet: Node | None, slurm: Node | None) -> Node | None:
    if pet and slurm and (pet.rank, pet.count) != (slurm.rank, slurm.count):
        raise errors.ConfigError(
            f"PET_NNODES and its like say that this is node {pet.rank} of {pet.count}, and Slurm that it is "
            f"{slurm.rank} of {slurm.count}: unset the former"
        )
    return pet or slurm


def _torchrun(environ: Mapping[str, str]) -> Node | None:
    """One of the processes that somebody's torchrun started: the first of a machine starts the others itself."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    name = "torchrun"
    count = _number(environ, "GROUP_WORLD_SIZE", name)
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")  # of one: a shell, from which more was started
    if tasks not in ("1", str(count)):
        raise errors.ConfigError(
            f"srun started {tasks} tasks, and the torchrun of each says that it is one of {count}: give torchrun "
            "--nnodes and --rdzv-endpoint, or leave it out, the job starts a process for each GPU itself"
        )
    return Node(
        _number(environ, "GROUP_RANK", name),
        count,
        _named(environ, "MASTER_ADDR", name),
        _number(environ, "MASTER_PORT", name) + 1,  # its own is taken
        name,
        spare=_number(environ, "LOCAL_RANK", name) > 0,
    )


def _pet(environ: Mapping[str, str]) -> Node | None:
    if "PET_NNODES" not in environ:
        return None
    name = "PET_NNODES"
    count = _number(environ, name, name)
    if count == 1:
        return Node(told_by=name)
    rank, index = environ.get("PET_NODE_RANK"), environ.get("JOB_COMPLETION_INDEX")
    if not rank and not index:
        raise errors.ConfigError(f"PET_NNODES is {count}, but PET_NODE_RANK is not set: set it too, from 0 on")
    if rank and index and rank != index:
        raise errors.ConfigError(f"PET_NODE_RANK is {rank}, but JOB_COMPLETION_INDEX is {index}: leave the former out")
    port = _number(environ, "PET_MASTER_PORT", name) if "PET_MASTER_PORT" in environ else _PORT
    number = _number(environ, "PET_NODE_RANK" if rank else "JOB_COMPLETION_INDEX", name)
    return Node(number, count, _named(environ, "PET_MASTER_ADDR", name), port, name)


def _slurm(environ: Mapping[str, str]) -> Node | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    name = "Slurm"
    if "SLURM_STEP_NUM_TASKS" not in environ:  # in the batch shell, or in that of salloc
        count = _number(environ, "SLURM_JOB_NUM_NODES", name)
        if count > 1:
            raise errors.ConfigError(
                f"Slurm gave {count} nodes to this job, and it was started on one of them only: start it with "
                "`srun --ntasks-per-node=1`"
            )
        return Node(told_by=name)
    count, tasks = _number(environ, "SLURM_STEP_NUM_NODES", name), _number(environ, "SLURM_STEP_NUM_TASKS", name)
    if tasks != count:
        raise errors.ConfigError(
            f"srun started {tasks} tasks on {count} node(s): use --ntasks-per-node=1, the job starts a process for "
            "each GPU itself"
        )
    given = int(environ.get("SLURM_JOB_NUM_NODES") or count)
    if given > count:
        log.warn("cluster.idle", f"Slurm gave {given} nodes to this job, and this step of it has {count}")
    first = _first(_named(environ, "SLURM_STEP_NODELIST", name))
    port = _PORT + _number(environ, "SLURM_JOB_ID", name) % _PORTS
    return Node(_number(environ, "SLURM_NODEID", name), count, first, port, name)


def _alone(environ: Mapping[str, str]) -> Node:
    if environ.get("JOB_COMPLETION_INDEX", "0") != "0":
        raise errors.ConfigError(
            f"this is index {environ['JOB_COMPLETION_INDEX']} of a Kubernetes Job, and nothing says how many there "
            "are: set PET_NNODES and PET_MASTER_ADDR as k8s/ does"
        )
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "1") != "1":
            raise errors.ConfigError(
                f"{name} is {environ[name]}, but neither torchrun nor Slurm started this process: start the job once "
                "on each machine, with PET_NNODES, PET_NODE_RANK and PET_MASTER_ADDR set"
            )
    return Node()


def _number(environ: Mapping[str, str], name: str, told_by: str) -> int:
    text = _named(environ, name, told_by)
    if not text.isdecimal():
        raise errors.ConfigError(f"{name} is {text!r}, not a number of this job's fixed set of machines")
    return int(text)


def _named(environ: Mapping[str, str], name: str, told_by: str) -> str:
    if not environ.get(name):
        raise errors.ConfigError(f"{told_by} is in the environment, but {name} is not: set it too")
    return environ[name]


def _first(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``gpu[07-09,12],login1`` begins with gpu07."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name[0] if name else nodes)
