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
SHAPES = {
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "Qwen2.5-32B": Qwen2Config(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False,
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
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
