"""What training leaves on the disk: the adapter that is kept, its tokenizer, the figures, and how it was made."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from job import card, checkpoint, log, paths
from job.checkpoint import state
from job.inputs import Task
from job.model import vision, weights
from job.train.trainer import Trainer


def write(task: Task, trainer: Trainer, checkpoints: checkpoint.Checkpoints, best: int | None, made: Path) -> None:
    """Write the adapter of step `best`, or of the last one, and what is to be known of it, to `made`."""
    if best and best != trainer.state.global_step:
        log.event(
            "train.best",
            f"the best eval loss was {trainer.state.best_metric:.4f} at step {best}: keeping that adapter",
            step=best,
        )
    adapter, report = made / "adapter", made / "report"
    shape = trainer.model.peft_config["default"]
    shape.base_model_name_or_path = task.config.model.base  # not where the cache of this machine is
    kept = checkpoints.at(best or trainer.state.global_step)  # not the live one, of which this process may hold a part
    weights = state.adapter(kept.path)
    _tell_idle(weights)
    trainer.model.save_pretrained(str(adapter), state_dict=weights)
    trainer.processing_class.save_pretrained(str(adapter))
    vision.copy(task.base, adapter)
    facts = _facts(task, trainer.state, best)
    if facts["loss_after"] >= facts["loss_before"]:
        log.warn(
            "train.worse",
            f"{facts['loss_measured_on']} loss rose from {facts['loss_before']:.4f} to {facts['loss_after']:.4f}: the "
            "adapter is worse than the base; lower train.learning_rate, or look at the data",
        )
    (adapter / paths.TRAINING).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (adapter / card.NAME).write_text(card.adapter(task.config, task.base, facts), encoding="utf-8")
    for name in ("data.json", "sample.txt", paths.HELD_OUT):
        shutil.copyfile(task.data / name, report / name)


def _tell_idle(weights: Mapping[str, torch.Tensor]) -> None:
    """Say which layers learned nothing: a model may read a layer's weights and never ask the layer."""
    second = [name for name in weights if "lora_B" in name]
    idle = [name.partition(".lora_B")[0] for name in second if not weights[name].any()]
    if 0 < len(idle) < len(second):  # of none at all the merge says so
        log.warn(
            "train.idle",
            f"{len(idle)} of {len(second)} layers with an adapter learned nothing, the first is {idle[0]}: this model "
            "does not compute with them in the usual way, or its experts were never chosen",
            layers=idle,
        )


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
        "compute_dtype": str(weights.compute_dtype(task.config.model.compute_dtype)).removeprefix("torch."),
        "loss_measured_on": "eval" if measured else "train",
        "loss_before": evaluation.get(0) if measured else training[0],
        "loss_after": evaluation.get(kept) if measured else training[-1],
    }
