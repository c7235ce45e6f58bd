"""The run as frozen, typed data: every key, its type, its default and the reason for the default."""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from job.config import urls

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and closed: an unknown key is a mistake, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """What the run is called and where it is kept."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
    """What the run is called in reports; lower case, digits, dots and dashes, so that Kubernetes takes it too."""
    url: str
    """Where everything that must survive is kept: s3://bucket/prefix or file:///path. One run, one URL."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    cache: str | None = None
    """Local scratch; by default the project's folder under $XDG_CACHE_HOME. Losing it costs time, nothing else."""
    cache_limit: Annotated[ByteSize, Field(gt=0)] | None = None
    """Such as 200GB: models, data and scratch that no running job uses are removed beyond it, the oldest first."""
    conditional_writes: Literal["required", "emulated"] = "required"
    """required: refuse a store on which two starts of a run could overwrite each other. emulated: you see to that."""

    lease_seconds: Annotated[float, Field(ge=2, le=3600)] = 30.0
    """So long after its last sign of life another start waits before it takes the run over from a dead attempt."""

    give_up_after: Annotated[int, Field(ge=1)] = 8
    """Attempts in a row that end without anything new in the store, before the run fails for good."""

    @field_validator("url")
    @classmethod
    def _is_writable_store(cls, url: str) -> str:
        if not url.startswith(("s3://", "file:///")):
            raise ValueError("must be s3://bucket/prefix or file:///absolute/path")
        if url.rstrip("/") == "file:":
            raise ValueError("must not be the root of the file system")
        return urls.sound(url).rstrip("/")

    @field_validator("cache")
    @classmethod
    def _is_path(cls, path: str | None) -> str | None:
        if path is not None and ("://" in path or not path):
            raise ValueError("must be a path on the local disk, not a URL")
        return path


class Model(Section):
    """The frozen base and how it is held in memory."""

    base: str
    """s3://bucket/prefix, file:///path or hf://org/name@revision of a folder in Hugging Face layout."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is held while training; the merge always goes into the original weights."""
    double_quant: bool = True
    """Quantize the quantization constants too: about 0.4 bit per weight less (QLoRA, arXiv 2305.14314)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 where there is hardware for it, else float16 on GPUs; float32 on the CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    """Run Python that comes with the base. Only for a base that you have read, at a pinned revision."""

    @field_validator("base")
    @classmethod
    def _is_readable_store(cls, url: str) -> str:
        if not url.startswith(("s3://", "file:///", "hf://")):
            raise ValueError("must be s3://bucket/prefix, file:///absolute/path or hf://org/name@revision")
        if url.startswith("hf://") and len(url.removeprefix("hf://").split("@")[0].split("/")) != 2:  # noqa: PLR2004 - org and name
            raise ValueError("must be hf://org/name or hf://org/name@revision")
        return urls.sound(url).rstrip("/")

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if self.trust_remote_code and self.base.startswith("hf://") and not urls.is_commit(self.base.partition("@")[2]):
            raise ValueError("trust_remote_code needs a pinned base: hf://org/name@ and the full 40-digit commit")
        return self


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


class Data(Section):
    """What is trained on and how records become text."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (jsonl, json, csv, parquet; plain, .gz or .zst), or folders ending in / : s3://, file:/// or paths."""
    eval: tuple[str, ...] = ()
    eval_fraction: Share = 0.0
    """Hold out this share of the training records instead of naming eval files."""
    format: Literal["auto", "instruction", "conversations", "messages", "prompt-completion", "text"] = "auto"
    """auto: recognised for each file by the keys of its first record."""
    template: Literal["auto", "chat", "instruction-en", "instruction-zh"] = "auto"
    """auto: the model's own chat template if it has one, else instruction-en."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per example; longer ones are cut at the end, counted and said."""
    packing: bool = False
    """Put several short examples into one sequence of max_length; batch sizes then count sequences, not examples."""
    loss_on: Literal["assistant", "all"] = "assistant"
    skip_bad_share: Share = 0.0
    """Share of unusable records that is skipped (and said) instead of stopping the run."""

    @field_validator("train", "eval")
    @classmethod
    def _are_readable(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for url in given:
            if not url.startswith(("s3://", "file:///")):
                raise ValueError(f"{url!r} must be s3://bucket/key, file:///absolute/path or a path")
            if url.startswith("s3://") and "/" not in url.removeprefix("s3://"):
                raise ValueError(f"{url} names a bucket only: add the file's key, or / for every data file in it")
        return tuple(urls.sound(url) for url in given)

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("eval and eval_fraction exclude each other: name files or hold out a share")
        return self


class Train(Section):
    """How long, how fast and how large the steps are."""

    method: Literal["sft"] = "sft"
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

    every_steps: Annotated[int, Field(ge=1)] = 100
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Also save when this much time has passed since the last checkpoint."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that stay in the store; the best one stays besides."""


class Distributed(Section):
    """How the processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    processes_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """auto: one per GPU, one on the CPU."""
    offload: bool = False


class Merge(Section):
    """What becomes of the adapter at the end."""

    enabled: bool = True
    base: Literal["original"] = "original"
    """The weights as they were before quantization; never into 4-bit weights."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(MB|GB)$")] = "5GB"


class Config(Section):
    """One run. Two runs with equal configs on equal inputs end in equal weights."""

    run: Run
    model: Model
    lora: Lora = Lora()
    data: Data
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    distributed: Distributed = Distributed()
    merge: Merge = Merge()

    @model_validator(mode="after")
    def _inputs_lie_outside(self) -> Self:
        for key, url in [
            ("model.base", self.model.base),
            *(("data", url) for url in (*self.data.train, *self.data.eval)),
        ]:
            if f"{url.rstrip('/')}/".startswith(f"{self.run.url}/"):
                raise ValueError(
                    f"{key} {url} lies inside run.url {self.run.url}, where the run writes: give the run a "
                    "place of its own"
                )
        return self

    @model_validator(mode="after")
    def _dora_has_a_layer(self) -> Self:
        if self.lora.dora and self.model.quantization == "int8":
            raise ValueError("lora.dora does not work on int8 layers: use model.quantization nf4 or none")
        return self

    @model_validator(mode="after")
    def _fits_one_process(self) -> Self:
        processes = self.distributed.processes_per_node
        self.train.accumulation(1 if processes == "auto" else processes)
        return self
