"""How the processes share the model: chosen by what it needs and what a GPU has."""

from dataclasses import dataclass, replace

from job import config, errors, log
from job.inputs import Team
from job.launch.activations import estimate_activations
from job.model.footprint import Footprint, describe_unquantized

_USABLE = 0.95  # of a GPU's memory; the rest goes to what lies between the tensors
_CONTEXT = 1e9  # bytes that CUDA, cuBLAS and the kernels themselves take on each GPU
_OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}
_FLOAT = 4  # bytes of a weight of the adapter, and of its gradient
_WHOLE = ("ddp", "zero1", "zero2")  # have the whole base on each GPU
# Bytes for each weight of the largest layer when PEFT computes the norms that DoRA starts with
# (peft/tuners/lora/dora.py): the dequantized weight in 16 bits, and in float32 BA, the scaled BA
# and the sum.
_DORA_START = 14
# Bytes for each weight of the adapter that DeepSpeed keeps in host memory with offload: a copy of
# it and AdamW's two moments, all in float32.
_ZERO_OFFLOAD = 12


@dataclass(frozen=True)
class Need:
    """Estimated bytes of what lies on a GPU."""

    base: float
    """The frozen base, which can be sharded."""
    constants: float
    """What quantized weights are unpacked with; every GPU has all of them."""
    layer: float
    """One layer of the base: two are gathered at a time where it is sharded."""
    ends: float
    """Its embeddings and its head, which are gathered then while a step is computed."""
    adapter: float
    """The adapter, in float32."""
    gradients: float
    """Of the adapter."""
    optimizer: float
    activations: float
    """What the peak of a step takes beyond all of these."""
    offload: bool = False
    """Whether the shards of the base stay in host memory, and GPUs have only what is gathered."""
    loading: float = 0.0
    """What each GPU has while fsdp loads the base whole, as DoRA makes it."""
    zero_offload: float = 0.0
    """What ZeRO keeps in the host memory of all machines together instead of the optimizer."""

    @property
    def replica(self) -> float:
        """Return the bytes of a whole base with the adapter, whatever the examples are."""
        return self.base + self.constants + self.adapter + self.gradients

    def fixed(self, shards: int) -> float:
        """Return what is on each of `shards` GPUs that share the base, whatever the examples are.

        With offload FSDP2 sends each layer from host memory to the GPU when it gathers it, also
        where one process has all of the base (torch's CPUOffloadPolicy).
        """
        if shards == 1 and not self.offload:
            return self.replica
        return self._gathered(shards) + max(self.gradients, self._buffer(shards))

    def on_each(self, shards: int, processes: int = 1) -> float:
        """Return all of it for each of `shards` GPUs that share the base, of `processes` in all."""
        exchanged = self.gradients if processes > 1 else 0.0  # a flat copy of them, to be averaged
        certain = _CONTEXT + (0.0 if self.zero_offload else self.optimizer)
        if shards == 1 and not self.offload:
            return certain + self.replica + self.activations + exchanged
        # the next layer is gathered early; gradients are averaged when activations are gone
        backward = self.gradients + self.layer + max(self.activations, exchanged)
        return certain + self._gathered(shards) + max(backward, self._buffer(shards))

    def _gathered(self, shards: int) -> float:
        """Return the bytes of one shard, the adapter, and what is gathered in each pass."""
        shard = 0.0 if self.offload else self.base / shards
        return shard + self.constants + self.adapter + self.layer + self.ends

    def _buffer(self, shards: int) -> float:
        """Return the bytes of the buffer that embeddings and head are gathered through.

        FSDP2 keeps it until the first layer is gathered (torch's FSDPParamGroup.wait_for_unshard).
        """
        return self.ends if shards > 1 else 0.0


def choose(
    settings: config.Config,
    footprint: Footprint | None,
    team: Team,
    memory: int | None,
    room: float | None = None,
) -> str:
    """Return the strategy for `team`, and log why where the config says auto.

    `memory` is that of the smallest GPU in bytes, None on a CPU; `room` is the host memory that the
    base can have with distributed.offload, None if nobody counted it. Raises `errors.ConfigError`
    if the frozen base and the adapter cannot be where the strategy wants them.
    """
    wanted = settings.distributed.strategy
    if memory is None or footprint is None:
        return "ddp" if wanted == "auto" else wanted
    need = estimate(settings, footprint)
    # ZeRO-3 knows no copies of the base on each node
    shards = team.size if wanted == "zero3" else count_shards(team, need, memory, room)
    alone, sharded = need.on_each(1, team.size), need.on_each(shards, team.size)
    chosen = wanted
    if footprint.scheme:
        chosen = "ddp"
        if need.replica > memory:
            raise errors.ConfigError(
                f"the base, which is quantized already ({footprint.scheme}), takes "
                f"{log.size(need.replica)} with the adapter, and each GPU of {log.size(memory)} "
                "needs all of it: use larger GPUs, or the original weights and strategy fsdp"
            )
    elif wanted == "auto":
        cannot_shard = team.size == 1 or settings.model.quantization == "int8"
        chosen = "ddp" if alone <= memory * _USABLE or cannot_shard else "fsdp"
        shard = "" if cannot_shard else f", one of {shards} shards of it {log.size(sharded)}"
        log.event(
            "launch.strategy",
            f"{team.size} GPU(s) of {log.size(memory)}: a whole copy of the model on each takes "
            f"about {log.size(alone)}{shard}, so the strategy is {chosen}",
            strategy=chosen,
            memory=memory,
        )
    _refuse(settings, chosen, shards, footprint, need, memory)
    each = alone if chosen in _WHOLE else sharded
    if chosen == "fsdp" and need.loading:
        each = max(each, need.loading + _CONTEXT)
    if each > memory * _USABLE:
        log.warn(
            "launch.tight",
            f"about {log.size(each)} for each GPU of {log.size(memory)} may be too much: lower "
            "train.micro_batch_size (the result stays the same) or data.max_length",
        )
    return chosen


def place(
    settings: config.Config,
    footprint: Footprint | None,
    team: Team,
    memory: int | None,
    room: float | None = None,
) -> Team:
    """Return `team` with its strategy, and with how many processes share one base under fsdp.

    Arguments and errors are those of `choose`.
    """
    strategy = choose(settings, footprint, team, memory, room)
    if strategy != "fsdp" or team.nodes == 1:
        return replace(team, strategy=strategy)
    need = estimate(settings, footprint) if footprint else None
    shards = count_shards(team, need, memory, room)
    how = f"each node shards a copy of the base over its {team.processes} processes"
    how += ", and none crosses the network"
    if shards == team.size:
        how = f"one copy of the base is sharded over all {team.size} processes"
        how += ", and gathered over the network"
    log.event("launch.sharded", f"fsdp: {how}", shards=shards)
    return replace(team, strategy=strategy, sharded_over=shards)


def count_shards(
    team: Team,
    need: Need | None,
    memory: int | None,
    room: float | None = None,
) -> int:
    """Return how many processes share one copy of the frozen base under fsdp.

    They are those of one node where its GPUs hold a copy, or with offload its host memory, of which
    the base can have `room`. A node with one process has nobody else to share with.
    """
    if team.processes == 1:
        return team.size
    if need is None or memory is None:
        return team.processes
    fits = need.on_each(team.processes, team.size) <= memory * _USABLE
    if need.offload:
        # a GPU needs the same for any number of shards; what differs is each node's host memory
        fits = room is None or need.base <= room
    return team.processes if fits else team.size


def _refuse(
    settings: config.Config,
    chosen: str,
    shards: int,
    footprint: Footprint,
    need: Need,
    memory: int,
) -> None:
    """Raise `errors.ConfigError` if what is there whatever the examples are has no place."""
    quantization = settings.model.quantization
    takes = f"the frozen base and the adapter take about {log.size(need.replica)}"
    takes += f" with model.quantization {quantization}"
    if sum(footprint.unquantized.values()) > footprint.weights / 2:
        takes += f" ({describe_unquantized(footprint.weights, footprint.unquantized)})"
    smaller = "" if quantization in ("nf4", "fp4") else "nf4, "
    each = f"on each GPU of {log.size(memory)}"
    whole = need.base + need.constants
    if chosen in _WHOLE and need.replica > memory:
        raise errors.ConfigError(
            f"{takes}, and {chosen} has all of it {each}: use {smaller}larger GPUs, or several and "
            "distributed.strategy fsdp"
        )
    if chosen == "zero3" and quantization != "none" and whole > memory:
        raise errors.ConfigError(
            f"{takes}, and zero3 shards quantized weights only when all of them are {each}: use "
            "distributed.strategy fsdp, which does it while it loads them"
        )
    if chosen == "fsdp" and need.loading > memory:
        raise errors.ConfigError(
            f"{takes}, and lora.dora needs all of it {each} to begin with, "
            f"{log.size(need.loading)} together with what the norms of the largest layer take: use "
            f"{smaller}larger GPUs, or set lora.dora to false and train plain LoRA"
        )
    if chosen in _WHOLE or need.fixed(shards) <= memory:
        return
    if need.offload:
        raise errors.ConfigError(
            f"{takes}, and with distributed.offload each GPU of {log.size(memory)} still needs "
            f"{log.size(need.fixed(shards))} for the adapter and for what is gathered of the base: "
            f"use {smaller}larger GPUs, or lower lora.r"
        )
    raise errors.ConfigError(
        f"{takes}, and {shards} GPUs of {log.size(memory)} cannot hold it together, for each needs "
        f"{log.size(need.fixed(shards))}: use more or larger ones, {smaller}or distributed.offload "
        "with fsdp"
    )


def estimate(settings: config.Config, footprint: Footprint) -> Need:
    """Return what training needs on a GPU: weights to the byte, activations as simulated."""
    trained, wanted = footprint.trained, settings.distributed
    whole = footprint.base + footprint.constants + trained * _FLOAT
    norms = _DORA_START * footprint.dora_inputs * footprint.dora_outputs
    zero_offload = wanted.offload and wanted.strategy.startswith("zero")
    return Need(
        base=footprint.base,
        constants=footprint.constants,
        layer=footprint.block,
        ends=footprint.ends,
        adapter=trained * _FLOAT,
        gradients=trained * _FLOAT,
        optimizer=trained * _OPTIMIZER_BYTES[settings.train.optimizer],
        activations=estimate_activations(settings, footprint, trained * _FLOAT),
        # ZeRO-2 keeps the optimizer in host memory, and the base on each GPU
        offload=wanted.offload and wanted.strategy not in _WHOLE,
        loading=whole + norms if settings.lora.dora else 0.0,
        zero_offload=trained * _ZERO_OFFLOAD if zero_offload else 0.0,
    )


def count_certain(need: Need, team: Team) -> float:
    """Return the bytes that each GPU of `team` needs whatever the examples are."""
    if team.strategy in _WHOLE:
        return need.replica
    return max(need.fixed(team.shards), need.loading if team.strategy == "fsdp" else 0.0)
