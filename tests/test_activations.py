"""Activations of DoRA and of quantized bases, beside the live bytes of PEFT's own code on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import quantized
import shapes
import torch
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from job import config
from job.launch import strategy
from job.model import lora, measure, weights
from job.model.footprint import count_dora_matrices

HIDDEN, WIDE, LAYERS = 128, 448, 3  # as in Llama 3.1, where the MLP is 3.5 times as wide


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


@contextmanager
def autocast() -> Iterator[None]:
    """Compute in bfloat16 on the CPU, and let PEFT, which asks for CUDA's autocast, know of it."""
    torch.set_autocast_enabled("cuda", enabled=True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled=False)


def simulate(base: Path, settings: config.Config, *, pairs: bool = False) -> int:
    """Return the peak of live bytes of one micro batch, forward and backward."""
    network = lora.adapted(weights.for_training(base, settings.model), settings.lora)
    if pairs:
        lora.without_dropout(network)
    network.train()
    network.config.use_cache = False
    network.enable_input_require_grads()
    if settings.train.gradient_checkpointing:
        network.activation_checkpointing_enable()
    tokens = torch.randint(0, 64, (1, settings.data.max_length))
    with LiveBytes() as live, autocast():
        network(input_ids=tokens, labels=tokens).loss.backward()
    return live.peak


@pytest.fixture(scope="module")
def gptq_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by GPTQ."""
    folder = tmp_path_factory.mktemp("gptq") / "base"
    quantized.gptq(base, folder)
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(("checkpointing", "tolerance"), [(True, 0.05), (False, 0.25)])
def test_a_token_takes_as_much_on_a_gptq_base_as_on_one_in_16_bits(
    base: Path, gptq_base: Path, dropout: float, tolerance: float, *, checkpointing: bool
) -> None:
    """PEFT makes float32 copies of the inputs of both, and none on its own 4-bit layers."""
    peaks: dict[str, list[int]] = {"none": [], "gptq": [], "nf4": []}
    estimates = []
    for length in (256, 512):
        for name, found in peaks.items():
            settings = shapes.settings(
                model={
                    "quantization": "none" if name == "none" else "nf4",
                    "compute_dtype": "bfloat16",
                },
                lora={"dropout": dropout, "r": 4},
                data={"max_length": length},
                train={"gradient_checkpointing": checkpointing, "micro_batch_size": 1},
            )
            found.append(simulate(gptq_base if name == "gptq" else base, settings))
            if name == "gptq":  # its layers have the widths of the plain ones
                sizes = replace(measure.measure(base, settings), scheme="gptq")
                estimates.append(strategy.estimate(settings, sizes).activations)

    token = {name: found[1] - found[0] for name, found in peaks.items()}
    assert token["gptq"] == pytest.approx(token["none"], rel=0.01)
    assert token["nf4"] < 0.9 * token["gptq"]
    assert estimates[1] - estimates[0] == pytest.approx(token["gptq"], rel=tolerance)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dora_without_dropout_keeps_no_weights(base: Path, *, checkpointing: bool) -> None:
    """Training on pairs, which takes the dropout out, needs what a run without dropout needs."""
    peaks = []
    for dropout, pairs in ((0.0, False), (0.05, True), (0.05, False)):
        settings = shapes.settings(
            model={"quantization": "nf4", "compute_dtype": "bfloat16"},
            lora={"dora": True, "dropout": dropout, "r": 4},
            data={"max_length": 16},
            train={"gradient_checkpointing": checkpointing},
        )
        peaks.append(simulate(base, settings, pairs=pairs))

    without, taken_out, with_dropout = peaks
    assert taken_out == pytest.approx(without, rel=0.01)
    assert with_dropout > 1.1 * without


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("length", [16, 512])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_dora_takes_what_a_simulation_says(
    quantization: str, length: int, dropout: float, base: Path, *, checkpointing: bool
) -> None:
    """Within 20 %: with few tokens its matrices and weights, with many what it keeps of each."""
    peaks, estimates = [], []
    for dora in (False, True):
        settings = shapes.settings(
            model={"quantization": quantization, "compute_dtype": "bfloat16"},
            lora={"dora": dora, "dropout": dropout, "r": 4},
            data={"max_length": length},
            train={"micro_batch_size": 1, "gradient_checkpointing": checkpointing},
        )
        need = strategy.estimate(settings, measure.measure(base, settings))
        estimates.append(need.activations + need.gradients)
        peaks.append(simulate(base, settings))

    assert estimates[1] - estimates[0] == pytest.approx(peaks[1] - peaks[0], rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(448, 128), (1024, 128), (128, 448), (256, 256)])
def test_the_matrices_of_one_layer_are_counted(
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
) -> None:
    """The layer's own forward, with and without autocast, is within 20 % of the formula."""
    network = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    shape = LoraConfig(r=4, target_modules=["0"], use_dora=True)
    layer = get_peft_model(network, shape)
    given = torch.ones(1, inputs, dtype=dtype)

    with LiveBytes() as live:
        if dtype == torch.bfloat16:
            with autocast():
                layer(given)
        else:
            layer(given)

    counted = count_dora_matrices(inputs, outputs, dtype.itemsize)
    assert counted == pytest.approx(live.peak, rel=0.2)
