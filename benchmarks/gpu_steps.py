"""Models, batches and single training steps, as the job makes them, for the GPU checks."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from gpu_scale import Scale
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from job import config
from job.model import lora, weights
from job.model.tokenizer import IGNORED

RECIPE = {"quantization": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}

Batch = dict[str, torch.Tensor]


def load(base: Path, model: dict[str, Any]) -> PreTrainedModel:
    """Return the model at `base`, loaded as a run with these keys of `model` does."""
    settings = config.Model.model_validate({"base": base.as_uri(), **model})
    return weights.for_training(base, settings)


def adapt(model: PreTrainedModel, settings: config.Lora | None = None) -> PreTrainedModel:
    """Return the model with an adapter, a fused head and gradient checkpointing, as the job does.

    `settings` are those of the adapter, by default the job's.
    """
    adapted: Any = lora.adapted(model, settings or config.Lora())
    lora.draw(adapted, 0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, and then most gradients would be zero too
            parameter.data.normal_(std=1e-3)
    add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs",))
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.config.use_cache = False
    adapted.train()
    return adapted  # type: ignore[no-any-return]


def make_batch(scale: Scale, micro_batch: int, length: int, *, packed: bool) -> Batch:
    """Return sequences of `length` and three quarters of it: padded rows, or one packed row."""
    lengths = [length - (row % 2) * (length // 4) for row in range(micro_batch)]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, scale.vocabulary, (size,), generator=draw) for size in lengths]
    if packed:
        ids = torch.cat(rows)[None]
        places = torch.cat([torch.arange(size) for size in lengths])[None]
        labels = torch.where(places == 0, IGNORED, ids)
        batch = {"input_ids": ids, "labels": labels, "position_ids": places}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        labels = pad(rows, batch_first=True, padding_value=IGNORED)
        batch = {
            "input_ids": pad(rows, batch_first=True),
            "labels": labels,
            "attention_mask": mask,
        }
    return {name: value.to(scale.device) for name, value in batch.items()}


def run_step(model: PreTrainedModel, batch: Batch) -> float:
    """Leave the gradients of one step in the model, and return the seconds that it took."""
    model.zero_grad()
    torch.manual_seed(0)  # for the dropout
    synchronize()
    begun = time.monotonic()
    with torch.autocast(batch["labels"].device.type, torch.bfloat16):  # as accelerate for bf16
        loss = -model(**batch, fused_lm_head=True).log_probs.sum()
    loss.backward()
    synchronize()
    return time.monotonic() - begun


def synchronize() -> None:
    """Wait until the GPU, if there is one, has computed all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give what no tensor needs any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
