"""On which devices and in which format each model is verified, computed for machines that nobody has to have."""

import pytest
import torch
from test_load_size import GIB, SHAPES, quantization

from job.examine import devices
from job.examine.devices import FORMATS, Machine, Outlined, Placement, Work
from job.model import load_size

WORK = Work(longest=2048, prompts=4, prompt=2048 + 128, adapter=650 * 10**6)
DRIVER = GIB // 2
"""What the driver keeps of a card for itself, roughly: NVML never tells all of it as free."""


def placements(
    name: str,
    gpus: list[int],
    host: int,
    *,
    quantized: bool = False,
    work: Work = WORK,
) -> list[Placement]:
    """Where the model may be on a machine with so many GiB on each GPU and on the host, and 8 cores."""

    def outline(dtype: str) -> Outlined:
        how = quantization() if quantized else None
        network = load_size.outline(SHAPES[name], how, getattr(torch, dtype))
        return network, load_size.measure(network, how, getattr(torch, dtype))

    machine = Machine(tuple(each * GIB - DRIVER for each in gpus), host * GIB, 8)
    formats = FORMATS[::-1] if quantized else FORMATS
    return devices.find_placements(outline, machine, work, formats, quantized=quantized)


@pytest.mark.parametrize(
    ("name", "gpus", "host", "whole", "trained"),
    [
        ("Qwen2.5-7B", [24], 60, "the GPU in bfloat16", "the GPU in bfloat16"),
        ("Llama-3.1-8B", [24], 60, "the GPU in bfloat16", "the GPU in bfloat16"),
        (
            "Qwen2.5-32B", [48], 120,
            "the GPU, 24 GB of weights in host memory in bfloat16", "the GPU in bfloat16",
        ),
        ("Qwen2.5-32B", [80], 200, "the GPU in bfloat16", "the GPU in bfloat16"),
        (
            "Llama-3.1-70B", [80], 200,
            "the GPU, 67 GB of weights in host memory in bfloat16", "the GPU in bfloat16",
        ),
        ("Llama-3.1-70B", [48] * 4, 240, "4 GPUs in bfloat16", "the GPU in bfloat16"),
        ("Llama-3.1-70B", [80] * 8, 1000, "8 GPUs in float32", "the GPU in bfloat16"),
        ("Llama-3.1-70B", [24] * 4, 240, "4 GPUs, 69 GB of weights in host memory in bfloat16", "4 GPUs in bfloat16"),
        ("Llama-3.1-70B", [80], 60, None, "the GPU in bfloat16"),
        ("Llama-3.1-70B", [], 60, None, "the CPU in bfloat16"),
        ("Qwen2.5-7B", [], 60, "the CPU in bfloat16", "the CPU in bfloat16"),
        ("Qwen2.5-7B", [], 120, "the CPU in float32", "the CPU in bfloat16"),
    ],
)  # fmt: skip
def test_a_model_is_verified_on_the_gpus_that_it_was_trained_on(
    name: str,
    gpus: list[int],
    host: int,
    whole: str | None,
    trained: str,
) -> None:
    """Those in 16 bits too, if need be with a part in host memory; without a GPU on the CPU, if that holds them."""
    merged = placements(name, gpus, host)
    packed = placements(name, gpus, host, quantized=True)

    assert str(merged[0] if merged else None) == str(whole)
    assert str(packed[0]) == trained


@pytest.mark.parametrize(
    ("name", "card"),
    [("Llama-3.1-8B", 16), ("Qwen2.5-7B", 16), ("Qwen2.5-32B", 40), ("Llama-3.1-70B", 48)],
)
def test_the_base_as_trained_fits_on_the_smallest_card_of_a_preset(name: str, card: int) -> None:
    """With examples as long as there, and the adapter; a quantized model is never partly in host memory."""
    short = Work(longest=1024, prompts=4, prompt=1024 + 128, adapter=WORK.adapter)

    found = placements(name, [card], 30, quantized=True, work=short)

    assert str(found[0]) == "the GPU in bfloat16"
    assert not any(each.offloaded for each in found)


def test_more_is_computed_at_once_where_memory_is_left() -> None:
    """Positions whose logits are in memory, and prompts that are answered together; one is always possible."""
    roomy = placements("Llama-3.1-70B", [80], 200, quantized=True)[0]
    tight = placements("Llama-3.1-70B", [48], 200, quantized=True)[0]

    assert (roomy.positions, roomy.batch) == (1024, 4)
    assert 64 <= tight.positions <= 1024
    assert 1 <= tight.batch < roomy.batch


def test_float32_takes_no_more_than_half_of_the_free_host_memory() -> None:
    """A CPU computes in bfloat16 where it would; what the command needs in all is bounded by that."""
    need = 7_615_616_512 * 4 * load_size.ROOM

    wide, narrow = (placements("Qwen2.5-7B", [], host)[0] for host in (80, 55))

    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert 55 * GIB / 2 < need < 80 * GIB / 2


def test_the_next_choice_is_another_device_or_format() -> None:
    """For a fault that the sizes did not tell; the last one is the CPU."""
    found = [str(each) for each in placements("Llama-3.1-70B", [80] * 8, 1000)]

    assert found == [
        "8 GPUs in float32", "8 GPUs in bfloat16", "the CPU in float32", "the CPU in bfloat16",
    ]  # fmt: skip


def test_what_stays_in_host_memory_takes_its_time_for_each_pass() -> None:
    """So that no more examples are read than there is time for; many positions share one pass."""
    machine = Machine((80 * GIB,), 200 * GIB, 8)
    placement = placements("Llama-3.1-70B", [80], 200)[0]
    outline = load_size.outline(SHAPES["Llama-3.1-70B"], None, torch.bfloat16)
    size = load_size.measure(outline, None, torch.bfloat16)

    transfer = placement.offloaded / 1e10
    passes = [placement.seconds(size, 1, trained, machine) for trained in (1, 1024, 1025)]

    assert transfer == pytest.approx(6.8, abs=0.2)
    assert passes == [pytest.approx(count * transfer, rel=0.01) for count in (1, 1, 2)]
