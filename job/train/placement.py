"""Where the model lies: a copy for each process, or a share of the frozen base for each.

Under FSDP2 only the frozen base is shared out. The adapter is small, and stays whole in every process with its
optimizer, as in plain data parallelism: so every optimizer works, also the 8-bit ones, and a checkpoint is the same.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from job import log
from job.checkpoint import state as states
from job.inputs import Task, Team
from job.model import lora, weights
from job.train.packed_weights import PackedBlock, record_packed_block


@dataclass(frozen=True)
class Placed:
    """The model as the strategy wants it, and what its packed weights were before they were sharded."""

    model: PeftModel
    packed: PackedBlock | None
    """One block that is or will be sharded; None if no packed weights are."""


def adapted(task: Task) -> Placed:
    """The base with the adapter's layers, laid out as the strategy wants it; their values come with `settle`."""
    settings, strategy = task.config, task.team.strategy
    packed = None
    if strategy == "fsdp":
        made, packed = _shared(task)
    else:
        network = weights.for_training(task.base, settings.model)
        made = lora.adapted(network, settings.lora)
        if strategy == "zero3":
            blocks = (record_packed_block(name, block) for name, block in _blocks(network, made))
            packed = next(filter(None, blocks), None)
    if settings.train.method == "dpo":
        log.event(
            "train.dropout", "no dropout: train.method dpo compares what the model says with the adapter and without"
        )
        lora.without_dropout(made)
    return Placed(made, packed)


def settle(network: nn.Module, task: Task) -> None:
    """Give the adapter its values: those of the checkpoint, or fresh ones that depend on the seed alone.

    To be called after TRL, which makes them bfloat16 where the base is quantized.
    """
    lora.in_float32(network)
    if task.resumed:
        states.restore_adapter(task.resumed, network)
    else:
        lora.draw(network, task.config.run.seed)


def held(network: nn.Module) -> tuple[int, int]:
    """How many numbers of the frozen base this process holds, and how many there are."""
    mine, whole = 0, 0
    for parameter in network.parameters():
        if parameter.requires_grad:
            continue
        share = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter  # DeepSpeed's
        mine += share.to_local().numel() if isinstance(share, DTensor) else share.numel()
        whole += parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return mine, whole


def _shared(task: Task) -> tuple[PeftModel, PackedBlock | None]:
    """Share out what is frozen while it is loaded, layer by layer; transformers is told that nobody else has to."""
    settings = task.config
    found = None if settings.lora.dora else weights.outline(task.base, settings.model)  # DoRA begins with their norms
    if found is None:
        log.event("train.whole", "every process loads the whole model before it is shared out")
        network, pieces = weights.for_training(task.base, settings.model), None
    else:
        network, pieces = found
    adapted = lora.adapted(network, settings.lora)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mesh = _shard_mesh(device, task.team)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    policy = offload if settings.distributed.offload else OffloadPolicy()
    packed = None
    for name, module in [*_blocks(network, adapted), ("", adapted)]:
        if pieces:
            pieces.fill(module, name)
        packed = packed or record_packed_block(name, module)
        if module is adapted:
            network.tie_weights()
        trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=trained, offload_policy=policy)
    adapted.is_distributed_loading_by_transformers = True  # what the trainer asks; it then averages gradients itself
    adapted._is_fsdp_managed_module = True  # noqa: SLF001 - the same
    adapted.config.distributed_config = SimpleNamespace(dp_replicate_size=1, tp_size=1)
    return adapted, packed


def _blocks(network: PreTrainedModel, adapted: PeftModel) -> list[tuple[str, nn.Module]]:
    """Return the decoder blocks, and those of the vision tower, with their names in the adapted model."""
    classes = network._no_split_modules or ()  # noqa: SLF001 - transformers' own name for them
    return [(name, module) for name, module in adapted.named_modules() if type(module).__name__ in classes]


def _shard_mesh(device: torch.device, team: Team) -> DeviceMesh:
    """Return the processes that this one shards the frozen base with.

    They are those of one node where the base fits there: other nodes have copies of their own, so that no frozen
    weight crosses the network. Nothing has to be reduced between the copies, for they are frozen.
    """
    copies = team.size // team.shards
    mesh = init_device_mesh(device.type, (copies, team.shards), mesh_dim_names=("replicated", "sharded"))
    return mesh["sharded"]
