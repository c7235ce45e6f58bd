"""One attempt at training, as one of its processes: load, resume, train, choose the best, write the result."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset

from job import checkpoint, errors, failures, lease, log, manifest, paths, storage
from job.checkpoint import state as states
from job.config import Config
from job.inputs import AFTER_A_LOSS, Task
from job.model import tokenizer
from job.model.vision import Vision
from job.preemption import Notice
from job.train import deterministic, pictures, placement, result
from job.train.arguments import arguments
from job.train.borders import Borders
from job.train.cadence import Cadence, due
from job.train.order import Order, filled
from job.train.packed_weights import PackedWeightsCheck
from job.train.pairs import Collator, PairTrainer
from job.train.progress import Progress
from job.train.ranks import Ranks, Stuck
from job.train.trainer import Exact, Trainer

_MARGIN_SECONDS = 3.0


def train(task: Task, notice: Notice, stuck: Stuck, rank: int, listening: int | None) -> None:
    """Train until done or asked to stop, as process `rank`; a sealed ``task.out`` is the sign of the former.

    Rank 0 is found by the others at the socket that is its open file `listening`. `stuck` is called, in another thread,
    when this process stands still for too long. Raises `errors.Preempted` after saving, `errors.PeerError` when another
    process is gone, and `errors.ModelError` when training cannot give a usable adapter.
    """
    datasets.disable_progress_bars()
    if task.config.train.deterministic:
        deterministic.use_deterministic_kernels()
    timeout = task.config.distributed.timeout_minutes * 60
    ranks = Ranks(task.team, rank)
    try:
        with _explaining_failures(task, ranks):
            ranks.meet(listening, timeout, stuck)
        with ranks.together(), deterministic.named_operation(), _explaining_failures(task, ranks):
            if ranks.first:
                _lead(task, notice, ranks)
            else:
                _run(_trainer(task, None, notice, None, ranks), None, notice, task, None, ranks)
    finally:
        ranks.leave()


def _lead(task: Task, notice: Notice, ranks: Ranks) -> None:
    """As the process that saves, and that writes the result."""
    store = storage.connect(task.config.run.url)
    if task.config.run.conditional_writes == "emulated":
        store = storage.checked(store, paths.PROBE, required=False)
    owner = lease.Lease(store, task.start.lease, task.config.run.lease_seconds)
    checkpoints = checkpoint.Checkpoints(
        store, task.start.attempt, task.inputs, task.config.checkpoint.keep, task.scratch, owner.confirm
    )
    made = task.scratch / "made"
    progress = Progress(made / "report")
    saving = checkpoint.Background(checkpoints)
    trainer = _trainer(task, saving, notice, progress, ranks)
    _run(trainer, saving, notice, task, progress, ranks)
    log.phase("publish")
    best = trainer.state.best_global_step if task.config.train.keep_best else None
    checkpoints.forget(trainer.state.global_step, best)  # what a kill in the last retention left
    result.write(task, trainer, checkpoints, best, made)
    owner.confirm()  # the place is that of every attempt on this machine
    manifest.seal(made)
    shutil.rmtree(task.out, ignore_errors=True)
    made.rename(task.out)


def _trainer(
    task: Task, saving: checkpoint.Background | None, notice: Notice, progress: Progress | None, ranks: Ranks
) -> Trainer:
    settings, evaluation = task.config, task.data / "eval.arrow"
    evaluates = evaluation.is_file()
    keep_best = settings.train.keep_best and evaluates
    words = tokenizer.load(task.base, settings.data.template, trust_remote_code=settings.model.trust_remote_code)
    tokenizer.pad(words, tokenizer.rows(task.base, trust_remote_code=settings.model.trust_remote_code))
    on_start = evaluates and _evaluate_first(settings, task.resumed)
    told = arguments(task, evaluates=evaluates, on_start=on_start)  # first: DeepSpeed listens to how a model is loaded
    log.event("train.load", f"loading the base model ({settings.model.quantization})")
    rows = Dataset.from_file(str(task.data / "train.arrow"))
    whole = filled(rows, settings.train.global_batch_size)
    micro = settings.train.micro_batch_size * ranks.size
    placed = placement.adapted(task)
    kind, more = _kind(task, words, seeing=pictures.COLUMN in rows.column_names)
    trainer = kind(
        saving,
        Cadence(notice, saving, task, ranks, keep_best=keep_best),
        ranks,
        Order(len(rows), len(whole), settings.run.seed),
        keep_best=keep_best,
        model=placed.model,
        args=told,
        processing_class=words,
        train_dataset=whole,
        eval_dataset=filled(Dataset.from_file(str(evaluation)), micro) if evaluates else None,
        callbacks=[Exact(settings.run.seed), *([progress] if progress else [])],
        **more,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if placed.packed:
        trainer.add_callback(PackedWeightsCheck(trainer, placed.packed))
    if settings.data.packing:
        trainer.add_callback(Borders(trainer, rows[0]["input_ids"]))
    placement.settle(trainer.model, task)
    return trainer


def _kind(task: Task, words: "transformers.PreTrainedTokenizerBase", *, seeing: bool) -> tuple[type[Trainer], Any]:
    """The trainer for what the examples are, and what it needs besides."""
    if task.config.train.method == "dpo":
        return PairTrainer, {"beta": task.config.train.beta, "data_collator": Collator(int(words.pad_token_id or 0))}
    if seeing:
        vision = Vision(task.base, words, task.config.data.max_pixels)
        blank = str(words.eos_token) * 2
        return pictures.SeeingTrainer, {
            "data_collator": pictures.Collator(vision, blank, always=task.team.strategy != "ddp")
        }
    return Trainer, {}


def _evaluate_first(settings: Config, resumed: Path | None) -> bool:
    """A fresh run measures the base model; a resumed one what the last attempt had no time for."""
    return resumed is None or due(_state(resumed), settings.train.eval_every)


def _state(resumed: Path) -> transformers.TrainerState:
    state: transformers.TrainerState = transformers.TrainerState.load_from_json(str(resumed / states.TRAINER))
    return state


def _run(
    trainer: Trainer, saving: checkpoint.Background | None, notice: Notice, task: Task, progress: Progress | None,
    ranks: Ranks,
) -> None:  # fmt: skip
    resumed = task.resumed
    if resumed and (state := _state(resumed)).global_step >= state.max_steps:
        log.event("train.over", f"all {state.max_steps} steps are done already", step=state.global_step)
        trainer.state = state
        if progress:
            progress.replay(state)
        if trainer.args.eval_on_start:
            trainer.catch_up()
        ranks.rest()
        if progress:
            progress.close()
        return
    if resumed:
        step = _state(resumed).global_step
        log.event("train.resume", f"going on after step {step}", step=step)
    notice.check()
    started = time.monotonic()
    try:
        with notice.deferred():
            with ranks.together():
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            ranks.rest()
            log.phase("upload", step=trainer.state.global_step)
            if saving:
                saving.finish(lambda: _left(notice, task))
    except errors.PeerError:
        until = time.monotonic() + AFTER_A_LOSS - _MARGIN_SECONDS
        if saving:
            saving.finish(lambda: until - time.monotonic())
        raise
    log.event(
        "train.done",
        f"trained {trainer.state.global_step} steps",
        step=trainer.state.global_step,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _explaining_failures(task: Task, ranks: Ranks) -> Iterator[None]:
    """Raise what failed, and what to do, in place of what torch raises for a GPU or a memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        free = _free_gpu_memory()
        failure = failures.find(str(e), free)
        if failure is None and isinstance(e, MemoryError | torch.OutOfMemoryError):
            kind: failures.Kind = "host memory" if isinstance(e, MemoryError) else "gpu memory"
            failure = failures.Failure(kind, f"{type(e).__name__} {e}".strip())
        if failure is None or failure.kind == "peer":
            raise
        more = f" at {ranks.at}"
        if failure.kind == "gpu memory" and free is not None:
            reserved = torch.cuda.memory_reserved()
            more += f" ({log.size(free)} free, {log.size(reserved)} held by training)"
        raise failures.explain(failure, task.config, more) from e


def _free_gpu_memory() -> int | None:
    """Return the bytes that are free on this process's GPU; None if CUDA cannot be asked."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        return None
    try:
        return torch.cuda.mem_get_info()[0]
    except RuntimeError:  # after most faults every further call fails
        return None


def _left(notice: Notice, task: Task) -> float:
    """Seconds until the cluster kills us, as far as we know."""
    return task.grace - (time.monotonic() - notice.since) if notice.reason else math.inf
