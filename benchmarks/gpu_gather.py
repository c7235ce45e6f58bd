"""One of the processes that `gpu_ranks` lets share a 4-bit block: prints what it found, as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from job.train.packed_weights import check_packed_block, record_packed_block


def gather(store: str, device: str, hidden: int, intermediate: int) -> dict[str, Any]:
    """Shard a block with the other process, as the job does, gather it, and compare its bytes.

    Raises `errors.PermanentError` if a byte differs.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        gathered = torch.empty(ranks, device=device)
        dist.all_gather_into_tensor(gathered, torch.ones(1, device=device))
    except RuntimeError as e:  # a torch whose gloo has no such operation for this device
        return {"skipped": f"gloo cannot gather on {device}: {str(e)[:200]}"}
    torch.manual_seed(0)
    packed = bnb.nn.Linear4bit(hidden, intermediate, bias=False, quant_type="nf4", quant_storage=torch.uint8)
    block = nn.Sequential(nn.RMSNorm(hidden, dtype=torch.bfloat16), packed).to(device)
    block.requires_grad_(requires_grad=False)
    recorded = record_packed_block("block", block)
    assert recorded
    fully_shard(block, mesh=init_device_mesh(device, (ranks,)))
    local = sum(parameter.to_local().numel() for parameter in block.parameters())  # type: ignore[attr-defined]  # DTensor's
    check_packed_block(block, recorded)
    return {"ranks": ranks, "bytes_of_rank_0": local, "weights_compared": len(recorded.digests)}


if __name__ == "__main__":
    print(json.dumps(gather(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))  # noqa: T201
    dist.destroy_process_group()
