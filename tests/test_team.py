"""How many processes train, how they share the model, and what their environment tells the libraries."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import shapes
from conftest import ROOT

from job import cluster, config, errors, inputs, launch
from job.model import measure
from job.model.footprint import Footprint

GIB = 2**30
ZERO = {"distributed": {"strategy": "zero2"}, "train": {"optimizer": "adamw_torch"}}


@pytest.mark.parametrize(("gpus", "nodes", "size"), [(0, 1, 1), (1, 1, 1), (4, 1, 4), (4, 2, 8)])
def test_every_gpu_of_every_node_gets_a_process(
    gpus: int, nodes: int, size: int, tiny_run: Callable[..., Path]
) -> None:
    """And a machine without one, one process on its CPU."""
    settings = config.read(tiny_run(train={"global_batch_size": 16}))

    assert launch.team(settings, cluster.Node(0, nodes, "n1"), gpus).size == size


def test_more_processes_than_gpus_are_refused(tiny_run: Callable[..., Path]) -> None:
    """Two of them would share one, and run out of memory or of time."""
    settings = config.read(tiny_run(distributed={"processes_per_node": 2}))

    with pytest.raises(errors.ConfigError, match="processes_per_node is 2, but this node has 1 GPU: use auto"):
        launch.team(settings, cluster.Node(), 1)


def test_a_global_batch_that_cannot_be_shared_is_refused(tiny_run: Callable[..., Path]) -> None:
    """In the first second, with what would fit, instead of a result that depends on the number of GPUs."""
    settings = config.read(tiny_run(train={"global_batch_size": 8, "micro_batch_size": 2}))

    with pytest.raises(errors.ConfigError, match=r"x 3 processes .* use a multiple of 3 as global_batch_size"):
        launch.team(settings, cluster.Node(), 3)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"distributed": {"strategy": "zero2"}, "train": {"optimizer": "adamw_8bit"}}, "use adamw_torch, or strategy"),
        ({"distributed": {"strategy": "fsdp"}, "model": {"quantization": "int8"}}, "cannot share out int8 weights"),
        ({**ZERO, "model": {"compute_dtype": "float16"}}, "keeps a loss scale"),
        ({**ZERO, "distributed": {"strategy": "zero2", "timeout_minutes": 45}}, "wait 30 minutes for each other"),
        ({"distributed": {"offload": True}}, "offload needs strategy fsdp, zero2 or zero3, not auto"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_alternative(
    wanted: dict[str, dict[str, object]], told: str, tiny_run: Callable[..., Path]
) -> None:
    """Before anything is loaded."""
    with pytest.raises(errors.ConfigError, match=told):
        config.read(tiny_run(**wanted))


KERNELS = Path("/cache/finetune-job/triton")


def environment_of(
    environ: dict[str, str],
    team: inputs.Team,
    gpus: tuple[str, ...],
    address: str | None = None,
    *,
    deterministic: bool = True,
    offload: bool = False,
) -> dict[str, str]:
    return launch.environment(
        environ,
        team,
        gpus,
        address,
        kernel_cache=KERNELS,
        deterministic=deterministic,
        offload=offload,
    )


def test_the_environment_of_those_that_train_is_ours(tmp_path: Path) -> None:
    """Nothing of another launcher, as many threads as cores for each, and the GPUs that were given."""
    environ = {"HOME": str(tmp_path), "RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "GROUP_ID": "mine"}

    made = environment_of(environ, inputs.Team(processes=2), ("4", "5", "6"))

    assert made["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert made["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # or CUDA would count the fastest first
    assert made["OMP_NUM_THREADS"] == str(max(1, cluster.cpus() // 2))
    assert made["GROUP_ID"] == "mine"
    assert made["TRITON_CACHE_DIR"] == str(KERNELS)  # one for all of them
    assert not made.keys() & {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"}


def test_what_the_user_has_set_is_left_alone() -> None:
    """Who knows his cluster better than we do."""
    own = {
        "OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "eth",
        "PYTORCH_ALLOC_CONF": "backend:native", "TRITON_CACHE_DIR": "/kernels",
    }  # fmt: skip

    assert own.items() <= environment_of(own, inputs.Team(processes=2), ("0", "1"), "127.0.0.1").items()
    older = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}  # torch would prefer ours under the new name
    assert "PYTORCH_ALLOC_CONF" not in environment_of(older, inputs.Team(), ("0",))


@pytest.mark.parametrize(
    ("own", "settings"),
    [
        ({}, "expandable_segments:True,pinned_max_round_threshold_mb:1"),
        (
            {"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": "x:1"},
            "backend:native,pinned_max_round_threshold_mb:1",
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            "max_split_size_mb:512,pinned_max_round_threshold_mb:1",
        ),
        (
            {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:64"},
            "pinned_max_round_threshold_mb:64",
        ),
    ],
)
def test_an_offloaded_base_takes_no_more_host_memory_than_its_size(own: dict[str, str], settings: str) -> None:
    """Torch would round each pinned tensor up to a power of two; the user's own settings are kept."""
    made = environment_of(own, inputs.Team(), ("0",), offload=True)

    assert made["PYTORCH_ALLOC_CONF"] == settings


CUDA_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_NVLS_ENABLE": "0",
}


def test_cuda_starts_deterministic_unless_the_config_says_otherwise() -> None:
    """The libraries read these when they start: later is too late. Without a GPU there is nothing to set."""
    team = inputs.Team(processes=2)

    assert CUDA_DETERMINISTIC.items() <= environment_of({}, team, ("0", "1")).items()
    assert not CUDA_DETERMINISTIC.keys() & environment_of({}, team, ("0", "1"), deterministic=False).keys()
    assert not CUDA_DETERMINISTIC.keys() & environment_of({}, team, ()).keys()
    assert environment_of({"NCCL_NVLS_ENABLE": "1"}, team, ("0", "1"))["NCCL_NVLS_ENABLE"] == "1"


def test_a_workspace_with_which_results_vary_is_refused(tiny_run: Callable[..., Path], said: Callable[[], str]) -> None:
    """In the first second: torch would refuse it at the first product of matrices, after loading the model.

    What only weakens the promise is a warning.
    """
    settings = config.read(tiny_run())
    launch.check_environment(settings, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})

    with pytest.raises(errors.ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is :0:0.*:4096:8 or :16:8"):
        launch.check_environment(settings, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    launch.check_environment(settings, {"NCCL_NVLS_ENABLE": "1"})
    assert "NCCL_NVLS_ENABLE is 1: with it a resumed run may end with other bits" in said()
    free = config.read(tiny_run(train={"deterministic": False}))
    launch.check_environment(free, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})


def test_gloo_and_nccl_are_told_the_interface_that_the_others_reach() -> None:
    """The host's own name often means the loopback; NCCL takes a bare name for a prefix: lo would fit lo1 as well."""
    several = environment_of({}, inputs.Team(nodes=2), (), "127.0.0.1")

    assert several["GLOO_SOCKET_IFNAME"] == "lo"
    assert several["NCCL_SOCKET_IFNAME"] == "=lo"
    alone = environment_of({}, inputs.Team(processes=2), ("0", "1"))  # NCCL finds its way on one machine
    assert not alone.keys() & {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}


MODELS = {
    "8B (Llama 3.1)": "Llama-3.1-8B-Instruct", "14B (Qwen2.5)": "Qwen2.5-14B-Instruct",
    "32B (Qwen2.5)": "Qwen2.5-32B-Instruct", "70B (Llama 3.1)": "Llama-3.1-70B-Instruct",
    "30B mixture (Qwen3-30B-A3B)": "Qwen3-30B-A3B",
}  # fmt: skip


def sizes(settings: config.Config, folder: Path, model: str = "8B (Llama 3.1)") -> Footprint:
    """What the model consists of, by its config.json; no weights are there."""
    return measure.measure(shapes.outline(MODELS[model], folder), settings)


@pytest.mark.parametrize(
    ("quantization", "processes", "gib", "strategy"),
    [
        ("nf4", 1, 24, "ddp"), ("nf4", 4, 24, "ddp"), ("none", 4, 24, "ddp"), ("none", 4, 16, "fsdp"),
        ("nf4", 4, None, "ddp"), ("nf4", 4, 6, "fsdp"),
    ],
)  # fmt: skip
def test_the_strategy_follows_from_what_the_model_needs(
    quantization: str, processes: int, gib: int | None, strategy: str, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """A copy on each GPU where it fits, for it is fastest; else the frozen base is shared out."""
    settings = config.read(tiny_run(model={"quantization": quantization}, train={"micro_batch_size": 1}))
    team = inputs.Team(processes=processes, strategy="auto")

    assert launch.choose(settings, sizes(settings, tmp_path), team, gib and gib * GIB) == strategy


@pytest.mark.parametrize(
    ("more", "processes", "gib", "told"),
    [
        ({"model": {"quantization": "none"}}, 2, 6, r"16\.4 GB .* 2 GPUs of 6\.4 GB cannot hold it .* 1\d\.\d GB"),
        ({"model": {"quantization": "none"}}, 1, 12, r"16\.4 GB .* ddp has all of it on each GPU of 12\.9 GB: use nf4"),
        ({"distributed": {"strategy": "ddp"}}, 4, 5, "ddp has all of it on each GPU"),
        (
            {"distributed": {"strategy": "zero3"}, "train": {"optimizer": "adamw_torch"}}, 4, 5,
            "zero3 shards quantized weights only when all of them are on each GPU",
        ),
        ({"distributed": {"strategy": "fsdp"}, "lora": {"dora": True}}, 4, 5, r"lora\.dora needs all of it"),
    ],
)  # fmt: skip
def test_a_base_that_has_no_place_is_refused(
    more: dict[str, dict[str, object]],
    processes: int,
    gib: int,
    told: str,
    tmp_path: Path,
    tiny_run: Callable[..., Path],
) -> None:
    """With what it takes, what there is, and what to do."""
    settings = config.read(tiny_run(**more))

    with pytest.raises(errors.ConfigError, match=told):
        launch.choose(settings, sizes(settings, tmp_path), inputs.Team(processes=processes), gib * GIB)


def test_what_the_user_chose_is_done(tmp_path: Path, tiny_run: Callable[..., Path]) -> None:
    """Although a copy on each GPU would be faster."""
    settings = config.read(tiny_run(distributed={"strategy": "fsdp"}))

    assert launch.choose(settings, sizes(settings, tmp_path), inputs.Team(processes=2), 80 * GIB) == "fsdp"


def test_the_table_in_the_docs_is_what_the_job_does(tmp_path: Path, said: Callable[[], str]) -> None:
    """Every cell of it: the strategy, whether it is tight, and what is refused."""
    lines = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    begin = next(number for number, row in enumerate(rows) if row[0] == "model")
    columns = [tuple(map(int, re.findall(r"\d+", title))) for title in rows[begin][1:]]
    wrong = []

    for model, *cells in rows[begin + 2 : begin + 2 + 2 * len(MODELS)]:
        name, _, quantization = model.rpartition(", ")
        tree = {
            "run": {"name": "table", "url": "file:///run"}, "data": {"train": ["file:///train.jsonl"]},
            "model": {"base": "file:///base", "quantization": quantization}, "train": {"micro_batch_size": 1},
        }  # fmt: skip
        settings = config.check(tree, config.Places("the table", {}))
        footprint = sizes(settings, tmp_path, name)
        for (gpus, gib), cell in zip(columns, cells, strict=True):
            before = said().count("may be too much")
            try:
                made = launch.choose(settings, footprint, inputs.Team(processes=gpus, strategy="auto"), gib * GIB)
            except errors.ConfigError:
                made = "-"
            made += ", tight" if said().count("may be too much") > before else ""
            if made != cell:
                wrong.append(f"{model} on {gpus} x {gib} GB: {made}, not {cell}")

    assert not wrong
