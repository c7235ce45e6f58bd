"""Packed 4-bit weights are the bytes that were quantized, also where FSDP2 gathers them, or training is refused."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from job import errors
from job.train import packed_weights

PROCESSES = 2
CANONICAL_NAN = 0x7FFF  # what CUDA's __float2bfloat16 and __float2half make of every NaN
NANS = {torch.bfloat16: 2 * (2**7 - 1), torch.float16: 2 * (2**10 - 1)}  # sign, and a fraction that is not zero


def copy_as_cuda_does(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Stand in for CUDA's `_foreach_copy_`: 16-bit floats go through float32 (ForeachFunctors.cuh, torch 2.13)."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
        if source.dtype in NANS:
            target.view(torch.int16)[source.isnan()] = CANONICAL_NAN


class Block(torch.nn.Module):
    """A norm and a 4-bit layer, as in a decoder block."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.linear = bnb.nn.Linear4bit(
            64, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage
        )
        self.requires_grad_(requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(hidden * self.norm)
        return result


def shard_and_check(rank: int, folder: Path) -> None:
    """Shard blocks among processes whose copies work as CUDA's do, and write how each check ended."""
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=PROCESSES)
    gather = torch._foreach_copy_
    for storage in (torch.uint8, torch.bfloat16):
        torch._foreach_copy_ = gather
        (folder / f"{storage}-{rank}").write_text(outcome_with(storage))
    distributed.destroy_process_group()


def outcome_with(storage: torch.dtype) -> str:
    """Return the error of the check, or whether the sharded block computes what the whole one did."""
    torch.manual_seed(0)
    block = Block(storage).to("cpu")
    block.linear.support_avx512bf16_for_cpu = False
    hidden = torch.randn(4, 64, dtype=torch.bfloat16)
    expected = block(hidden)
    recorded = packed_weights.record_packed_block("layers.0", block)
    assert recorded
    fully_shard(block, mesh=init_device_mesh("cpu", (PROCESSES,)))
    torch._foreach_copy_ = copy_as_cuda_does
    try:
        packed_weights.check_packed_block(block, recorded)
    except errors.PermanentError as e:
        return str(e)
    return "same output" if torch.equal(block(hidden), expected) else "other output"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """How the check ended on all processes, by how packed weights are stored."""
    folder = tmp_path_factory.mktemp("gathered")
    torch.multiprocessing.spawn(shard_and_check, (folder,), nprocs=PROCESSES)
    return {
        str(storage): {(folder / f"{storage}-{rank}").read_text() for rank in range(PROCESSES)}
        for storage in (torch.uint8, torch.bfloat16)
    }


def test_bytes_survive_the_gather_that_rewrites_nans(outcomes: dict[str, set[str]]) -> None:
    """Stored as bytes, as the job stores them, a gathered layer computes the same bits as the whole one."""
    assert outcomes["torch.uint8"] == {"same output"}


def test_weights_that_the_gather_changed_are_refused(outcomes: dict[str, set[str]]) -> None:
    """Stored as bfloat16, as is usual for FSDP, they are damaged: the error says so, and what to set."""
    (message,) = outcomes["torch.bfloat16"]

    assert "1 of 1 weights of layers.0 and 253 of 65536 bit patterns differ" in message
    assert "Set distributed.strategy to ddp" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_that_a_float_copy_rewrites_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All NaNs of the format but the canonical one; and with torch's own kernel here none."""
    cpu = torch.device("cpu")
    assert packed_weights.find_changed_patterns(dtype, cpu) == 0
    monkeypatch.setattr(torch, "_foreach_copy_", copy_as_cuda_does)

    assert packed_weights.find_changed_patterns(dtype, cpu) == NANS[dtype] - 1
    assert packed_weights.find_changed_patterns(torch.uint8, cpu) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_copies_bytes_as_they_are() -> None:
    """As bytes and as float32; how many patterns of bfloat16 change is recorded by gpu-check."""
    gpu = torch.device("cuda")

    assert packed_weights.find_changed_patterns(torch.uint8, gpu) == 0
    assert packed_weights.find_changed_patterns(torch.float32, gpu) == 0
