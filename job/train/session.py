"""One attempt at training: load, resume, train, choose the best, write the result."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig

from job import checkpoint, errors, lease, log, manifest, paths, storage
from job.config import Config
from job.inputs import Task
from job.model import lora, tokenizer, weights
from job.preemption import Notice
from job.train.progress import Progress
from job.train.trainer import Cadence, Exact, Trainer, due

_NEVER = 10**9  # steps; the last one is always saved


def train(task: Task, notice: Notice) -> None:
    """Train until done or asked to stop; a sealed ``task.out`` is the sign of the former.

    Raises `errors.Preempted` after saving, and `errors.ModelError` when training cannot give a usable adapter.
    """
    datasets.disable_progress_bars()
    torch.manual_seed(task.config.run.seed)  # of the adapter's first values
    store = storage.connect(task.config.run.url)
    if task.config.run.conditional_writes == "emulated":
        store = storage.checked(store, paths.PROBE, required=False)
    owner = lease.Lease(store, task.start.lease, task.config.run.lease_seconds)
    checkpoints = checkpoint.Checkpoints(
        store, task.start.attempt, task.inputs, task.config.checkpoint.keep, task.scratch, owner.confirm
    )
    resumed = checkpoints.latest()
    made = task.scratch / "made"
    progress = Progress(made / "report")
    saving = checkpoint.Background(checkpoints)
    trainer = _trainer(task, saving, resumed, notice, progress)
    _run(trainer, saving, resumed, notice, task, progress)
    log.phase("publish")
    best = trainer.state.best_global_step if task.config.train.keep_best else None
    checkpoints.forget(trainer.state.global_step, best)  # what a kill in the last retention left
    _write(task, trainer, checkpoints, best, made)
    owner.confirm()  # the place is that of every attempt on this machine
    manifest.seal(made)
    shutil.rmtree(task.out, ignore_errors=True)
    made.rename(task.out)


def _trainer(
    task: Task,
    saving: checkpoint.Background,
    resumed: checkpoint.Found | None,
    notice: Notice,
    progress: Progress,
) -> Trainer:
    settings, evaluation = task.config, task.data / "eval.arrow"
    evaluates = evaluation.is_file()
    keep_best = settings.train.keep_best and evaluates
    words = tokenizer.load(task.base, settings.data.template, trust_remote_code=settings.model.trust_remote_code)
    log.event("train.load", f"loading the base model ({settings.model.quantization})")
    trainer = Trainer(
        saving,
        Cadence(notice, saving, task, keep_best=keep_best),
        keep_best=keep_best,
        model=lora.adapted(weights.for_training(task.base, settings.model), settings.lora),
        args=_arguments(task, evaluates=evaluates, on_start=evaluates and _evaluate_first(settings, resumed)),
        processing_class=words,
        train_dataset=Dataset.from_file(str(task.data / "train.arrow")),
        eval_dataset=Dataset.from_file(str(evaluation)) if evaluates else None,
        callbacks=[Exact(settings.run.seed), progress],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    lora.in_float32(trainer.model)
    return trainer


def _arguments(task: Task, *, evaluates: bool, on_start: bool) -> SFTConfig:
    run, wanted = task.config.run, task.config.train
    dtype = weights.compute_dtype(task.config.model.compute_dtype)
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
        gradient_accumulation_steps=wanted.accumulation(1),
        learning_rate=wanted.learning_rate,
        lr_scheduler_type=wanted.schedule if wanted.schedule != "constant" else "constant_with_warmup",
        warmup_steps=wanted.warmup,  # below 1 a share here too
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.max_grad_norm,
        optim=wanted.optimizer,
        gradient_checkpointing=wanted.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=not torch.cuda.is_available(),
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
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _evaluate_first(settings: Config, resumed: checkpoint.Found | None) -> bool:
    """A fresh run measures the base model; a resumed one what the last attempt had no time for."""
    return resumed is None or due(_state(resumed), settings.train.eval_every)


def _state(found: checkpoint.Found) -> transformers.TrainerState:
    state: transformers.TrainerState = transformers.TrainerState.load_from_json(str(found.path / checkpoint.TRAINER))
    return state


def _run(
    trainer: Trainer, saving: checkpoint.Background, resumed: checkpoint.Found | None, notice: Notice, task: Task,
    progress: Progress,
) -> None:  # fmt: skip
    if resumed and (state := _state(resumed)).global_step >= state.max_steps:
        log.event("train.over", f"all {state.max_steps} steps are done already", step=state.global_step)
        trainer.state = state
        progress.replay(state)
        checkpoint.restore_adapter(resumed.path, trainer.model)
        if trainer.args.eval_on_start:
            trainer.catch_up()
        progress.close()
        return
    if resumed:
        log.event("train.resume", f"going on after step {resumed.step}", step=resumed.step)
    notice.check()
    started = time.monotonic()
    try:
        with notice.deferred():
            trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
            log.phase("upload", step=trainer.state.global_step)
            saving.finish(lambda: _left(notice, task))
    except torch.OutOfMemoryError as e:
        raise errors.PermanentError(
            f"the GPU's memory is too small: {e}. Lower train.micro_batch_size (the result stays the same) "
            "or data.max_length"
        ) from e
    log.event(
        "train.done",
        f"trained {trainer.state.global_step} steps",
        step=trainer.state.global_step,
        seconds=time.monotonic() - started,
    )


def _left(notice: Notice, task: Task) -> float:
    """Seconds until the cluster kills us, as far as we know."""
    return task.grace - (time.monotonic() - notice.since) if notice.reason else math.inf


def _write(task: Task, trainer: Trainer, checkpoints: checkpoint.Checkpoints, best: int | None, made: Path) -> None:
    if best and best != trainer.state.global_step:
        log.event(
            "train.best",
            f"the best eval loss was {trainer.state.best_metric:.4f} at step {best}: keeping that adapter",
            step=best,
        )
        checkpoint.restore_adapter(checkpoints.at(best).path, trainer.model)
    adapter, report = made / "adapter", made / "report"
    shape = trainer.model.peft_config["default"]
    shape.base_model_name_or_path = task.config.model.base  # not where the cache of this machine is
    trainer.model.save_pretrained(str(adapter))
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's names nothing but a path
    trainer.processing_class.save_pretrained(str(adapter))
    facts = _facts(task, trainer.state, best)
    if facts["loss_after"] >= facts["loss_before"]:
        log.warn(
            "train.worse",
            f"{facts['loss_measured_on']} loss rose from {facts['loss_before']:.4f} to {facts['loss_after']:.4f}: the "
            "adapter is worse than the base; lower train.learning_rate, or look at the data",
        )
    (adapter / paths.TRAINING).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for name in ("data.json", "sample.txt"):
        shutil.copyfile(task.data / name, report / name)


def _facts(task: Task, state: transformers.TrainerState, best: int | None) -> dict[str, Any]:
    """What the report and the merge must know of this training."""
    training = [e["loss"] for e in state.log_history if "loss" in e]
    evaluation = {e["step"]: e["eval_loss"] for e in state.log_history if "eval_loss" in e}
    kept = best or state.global_step
    measured = bool(evaluation)
    return {
        "base": task.config.model.base,
        "inputs": dict(task.inputs),
        "steps": state.global_step,
        "step_kept": kept,
        "epochs": state.epoch,
        "tokens": int(state.num_input_tokens_seen),
        "loss_measured_on": "eval" if measured else "train",
        "loss_before": evaluation.get(0) if measured else training[0],
        "loss_after": evaluation.get(kept) if measured else training[-1],
    }
