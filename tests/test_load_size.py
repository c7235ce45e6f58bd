"""What a model takes once it is loaded, and on which devices it fits: computed without weights and without a GPU."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from job import config, errors
from job.model import load_size, weights

GIB = 2**30


def shape_of(
    family: type[PretrainedConfig],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
) -> PretrainedConfig:
    """The config of a model; `heads` are those of queries, and those of keys and values."""
    return family(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=False,
        vocab_size=152064 if family is Qwen2Config else 128256,
    )  # fmt: skip


SHAPES = {
    "Qwen2.5-7B": shape_of(Qwen2Config, 3584, 18944, layers=28, heads=(28, 4)),
    "Llama-3.1-8B": shape_of(LlamaConfig, 4096, 14336, layers=32, heads=(32, 8)),
    "Qwen2.5-32B": shape_of(Qwen2Config, 5120, 27648, layers=64, heads=(40, 8)),
    "Llama-3.1-70B": shape_of(LlamaConfig, 8192, 28672, layers=80, heads=(64, 8)),
}
"""The shapes that the published config.json files give."""


def quantization(*, double: bool = True) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
    )


def sized(
    shape: PretrainedConfig,
    how: BitsAndBytesConfig | None,
) -> tuple[PreTrainedModel, load_size.LoadSize]:
    network = load_size.outline(shape, how, torch.bfloat16)
    return network, load_size.measure(network, how, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen2.5-32B", 32_763_876_352),
        ("Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_a_published_model_has_as_many_weights_as_its_card_says(name: str, numbers: int) -> None:
    """In 16 bits that is twice as many bytes; in nf4 the linear layers take 4 bits and their scales."""
    shape = SHAPES[name]
    packed = sized(shape, quantization())[1]

    found = sized(shape, None)[1]

    assert (found.numbers, found.weights) == (numbers, 2 * numbers)
    head = shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
    attention = 2 * shape.hidden_size**2 + 2 * shape.hidden_size * head
    linear = shape.num_hidden_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    # QLoRA, arXiv 2305.14314, section 3: double quantization takes 0.127 bits for each weight.
    expected = linear * (4 + 0.127) / 8 + 2 * (numbers - linear)
    assert packed.weights == pytest.approx(expected, rel=1e-3)
    assert packed.unpacked == 2 * shape.hidden_size * shape.intermediate_size


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "nf4"])
def test_the_size_is_that_of_the_tensors_that_transformers_loads(
    quantized: bool, tiny_model: Path,  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """Each tensor counted once, with the scales of quantized ones."""
    how = quantization(double=False) if quantized else None
    network = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=how,
    )
    loaded = sum(each.numel() * each.element_size() for each in network.parameters())
    scales = [each.quant_state.absmax for each in network.parameters() if hasattr(each, "quant_state")]
    loaded += sum(each.numel() * each.element_size() for each in scales)

    found = sized(network.config, how)[1]

    assert bool(scales) == quantized
    assert found.weights == loaded


def test_several_gpus_share_a_model_by_whole_layers() -> None:
    """Nothing is left over for the host, and no GPU gets more than there is room for."""
    network, size = sized(SHAPES["Llama-3.1-70B"], None)
    room = 42 * 10**9

    found = load_size.spread(network, size, [room] * 4)

    assert found
    assert {*found.values()} == {0, 1, 2, 3}
    for device in range(4):
        held = [
            parameter.numel() * 2
            for name, parameter in network.named_parameters()
            if next(found[key] for key in found if f"{name}.".startswith(f"{key}.")) == device
        ]
        assert 20 * 10**9 < sum(held) <= room
    assert load_size.spread(network, size, [30 * 10**9] * 4) is None


def test_a_model_that_is_to_answer_goes_to_a_gpu_that_holds_all_of_it() -> None:
    """Where none does, quantized weights are shared by the GPUs, and others by GPU and host, which is said."""
    network, size = sized(SHAPES["Llama-3.1-70B"], quantization())
    plain, in_16_bits = sized(SHAPES["Qwen2.5-7B"], None)

    assert load_size.place(network, size, "nf4", [20 * GIB, 78 * GIB]) == {"": 1}
    assert {*load_size.place(network, size, "nf4", [23 * GIB] * 3).values()} == {0, 1, 2}
    shared = load_size.place(plain, in_16_bits, "none", [10 * GIB], host=60 * GIB)
    assert {*shared.values()} == {0, "cpu"}


@pytest.mark.parametrize(
    ("how", "free", "host", "told"),
    [
        ("nf4", [15 * GIB], 0, "the GPU has 16.1 GB free, and the model needs about 4[0-9].. GB .nf4.: use a larger"),
        ("int8", [15 * GIB], 0, r"\(int8\): use --quantization nf4, a larger GPU, or set CUDA_VISIBLE_DEVICES to noth"),
        ("none", [15 * GIB] * 2, GIB, "the 2 GPUs together have 32.2 GB free, .* use --quantization nf4"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_too_small_is_refused_with_both_sizes(
    how: str,
    free: list[int],
    host: int,
    told: str,
) -> None:
    """Before a weight is read, with status 64; transformers would speak of modules on the disk."""
    settings = {"nf4": quantization(), "int8": BitsAndBytesConfig(load_in_8bit=True), "none": None}
    network, size = sized(SHAPES["Llama-3.1-70B"], settings[how])

    with pytest.raises(errors.ConfigError, match=told) as raised:
        load_size.place(network, size, how, free, host)

    assert raised.value.status == 64


def test_a_base_that_comes_quantized_must_fit_as_its_files_are(tmp_path: Path) -> None:
    """It is on one GPU as a whole."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(20 * GIB)

    with pytest.raises(
        errors.ConfigError,
        match=r"needs about 23\.. GB \(GPTQ\): use a larger GPU",
    ):
        load_size.check_packed(tmp_path, "GPTQ", 20 * GIB)

    load_size.check_packed(tmp_path, "GPTQ", 24 * GIB)


def test_a_model_answers_on_the_cpu_where_there_is_no_gpu(tiny_model: Path) -> None:
    """As before, without asking what fits."""
    network = weights.for_answering(tiny_model, config.Model(base=tiny_model.as_uri()))

    assert network.device.type == "cpu"
    assert math.isfinite(float(network(input_ids=torch.tensor([[3, 4]])).logits.detach().sum()))
