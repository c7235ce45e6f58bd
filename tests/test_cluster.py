"""Which machine of how many this is, from the environments that schedulers really make."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from job import cluster, errors
from job.cluster import hardware

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_JOB_END_TIME": "1790000000",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "RANK": "4",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29500",
}
INDEXED = {
    "JOB_COMPLETION_INDEX": "1",
    "PET_NNODES": "2",
    "PET_MASTER_ADDR": "finetune-0.finetune",
    "PET_MASTER_PORT": "29500",
}
JOBSET = {**INDEXED, "PET_MASTER_ADDR": "finetune-node-0-0.finetune"}
KUBEFLOW = {**INDEXED, "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto"}
OURS = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "gpu07"}


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_the_memory_of_gpus_is_reported_in_their_order(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """By number or UUID; where the driver does not report it, a warning says what follows."""
    free = {"handle 0": 10, "handle 1": 20, "handle of GPU-7": 30}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: f"handle {number}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: f"handle of {uuid}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-of-{handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=99, free=free[handle]))

    assert cluster.free_gpu_memory(("1", "0")) == (20, 10)
    assert cluster.free_gpu_memory(("GPU-7",)) == (30,)
    assert cluster.free_gpu_memory(()) is None
    assert cluster.free_gpu_memory(("5",)) is None
    assert cluster.memory(("1", "0")) == 99
    assert cluster.memory(()) is None
    assert cluster.memory(("5",)) is None
    free_of, total_of = said().splitlines()
    unknown = "the driver does not report the memory of GPU 5 (list index out of range): "
    assert free_of == f"{unknown}the result is verified without a GPU"
    assert total_of == f"{unknown}distributed.strategy auto assumes that the model fits"


def test_a_machine_is_alone_when_nothing_says_more() -> None:
    """A person's shell, a spot VM, or a plain Kubernetes Job."""
    assert cluster.discover({"HOME": "/root", "WORLD_SIZE": "1"}) == cluster.Node()


@pytest.mark.parametrize(
    ("environ", "first", "port"),
    [
        pytest.param(SLURM, "gpu07", 31111, id="srun"),
        pytest.param(TORCHRUN, "gpu07", 29501, id="torchrun"),
        pytest.param(INDEXED, "finetune-0.finetune", 29500, id="indexed job"),
        pytest.param(JOBSET, "finetune-node-0-0.finetune", 29500, id="jobset"),
        pytest.param(KUBEFLOW, "finetune-0.finetune", 29500, id="kubeflow"),
        pytest.param(OURS, "gpu07", 29400, id="by hand"),
        pytest.param({**SLURM, **TORCHRUN}, "gpu07", 29501, id="torchrun by srun"),
        pytest.param({**SLURM, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "1"}, "gpu07", 29501, id="torchrun by hand"),
    ],
)
def test_the_second_of_two_machines_knows_its_place(environ: dict[str, str], first: str, port: int) -> None:
    """Rank, number of machines, and where the first can be reached."""
    node = cluster.discover(environ)

    assert (node.rank, node.count, node.first, node.port) == (1, 2, first, port)


@pytest.mark.parametrize("more", [{}, TORCHRUN, OURS], ids=["srun", "torchrun", "by hand"])
def test_slurm_says_when_the_time_is_up(more: dict[str, str]) -> None:
    """So that the job can stop before its limit, whatever signal the site sends, and whoever tells it its place."""
    assert cluster.discover({**SLURM, **more}).ends == 1790000000


def test_a_step_that_leaves_machines_idle_is_said(said: Callable[[], str]) -> None:
    """As in a shell that salloc opened on the first of several."""
    node = cluster.discover({**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"})

    assert (node.count, node.first) == (1, "127.0.0.1")
    assert "Slurm gave 2 nodes to this job, and this step of it has 1" in said()


def test_one_machine_under_slurm_needs_no_srun() -> None:
    """A batch script may start the job directly."""
    environ = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}

    assert cluster.discover(environ).count == 1


def test_of_several_processes_that_torchrun_started_one_does_the_work() -> None:
    """It starts a process for each GPU itself; the others end at once."""
    assert [cluster.discover({**TORCHRUN, "LOCAL_RANK": str(rank)}).spare for rank in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],login", "gpu07"), ("r[1,3]c[2-4],x", "r1c2")],
)
def test_the_first_of_slurms_hosts_is_found(nodes: str, first: str) -> None:
    """Slurm abbreviates the names of its hosts."""
    assert cluster.discover({**SLURM, "SLURM_STEP_NODELIST": nodes}).first == first


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        pytest.param(without(SLURM, "SLURM_STEP_NUM_TASKS"), "srun --ntasks-per-node=1", id="no srun"),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, "8 tasks on 2 node", id="a task for each GPU"),
        pytest.param({**SLURM, **OURS, "PET_NODE_RANK": "0"}, "node 0 of 2, and Slurm", id="two that differ"),
        pytest.param({**SLURM, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "srun started 2 tasks", id="torchruns apart"),
        pytest.param({**KUBEFLOW, "PET_NODE_RANK": "0"}, "but JOB_COMPLETION_INDEX is 1", id="two ranks"),
        pytest.param({**OURS, "PET_NODE_RANK": "2"}, "node 2 of 2: count from 0", id="counted from 1"),
        pytest.param(without(OURS, "PET_NODE_RANK"), "PET_NODE_RANK is not set", id="no rank"),
        pytest.param({**OURS, "PET_MASTER_PORT": "70000"}, "port 70000", id="no such port"),
        pytest.param({**KUBEFLOW, "PET_NNODES": "1:4"}, "'1:4'", id="elastic"),
        pytest.param({**KUBEFLOW, "PET_MASTER_ADDR": "127.0.0.1"}, "cannot reach it there", id="loopback"),
        pytest.param(without(KUBEFLOW, "PET_MASTER_ADDR"), "PET_MASTER_ADDR is not", id="no address"),
        pytest.param({"JOB_COMPLETION_INDEX": "1"}, "set PET_NNODES", id="index of unknown"),
        pytest.param({"WORLD_SIZE": "8", "RANK": "3"}, "WORLD_SIZE is 8", id="somebody else's"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4", id="mpirun"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ: dict[str, str], told: str) -> None:
    """With what was seen, and for good: the next start would see the same."""
    with pytest.raises(errors.ConfigError, match=told):
        cluster.discover(environ)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ("0", "1")), ("0,1", ("0", "1")), ("1", ("1",)), ("", ()), ("-1", ()),
        ("GPU-1f,GPU-2a", ("GPU-1f", "GPU-2a")), ("MIG-1,MIG-2", ("MIG-1",)), ("5", ("5",)),
    ],
)  # fmt: skip
def test_the_gpus_are_those_that_the_scheduler_shows(visible: str | None, found: tuple[str, ...]) -> None:
    """What CUDA_VISIBLE_DEVICES leaves of two; of MIG slices one."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert cluster.gpus(environ, ["0", "1"]) == found
    assert cluster.gpus(environ, []) == ()


@pytest.mark.parametrize("visible", [None, "0", "0,1", "MIG-a"])
def test_of_gpus_that_are_cut_one_slice_counts(visible: str | None) -> None:
    """By its own name, so that its memory is taken for its own, and not the whole card's."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert cluster.gpus(environ, ["MIG-a", "MIG-b"]) == ("MIG-a",)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, ()),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, ()),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, None),
    ],
)
def test_a_driver_that_does_not_work_is_not_taken_for_none(
    error: int, found: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the job would train on the CPU for days, and say nothing."""

    def init() -> None:
        raise pynvml.NVMLError(error)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    if found is not None:
        assert cluster.gpus({}) == found
        return
    with pytest.raises(errors.JobError, match="the NVIDIA driver of this machine does not work") as caught:
        cluster.gpus({})

    assert caught.value.status == 1
    assert cluster.gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_the_driver_tells_as_many_gpus_as_torch_sees() -> None:
    """None on a machine without; and their memory without loading CUDA."""
    seen = torch.cuda.device_count()
    found = cluster.gpus(os.environ)

    assert len(found) == seen
    assert (cluster.memory(found) is not None) == (seen > 0)


@pytest.mark.parametrize("unused", [None, 0, 600, 10**18])
def test_free_memory_is_what_the_container_leaves(unused: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than the machine has free."""
    available = psutil.virtual_memory().available
    monkeypatch.setattr(hardware, "unused_memory", lambda: unused)

    expected = unused if unused is not None and unused < available else available
    assert cluster.free_memory() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("50000 100000", 1), ("9900000 100000", None)])
def test_the_cores_are_those_that_the_container_may_use(tmp_path: Path, quota: str, cores: int | None) -> None:
    """Never more than the process is bound to."""
    (tmp_path / "cpu.max").write_text(quota)

    assert cluster.cpus(tmp_path / "cpu.max") == (cores or cluster.cpus(tmp_path / "none"))
