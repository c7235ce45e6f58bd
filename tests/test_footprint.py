"""How large a model is while it is trained, from its config.json: beside real weights, and a simulation."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import shapes
import torch
from conftest import ROOT
from test_families import random_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from job import checkpoint, config, errors, inputs, launch
from job.launch import planning, strategy
from job.model import footprint, load_size, lora, measure, parts, weights
from job.model.footprint import Footprint

GIB = 2**30
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4, no double_quant": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "none": {},
}
FAMILIES = ["llama", "qwen3_moe", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "gpt2"]


def sized(model: str, folder: Path, /, **sections: dict[str, Any]) -> tuple[config.Config, Footprint]:
    read = shapes.settings(**sections)
    return read, measure.measure(shapes.outline(model, folder), read)


def loaded_bytes(network: PreTrainedModel) -> int:
    """Add up what a model that stock transformers loaded has in memory, the constants of its packed weights too."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    for module in network.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            held = [state.absmax, state.code]
            if state.nested:
                held += [state.offset, state.state2.absmax, state.state2.code]
            total += sum(tensor.numel() * tensor.element_size() for tensor in held)
        if isinstance(module, bnb.nn.Linear8bitLt):
            total += module.weight.SCB.numel() * module.weight.SCB.element_size()
    return total


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((family, "nf4") for family in FAMILIES),
        *(("qwen3_moe", way) for way in WAYS if way != "nf4"),
    ],
)
def test_a_base_is_as_large_as_stock_transformers_and_bitsandbytes_make_it(
    family: str, way: str, tmp_path: Path
) -> None:
    """Within 2 % of what they load on the CPU; experts, which they do not quantize, above all."""
    base = random_model(family, tmp_path / "base")
    quantization, _, single = way.partition(", ")
    read = shapes.settings(
        model={
            "quantization": quantization,
            "double_quant": not single,
            "compute_dtype": "bfloat16",
        }
    )
    how = BitsAndBytesConfig(**WAYS[way]) if WAYS[way] else None
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how)

    sizes = measure.measure(base, read)

    assert sizes.base + sizes.constants == pytest.approx(loaded_bytes(network), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("targets", ["auto", "attention", ["q_proj", "v_proj"]], ids=str)
def test_an_adapter_is_as_large_as_the_one_that_is_trained(
    family: str, targets: str | list[str], tmp_path: Path
) -> None:
    """Only layers that really get one count: no experts, and what lora.targets names."""
    base = random_model(family, tmp_path / "base")
    read = shapes.settings(model={"compute_dtype": "float32"}, lora={"targets": targets, "r": 8, "dora": True})
    network = lora.adapted(weights.for_training(base, read.model), read.lora)

    sizes = measure.measure(base, read)

    assert sizes.trained == network.get_nb_trainable_parameters()[0]


def test_what_stays_in_16_bits_is_logged_when_a_model_is_loaded(tmp_path: Path, said: Callable[[], str]) -> None:
    """With the number of weights, and the kinds of modules that they are in."""
    base = random_model("qwen3_moe", tmp_path / "base")
    read = shapes.settings(model={"compute_dtype": "float32"})

    lora.adapted(weights.for_training(base, read.model), read.lora)

    sizes = measure.measure(base, read)
    assert footprint.describe_unquantized(sizes.weights, sizes.unquantized) in said()
    experts = 2 * 4 * 3 * 64 * 32  # layers, experts, matrices of each
    assert sizes.unquantized["experts.gate_up_proj"] + sizes.unquantized["experts.down_proj"] == experts


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("Qwen3-30B-A3B", 59.7), ("Mixtral-8x7B-Instruct-v0.1", 91.4), ("Qwen2-57B-A14B-Instruct", 104.4),
        ("gpt-oss-20b", 40.9), ("Llama-3.1-70B-Instruct", 39.5),
    ],
)  # fmt: skip
def test_experts_count_with_16_bits(model: str, gigabytes: float, tmp_path: Path) -> None:
    """Two bytes for each weight but those of linear layers, which have 4 bits, and constants of 0.127 (QLoRA)."""
    _, sizes = sized(model, tmp_path)
    linear = sizes.weights - sum(sizes.unquantized.values())
    by_hand = linear * (4 + 0.127) / 8 + 2 * sum(sizes.unquantized.values())

    assert (sizes.base + sizes.constants) / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert sizes.base + sizes.constants == pytest.approx(by_hand, rel=0.001)


@pytest.mark.parametrize("row", shapes.TABLE_B, ids=lambda row: f"{row.model} {row.micro}x{row.length} {row.how}")
def test_the_estimate_is_that_of_the_simulation(row: shapes.Row, tmp_path: Path) -> None:
    """Weights within 1 %, activations within 15 %, all of it within 3 %."""
    read, sizes = sized(
        row.model, tmp_path, lora={"r": row.r}, data={"max_length": row.length},
        model={"quantization": "none" if row.how == "none" else "nf4"},
        train={"micro_batch_size": row.micro, "method": "dpo" if row.how == "dpo" else "sft"},
    )  # fmt: skip

    need = strategy.estimate(read, sizes)

    assert (need.base + need.constants + need.adapter) / 1e9 == pytest.approx(row.weights, rel=0.01)
    assert need.gradients / 1e9 == pytest.approx(row.gradients, abs=0.006)
    assert need.optimizer / 1e9 == pytest.approx(row.optimizer, abs=0.006)
    assert need.activations / 1e9 == pytest.approx(row.activations, rel=0.15)
    assert need.on_each(1) / GIB == pytest.approx(row.total, rel=0.03)


class Layer(NamedTuple):
    """A micro batch, and how many GB one more layer was simulated to add to its peak."""

    model: str
    length: int
    gigabytes: float
    dropout: float = 0.05
    checkpointing: bool = False


# Simulated as table B, micro batches of two.
LAYERS = [
    Layer("Qwen2.5-7B-Instruct", 1024, 0.685), Layer("Llama-2-7b-chat-hf", 512, 0.283),
    Layer("Llama-3.1-8B-Instruct", 1024, 0.633), Layer("Qwen2.5-7B-Instruct", 1024, 0.461, dropout=0.0),
    Layer("Qwen2.5-7B-Instruct", 1024, 0.0147, checkpointing=True),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_adds_what_the_simulation_says(layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input with gradient checkpointing; without, all that its backward needs."""
    peaks = []
    for layers in (23, 25):
        monkeypatch.setitem(shapes.MODELS, "deep", {**shapes.MODELS[layer.model], "num_hidden_layers": layers})
        train = {"micro_batch_size": 2, "gradient_checkpointing": layer.checkpointing}
        lora = {"dropout": layer.dropout}
        read, sizes = sized("deep", tmp_path, data={"max_length": layer.length}, lora=lora, train=train)
        need = strategy.estimate(read, sizes)
        peaks.append(need.activations + need.gradients)

    assert (peaks[1] - peaks[0]) / 2e9 == pytest.approx(layer.gigabytes, rel=0.15)


PRESETS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "smoke")
# GiB that NVML reports for the smallest card of a size: T4, A10G, A100, L40S, H100.
REPORTED = {16: 15.0, 24: 22.49, 40: 39.59, 48: 44.99, 80: 79.65}
STATED = re.compile(r"(\d+\.\d) GiB of (?:each card's )?(\d+),? by our own estimate; not measured on a GPU")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_what_is_estimated(path: Path, tmp_path: Path) -> None:
    """The smallest card sold with that much memory has room, and a narrow fit says what to change.

    Everybody reads that it was not measured.
    """
    text = path.read_text(encoding="utf-8")
    read = config.read(path)
    header = " ".join(line.removeprefix("#").strip() for line in text.split("\nrun:")[0].splitlines())
    gpus = 4 if "four GPUs" in header else 1
    team = inputs.Team(processes=gpus, gpus=True)

    sizes = measure.measure(shapes.outline(read.model.base.rpartition("/")[2], tmp_path), read)

    stated = STATED.search(header)
    assert stated, header
    chosen = launch.choose(read, sizes, team, int(stated[2]) * GIB)
    need = strategy.estimate(read, sizes).on_each(gpus if chosen == "fsdp" else 1, gpus)
    assert float(stated[1]) == pytest.approx(need / GIB, abs=0.06)
    reported = REPORTED[int(stated[2])] * GIB
    assert launch.choose(read, sizes, team, int(reported)) == chosen
    assert need < reported * 0.95
    assert (need > reported * 0.9) == ("If it does not fit, set" in header)
    if shards := re.search(r"shards take (\d+\.\d) GiB", header):
        each = strategy.estimate(read, sizes).on_each(gpus, gpus)
        assert float(shards[1]) == pytest.approx(each / GIB, abs=0.06)
    assert str(int(stated[2])) in path.stem
    assert "V100" not in text


def test_a_mixture_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    """With what it takes, why, and what to do: 60 GB on a card of 48 GB, on four of 24 GB with a copy each, on two."""

    def choose(gpus: int, gib: int, wanted: str = "auto") -> str:
        read, sizes = sized("Qwen3-30B-A3B", tmp_path, distributed={"strategy": wanted})
        return launch.choose(read, sizes, inputs.Team(processes=gpus, gpus=True), gib * GIB)

    told = r"take about 5\d\.\d GB .* \(29\.63 billion of 30\.53 billion weights are not quantized: experts\.gate_up"
    with pytest.raises(errors.ConfigError, match=told + r".* each GPU of 51\.5 GB: use larger GPUs, or several"):
        choose(1, 48)
    with pytest.raises(errors.ConfigError, match=told):
        choose(4, 24, "ddp")
    with pytest.raises(errors.ConfigError, match=r"2 GPUs of 25\.8 GB cannot hold it .* each needs 3\d\.\d GB"):
        choose(2, 24)
    assert choose(1, 80) == "ddp"
    assert choose(4, 24) == "fsdp"


@pytest.mark.parametrize(
    ("gib", "processes", "shards"),
    [
        (24, 4, 4),  # 35 GB of weights over four cards of a node, and a copy on each node
        (18, 4, 8),  # too little: over both nodes
        (48, 1, 2),  # alone on its node a process has nobody else to share with
    ],
)
def test_fsdp_shards_within_a_node_where_its_gpus_hold_the_base(
    gib: int, processes: int, shards: int, tmp_path: Path
) -> None:
    """A frozen base needs no sum over the nodes, so no weight has to cross the network."""
    read, sizes = sized("Llama-3.1-70B-Instruct", tmp_path, distributed={"strategy": "fsdp"})
    team = inputs.Team(nodes=2, processes=processes, gpus=True)

    placed = launch.place(read, sizes, team, gib * GIB)

    assert (placed.strategy, placed.shards) == ("fsdp", shards)
    need = strategy.estimate(read, sizes)
    assert need.on_each(shards, team.size) <= gib * GIB * 0.95


def test_eight_bit_weights_are_never_sharded(tmp_path: Path) -> None:
    """Nothing can cut them in pieces; what does not fit is refused at once, and not when it is loaded."""
    read, sizes = sized("Llama-3.1-70B-Instruct", tmp_path, model={"quantization": "int8"})

    with pytest.raises(errors.ConfigError, match="use nf4, larger GPUs"):
        launch.choose(read, sizes, inputs.Team(processes=4, gpus=True), 48 * GIB)


def test_copies_of_the_state_need_host_memory(tmp_path: Path) -> None:
    """Three of 10 GB for 70B with rank 64 and AdamW, two without a best one; and the base, if that is offloaded."""
    more = {"lora": {"r": 64}, "distributed": {"strategy": "fsdp", "offload": True}}
    train = {"optimizer": "adamw_torch"}
    read, sizes = sized("Llama-3.1-70B-Instruct", tmp_path, train=train, **more)
    team, need = (
        inputs.Team(nodes=2, processes=4, strategy="fsdp", gpus=True),
        strategy.estimate(read, sizes),
    )
    copies, base = 3 * 12 * sizes.trained, need.base / 2

    fits = int(copies + base) + 1
    planning.check_host_memory(read, need, team, fits, fits)
    told = r"up to 3 copies of the training state, of 9\.9 GB each, .* and 19\.\d GB of the base .* has 49\.\d GB"
    with pytest.raises(errors.ConfigError, match=told):
        planning.check_host_memory(read, need, team, fits - 2, fits - 2)
    with pytest.raises(errors.HostMemoryError, match=r"has 49\.\d GB of its 64\.0 GB free: end what else uses"):
        planning.check_host_memory(read, need, team, fits - 2, 64 * 10**9)

    last, _ = sized("Llama-3.1-70B-Instruct", tmp_path, train={**train, "keep_best": False}, **more)
    fits = int(copies * 2 / 3 + base) + 1
    planning.check_host_memory(last, need, team, fits, fits)
    assert (checkpoint.most_copies(keep_best=True), checkpoint.most_copies(keep_best=False)) == (
        3,
        2,
    )


def test_packed_sequences_need_a_mask(tmp_path: Path) -> None:
    """Booleans for each pair of tokens of a micro batch, and a copy in the dtype of activations."""
    peaks = []
    for packing in (False, True):
        data = {"max_length": 16384, "packing": packing}
        read, sizes = sized("Llama-3.1-8B-Instruct", tmp_path, data=data, train={"micro_batch_size": 1})
        peaks.append(strategy.estimate(read, sizes).activations)

    assert peaks[1] - peaks[0] == pytest.approx(3 * 16384**2)


def test_another_process_counts_the_same(tmp_path: Path) -> None:
    """So that torch's memory and the time for its import are not the job's."""
    read, sizes = sized("Qwen3-30B-A3B", tmp_path)

    assert footprint.ask(read, tmp_path / "Qwen3-30B-A3B") == sizes


@pytest.mark.parametrize(
    ("described", "targets", "told"),
    [
        ('{"model_type": "qwen99"}', "auto", "qwen99"),
        (
            '{"model_type": "llama", "num_hidden_layers": 1}',
            ["c_attn"],
            "c_attn matches no linear layer",
        ),
        ("{", "auto", "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_made_is_explained(
    described: str, targets: str | list[str], told: str, tmp_path: Path
) -> None:
    """One that transformers does not know, one that has other layers, and files that are none."""
    (tmp_path / "config.json").write_text(described)
    read = shapes.settings(lora={"targets": targets})
    (tmp_path / footprint.SETTINGS).write_text(read.model_dump_json())

    measure.main(str(tmp_path))

    with pytest.raises(errors.ModelError, match=told):
        footprint.read(tmp_path)


def test_a_process_that_dies_is_no_model_that_is_wrong(tmp_path: Path) -> None:
    """Another start may have the memory that this one had not; its last line is told."""
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 128}  # whose tensors nobody has told
    described = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(described))

    with pytest.raises(errors.JobError, match=r"the process that sizes the model up ended with 1: .*FileNotFound") as e:
        footprint.ask(shapes.settings(), tmp_path)

    assert e.value.status == 1


@pytest.mark.parametrize(
    ("value", "largest"), [(4096, 4096), ([1536, 512], 1536), ((8, [16, 2]), 16), (None, 0), ([], 0)], ids=str
)
def test_a_size_that_differs_from_layer_to_layer_is_its_largest(value: object, largest: int) -> None:
    """Gemma 3n lists the width of each layer's MLP, Hunyuan and ERNIE the experts of a token."""
    assert parts.largest(value) == largest


@pytest.mark.parametrize("family", ["gemma3n_text", "hunyuan_v1_moe", "ernie4_5_moe"])
def test_families_with_lists_in_their_configs_are_sized_up(family: str) -> None:
    """As published: their own defaults, and a list of experts for each layer where the family takes one."""
    model_config = AutoConfig.for_model(family)
    if family == "hunyuan_v1_moe":
        model_config.moe_topk = [2] * model_config.num_hidden_layers
        model_config.moe_intermediate_size = [1024] * model_config.num_hidden_layers

    wide, experts = measure._active_width(model_config, model_config.hidden_size)

    assert wide >= model_config.hidden_size / 2
    assert experts == {"gemma3n_text": 0, "hunyuan_v1_moe": 2}.get(family, experts)
    assert load_size._widest(torch.nn.Linear(1, 1), model_config) >= model_config.hidden_size


def test_a_model_that_cannot_be_sized_up_is_no_reason_to_refuse_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """A config in a form that nobody has seen costs the estimate, and the log says so; nothing is started again."""
    read, _ = sized("Qwen3-30B-A3B", tmp_path)
    (tmp_path / footprint.SETTINGS).write_text(read.model_dump_json())
    monkeypatch.setattr(measure, "measure", lambda *_: int([]))  # type: ignore[call-overload]
    measure.main(str(tmp_path))

    assert footprint.read(tmp_path) is None
    assert "cannot estimate the memory of this model" in said()


class Dora(NamedTuple):
    """A micro batch of one on a model of 3 layers, with DoRA of rank 16."""

    model: str
    tokens: int
    quantization: str
    dropout: float
    gigabytes: float
    """At the peak, beyond the weights."""
    checkpointing: bool = True


# Simulated as table B, with PEFT's own DoRA on the layers, after the estimate was fitted to the live
# bytes of single layers (tests/test_activations.py).
DORA = [
    Dora("Llama-3.1-8B-Instruct", 256, "nf4", 0.05, 1.887),
    Dora("Llama-3.1-8B-Instruct", 2048, "nf4", 0.05, 3.403),
    Dora("Llama-3.1-8B-Instruct", 2048, "nf4", 0.0, 2.807),
    Dora("Llama-3.1-8B-Instruct", 2048, "none", 0.05, 3.235),
    Dora("Llama-3.1-8B-Instruct", 2048, "nf4", 0.05, 6.900, checkpointing=False),
    Dora("Qwen2.5-7B-Instruct", 256, "nf4", 0.05, 2.863),
    Dora("Qwen2.5-7B-Instruct", 2048, "none", 0.0, 3.536),
    Dora("Llama-2-7b-chat-hf", 256, "nf4", 0.0, 1.132),
    Dora("Llama-2-7b-chat-hf", 2048, "none", 0.05, 2.703),
]


@pytest.mark.parametrize("row", DORA, ids=str)
def test_dora_is_estimated_as_it_was_simulated(row: Dora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never less, and at most a tenth more."""
    monkeypatch.setitem(shapes.MODELS, "short", {**shapes.MODELS[row.model], "num_hidden_layers": 3})
    read, sizes = sized(
        "short", tmp_path, lora={"r": 16, "dora": True, "dropout": row.dropout},
        model={"quantization": row.quantization}, data={"max_length": row.tokens},
        train={"micro_batch_size": 1, "gradient_checkpointing": row.checkpointing},
    )  # fmt: skip

    estimate = strategy.estimate(read, sizes).activations / 1e9

    assert row.gigabytes * 0.99 <= estimate <= row.gigabytes * 1.1
