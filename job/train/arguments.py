"""What the trainer is told: the config's settings in its words, and how the processes share the model."""

from typing import Any

import torch
from accelerate import PartialState
from trl import SFTConfig

from job import errors
from job.inputs import Task
from job.model import weights

_BUCKET = 50_000_000  # numbers; DeepSpeed's default takes a gigabyte of the GPU for the few that are trained
_NEVER = 10**9  # steps; the last one is always saved


def arguments(task: Task, *, evaluates: bool, on_start: bool) -> SFTConfig:
    """The trainer's arguments; also what is only to keep it from doing what we do."""
    run, wanted = task.config.run, task.config.train
    dtype = weights.compute_dtype(task.config.model.compute_dtype)
    if task.team.strategy.startswith("zero") and dtype is torch.float16:
        raise errors.ConfigError(
            "float16 under ZeRO keeps a loss scale that no checkpoint holds: use distributed.strategy fsdp or ddp, or "
            "a model.compute_dtype of bfloat16 or float32"
        )
    task.scratch.mkdir(parents=True, exist_ok=True)
    return SFTConfig(
        output_dir=str(task.scratch),
        seed=run.seed,
        data_seed=run.seed,
        max_length=None,  # cut already while preparing
        padding_free=task.config.data.packing,  # which is how TRL keeps packed examples apart
        num_train_epochs=wanted.epochs or 3.0,
        max_steps=wanted.max_steps or -1,
        per_device_train_batch_size=wanted.micro_batch_size,
        per_device_eval_batch_size=wanted.micro_batch_size,
        gradient_accumulation_steps=wanted.accumulation(task.team.size),
        learning_rate=wanted.learning_rate,
        lr_scheduler_type=wanted.schedule if wanted.schedule != "constant" else "constant_with_warmup",
        warmup_steps=wanted.warmup,  # below 1 a share here too
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.max_grad_norm,
        optim=wanted.optimizer,
        gradient_checkpointing=wanted.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fp16=dtype is torch.float16,
        **_placed(task, dtype),
        logging_strategy="steps",
        logging_steps=wanted.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it replaces a lost loss by the average of the others
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=wanted.eval_every,
        eval_on_start=on_start,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=task.config.checkpoint.every_steps or _NEVER,
        save_only_model=task.team.strategy == "fsdp",  # the stock save of a sharded model is refused, and never used
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _placed(task: Task, dtype: torch.dtype) -> dict[str, Any]:
    """How accelerate takes part: with DeepSpeed, with plain data parallelism, or not at all."""
    told: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), "bf16": dtype is torch.bfloat16}
    if not task.team.strategy.startswith("zero"):
        # Without it DDP rebuilds its buckets after the first step of a start, so that three or more processes add up
        # gradients in another order than in later steps, and a resumed run ends with other bits.
        return {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": True, **told}
    if told["use_cpu"]:
        # accelerate knows DeepSpeed on GPUs only; told so much beforehand, it takes the CPU as well
        PartialState(backend="gloo")
        told["accelerator_config"] = {"use_configured_state": True}
    return {"deepspeed": _deepspeed(task, dtype), **told}


def _deepspeed(task: Task, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's config, generated, so that there is one source of truth."""
    wanted = task.config.train
    stage, offload = int(task.team.strategy.removeprefix("zero")), task.config.distributed.offload
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": _BUCKET,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload and stage == 3:  # noqa: PLR2004 - ZeRO's own number
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU optimizer would be compiled at the start, and differs
        "train_batch_size": wanted.global_batch_size,
        "train_micro_batch_size_per_gpu": wanted.micro_batch_size,
        "gradient_accumulation_steps": wanted.accumulation(task.team.size),
        "gradient_clipping": wanted.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "steps_per_print": _NEVER,
        **({"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}),  # else in bfloat16, which adds up badly
    }
