"""How many processes train, how they share the model, and what their environment tells the libraries."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from job import cluster, config, errors, inputs, launch

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
) -> dict[str, str]:
    return launch.environment(
        environ,
        team,
        gpus,
        address,
        kernel_cache=KERNELS,
        deterministic=deterministic,
    )


def test_the_environment_of_those_that_train_is_ours(tmp_path: Path) -> None:
    """Nothing of another launcher, as many threads as cores for each, and the GPUs that were given."""
    environ = {"HOME": str(tmp_path), "RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "GROUP_ID": "mine"}

    made = environment_of(environ, inputs.Team(processes=2), ("4", "5", "6"))

    assert made["CUDA_VISIBLE_DEVICES"] == "4,5"
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


def test_a_workspace_with_which_results_vary_is_refused(tiny_run: Callable[..., Path]) -> None:
    """In the first second: torch would refuse it at the first product of matrices, after loading the model."""
    settings = config.read(tiny_run())
    launch.check_environment(settings, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})

    with pytest.raises(errors.ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is :0:0.*:4096:8 or :16:8"):
        launch.check_environment(settings, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    free = config.read(tiny_run(train={"deterministic": False}))
    launch.check_environment(free, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})


def test_gloo_and_nccl_are_told_the_interface_that_the_others_reach() -> None:
    """The host's own name often means the loopback; NCCL takes a bare name for a prefix: lo would fit lo1 as well."""
    several = environment_of({}, inputs.Team(nodes=2), (), "127.0.0.1")

    assert several["GLOO_SOCKET_IFNAME"] == "lo"
    assert several["NCCL_SOCKET_IFNAME"] == "=lo"
    alone = environment_of({}, inputs.Team(processes=2), ("0", "1"))  # NCCL finds its way on one machine
    assert not alone.keys() & {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}


MODELS = {  # hidden size, width of the MLP, layers, words, width of keys and values
    "8B (Llama 3.1)": (4096, 14336, 32, 128256, 1024),
    "14B (Qwen2.5)": (5120, 13824, 48, 152064, 1024),
    "32B (Qwen2.5)": (5120, 27648, 64, 152064, 1024),
    "70B (Llama 3.1)": (8192, 28672, 80, 128256, 1024),
}


def headers(model: str, base: Path) -> Path:
    """The headers of a model; the weights themselves are not there."""
    hidden, wide, layers, words, keys = MODELS[model]
    shapes = {"model.embed_tokens.weight": [words, hidden], "lm_head.weight": [words, hidden]}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [hidden, hidden]
        shapes[f"model.layers.{layer}.self_attn.k_proj.weight"] = [keys, hidden]
        shapes[f"model.layers.{layer}.self_attn.v_proj.weight"] = [keys, hidden]
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = [hidden, hidden]
        for name in ("gate", "up", "down"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = [wide, hidden]
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    told = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": wide, "vocab_size": words}
    (base / "config.json").write_text(json.dumps(told))
    return base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return headers("8B (Llama 3.1)", tmp_path)


@pytest.mark.parametrize(
    ("quantization", "processes", "gib", "strategy"),
    [
        ("nf4", 1, 24, "ddp"), ("nf4", 4, 24, "ddp"), ("none", 4, 24, "ddp"), ("none", 4, 16, "fsdp"),
        ("nf4", 4, None, "ddp"), ("nf4", 4, 6, "fsdp"),
    ],
)  # fmt: skip
def test_the_strategy_follows_from_what_the_model_needs(
    quantization: str, processes: int, gib: int | None, strategy: str, base: Path, tiny_run: Callable[..., Path]
) -> None:
    """A copy on each GPU where it fits, for it is fastest; else the frozen base is shared out."""
    settings = config.read(tiny_run(model={"quantization": quantization}, train={"micro_batch_size": 1}))
    team = inputs.Team(processes=processes, strategy="auto")

    assert launch.choose(settings, base, team, gib and gib * GIB) == strategy


@pytest.mark.parametrize(
    ("more", "processes", "gib", "told"),
    [
        ({"model": {"quantization": "none"}}, 2, 6, r"16\.1 GB .* 2 GPUs of 6\.4 GB cannot hold it together"),
        ({"model": {"quantization": "none"}}, 1, 12, r"16\.1 GB .* ddp has all of it on each GPU of 12\.9 GB: use nf4"),
        ({"distributed": {"strategy": "ddp"}}, 4, 5, "ddp has all of it on each GPU"),
        (
            {"distributed": {"strategy": "zero3"}, "train": {"optimizer": "adamw_torch"}}, 4, 5,
            "zero3 shares quantized weights out only when all of them are on each GPU",
        ),
        ({"distributed": {"strategy": "fsdp"}, "lora": {"dora": True}}, 4, 5, r"lora\.dora needs all of it"),
    ],
)  # fmt: skip
def test_a_base_that_has_no_place_is_refused(
    more: dict[str, dict[str, object]], processes: int, gib: int, told: str, base: Path, tiny_run: Callable[..., Path]
) -> None:
    """With what it takes, what there is, and what to do."""
    settings = config.read(tiny_run(**more))

    with pytest.raises(errors.ConfigError, match=told):
        launch.choose(settings, base, inputs.Team(processes=processes), gib * GIB)


def test_what_the_user_chose_is_done(base: Path, tiny_run: Callable[..., Path]) -> None:
    """Although a copy on each GPU would be faster."""
    settings = config.read(tiny_run(distributed={"strategy": "fsdp"}))

    assert launch.choose(settings, base, inputs.Team(processes=2), 80 * GIB) == "fsdp"


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
        settings, base = config.check(tree, config.Places("the table", {})), headers(name, tmp_path)
        for (gpus, gib), cell in zip(columns, cells, strict=True):
            before = said().count("may be too much")
            try:
                made = launch.choose(settings, base, inputs.Team(processes=gpus, strategy="auto"), gib * GIB)
            except errors.ConfigError:
                made = "-"
            made += ", tight" if said().count("may be too much") > before else ""
            if made != cell:
                wrong.append(f"{model} on {gpus} x {gib} GB: {made}, not {cell}")

    assert not wrong
