"""The run as frozen, typed data: every key, its type, its default and the reason for the default."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ByteSize, Field, field_validator, model_validator

from job.config import urls
from job.config.data import Data
from job.config.section import Section
from job.config.training import Checkpoint, Distributed, Examine, Lora, Merge, Train

_DEEPSPEED_MINUTES = 30  # of the groups that it makes, which nothing sets (deepspeed 0.19, utils/groups.py)


def _readable(url: str) -> str:
    if not url.startswith(("s3://", "file:///", "hf://")):
        raise ValueError("must be s3://bucket/prefix, file:///absolute/path or hf://org/name@revision")
    if url.startswith("hf://") and len(url.removeprefix("hf://").split("@")[0].split("/")) != 2:  # noqa: PLR2004 - org and name
        raise ValueError("must be hf://org/name or hf://org/name@revision")
    return urls.sound(url).rstrip("/")


Readable = Annotated[str, AfterValidator(_readable)]


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

    base: Readable
    """s3://bucket/prefix, file:///path or hf://org/name@revision of a folder in Hugging Face layout."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is held while training; merge.base says what the adapter is added to."""
    double_quant: bool = True
    """Quantize the quantization constants too: about 0.4 bit per weight less (QLoRA, arXiv 2305.14314)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 where there is hardware for it, else float16 on GPUs; float32 on the CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    """Run Python that comes with the base. Only for a base that you have read, at a pinned revision."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if self.trust_remote_code and self.base.startswith("hf://") and not urls.is_commit(self.base.partition("@")[2]):
            raise ValueError("trust_remote_code needs a pinned base: hf://org/name@ and the full 40-digit commit")
        return self


def dequantizable(model: Model, merge: Merge) -> None:
    """Raise `ValueError` if there is nothing that was dequantized."""
    if merge.base == "dequantized" and model.quantization == "none":
        raise ValueError("merge.base dequantized is for a base that model.quantization makes small: use original")


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
    examine: Examine = Examine()

    @model_validator(mode="after")
    def _inputs_lie_outside(self) -> Self:
        for key, url in [
            ("model.base", self.model.base),
            *(("data", source.url) for source in (*self.data.sources("train"), *self.data.sources("eval"))),
        ]:
            if urls.within(url, self.run.url):
                raise ValueError(
                    f"{key} {url} lies inside run.url {self.run.url}, where the run writes: give the run a "
                    "place of its own"
                )
        return self

    @model_validator(mode="after")
    def _something_was_dequantized(self) -> Self:
        dequantizable(self.model, self.merge)
        return self

    @model_validator(mode="after")
    def _dora_has_a_layer(self) -> Self:
        if self.lora.dora and self.model.quantization == "int8":
            raise ValueError("lora.dora does not work on int8 layers: use model.quantization nf4 or none")
        return self

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> Self:
        if self.train.method == "dpo" and (self.data.packing or self.data.loss_on == "all"):
            key = "data.packing" if self.data.packing else "data.loss_on: all"
            raise ValueError(f"train.method dpo compares whole answers, which {key} does not allow: leave it out")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        processes = self.distributed.processes_per_node
        self.train.accumulation(1 if processes == "auto" else processes)
        return self

    @model_validator(mode="after")
    def _strategy_can_do_it(self) -> Self:
        strategy, optimizer = self.distributed.strategy, self.train.optimizer
        if strategy.startswith("zero") and optimizer != "adamw_torch":
            raise ValueError(
                f"distributed.strategy {strategy} spreads the optimizer's state over the GPUs, which train.optimizer "
                f"{optimizer} does not allow: use adamw_torch, or strategy ddp or fsdp"
            )
        if strategy.startswith("zero") and self.model.compute_dtype == "float16":
            raise ValueError(
                f"distributed.strategy {strategy} with model.compute_dtype float16 keeps a loss scale that no "
                "checkpoint holds: use bfloat16 or float32, or strategy ddp or fsdp"
            )
        if strategy.startswith("zero") and self.distributed.timeout_minutes > _DEEPSPEED_MINUTES:
            raise ValueError(
                f"DeepSpeed's own processes wait {_DEEPSPEED_MINUTES} minutes for each other and no longer: lower "
                f"distributed.timeout_minutes, or use strategy ddp or fsdp instead of {strategy}"
            )
        if strategy in ("fsdp", "zero3") and self.model.quantization == "int8":
            raise ValueError(
                f"distributed.strategy {strategy} cannot share out int8 weights: use quantization nf4, fp4 or none"
            )
        return self
