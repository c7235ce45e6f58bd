"""How training goes: the adapter, the steps, the checkpoints, the processes, and the merge at the end."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from job.config.section import Section, Share


class Lora(Section):
    """The adapter (LoRA, arXiv 2106.09685)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Share = 0.05
    targets: Literal["auto", "all-linear", "attention"] | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    """auto and all-linear: every linear layer but the head, found in the loaded model; or names of modules."""
    rslora: bool = False
    dora: bool = False


class Train(Section):
    """How long, how fast and how large the steps are."""

    method: Literal["sft", "dpo"] = "sft"
    """sft: learn the answers; dpo: learn to prefer one answer to another (arXiv 2305.18290), from pairs of them."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """dpo: how much a preference costs for each step away from the base model; less lets it go further."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training data; 3 when max_steps is not given either."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    global_batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples per optimizer step over all GPUs; it stays the same whatever the number of GPUs."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 2
    """Examples per GPU at once: memory, not result. The rest is gradient accumulation."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: Share = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = "paged_adamw_8bit"
    """Paged optimizer states move to host memory under pressure, so that a long example is no out-of-memory error."""
    gradient_checkpointing: bool = True
    deterministic: bool = True
    """Use only kernels that give the same bits each time, so that a resumed run ends with the same
    weights on a GPU too; not run on a GPU yet."""
    log_every: Annotated[int, Field(ge=1)] = 10
    eval_every: Annotated[int, Field(ge=1)] = 100
    keep_best: bool = True
    """Publish the adapter with the lowest eval loss instead of the last one (needs eval data)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps exclude each other: give one")
        steps = self.max_steps
        if steps and (self.warmup if self.warmup >= 1 else math.ceil(self.warmup * steps)) >= steps:
            raise ValueError(f"warmup {self.warmup} fills all {steps} steps, so nothing would be learned: lower it")
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro batches per optimizer step on each of `world_size` processes; raises `ValueError` if none fits."""
        steps, rest = divmod(self.global_batch_size, self.micro_batch_size * world_size)
        if rest or not steps:
            fitting = [
                m for m in range(1, self.global_batch_size + 1) if self.global_batch_size % (m * world_size) == 0
            ]
            instead = (
                f"micro_batch_size {' or '.join(map(str, fitting))}"
                if fitting
                else f"a multiple of {world_size} as global_batch_size"
            )
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not micro_batch_size {self.micro_batch_size} x "
                f"{world_size} process{'es' if world_size > 1 else ''} x a whole number: use {instead}"
            )
        return steps


class Checkpoint(Section):
    """How often the state goes to the store."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; beside every_minutes, or instead of it if that is null."""
    every_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """auto: by Young's formula from what a checkpoint costs here and how often this run was preempted so far."""
    grace_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the cluster waits between asking to stop and killing (Kubernetes: terminationGracePeriodSeconds)."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that stay in the store; the best one stays besides."""

    @model_validator(mode="after")
    def _at_all(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("every_steps and every_minutes are both null: a killed run would begin anew; give one")
        return self


class Distributed(Section):
    """How the processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    processes_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """auto: one per GPU, one on the CPU."""
    offload: bool = False
    """Keep sharded state in host memory: slower, for models that do not fit on the GPUs otherwise.

    That is the frozen base under fsdp, the optimizer state under zero2, and both under zero3; no
    other strategy takes it. false keeps all of it on the GPUs.
    """
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """How long a micro batch, or the wait for others in it, may take before the attempt ends."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> Self:
        if self.offload and self.strategy not in ("fsdp", "zero2", "zero3"):
            raise ValueError(f"offload needs strategy fsdp, zero2 or zero3, not {self.strategy}")
        return self


class Examine(Section):
    """Opening the result as its users will, and asking it, before the run is done."""

    minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes that opening the result may take: logits, losses and answers of each model.

    The report names what was left out for want of time or memory; that is no failure. 0 checks the
    merged weights only, and opens no model (``merge --verify sums``).
    """
    prompts: Annotated[int, Field(ge=0, le=64)] = 4
    """Held-out examples that are answered before and after training, for the report."""
    tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    """Of an answer; one that is shorter because the time was over says so in the report."""


class Merge(Section):
    """What becomes of the adapter at the end."""

    enabled: bool = True
    base: Literal["original", "dequantized"] = "original"
    """The weights as they were before quantization, or as the adapter saw them in training: rounded to 4 or 8 bits."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(MB|GB)$")] = "5GB"
