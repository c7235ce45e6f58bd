"""Whether a model keeps the examples of a packed sequence apart, asked of the model itself.

Most families do by the position of each token, which begins at 0 in each example. Some ignore it (of those that
transformers 5.23 has: Falcon, BLOOM, OPT, GPT-OSS, and what carries a state from token to token), with some kinds of
attention, and say nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import errors

_TOKENS = 16
_SHARE = 0.25  # of what reading the wrong example changes; rounding is a hundredth


class Borders(TrainerCallback):
    """Raises `errors.ModelError` before the first step if the model of `trainer` reads across them in `tokens`."""

    def __init__(self, trainer: Trainer, tokens: Sequence[int]) -> None:
        self._trainer = trainer
        self._tokens = list(dict.fromkeys(tokens))[:_TOKENS]  # where all are the same, nothing can be told apart

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        network: Any = self._trainer.model
        ids = torch.tensor([self._tokens], device=args.device)
        network.eval()
        with torch.no_grad(), self._trainer.accelerator.autocast():
            apart = kept_apart(network, ids)
        network.train()
        if not apart:
            kind, attention = network.config.model_type, network.config._attn_implementation  # noqa: SLF001 - no other name
            raise errors.ModelError(
                f"data.packing: {kind} with {attention} attention does not keep packed examples apart, and would learn "
                "from one what follows in another: set data.packing to false"
            )


def kept_apart(network: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether the second half of `ids`, [1, tokens], packed behind the first, gives what it gives alone."""
    half = ids.shape[1] // 2
    rest = ids.shape[1] - half
    places = torch.arange(ids.shape[1], device=ids.device)[None]

    def said(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(input_ids=ids, position_ids=places, use_cache=False).logits
        return logits[0, -rest:].float()

    alone = said(ids[:, half:], places[:, :rest])
    packed = said(ids, torch.cat([places[:, :half], places[:, :rest]], dim=1))
    together = said(ids, places)
    return float((packed - alone).norm()) <= _SHARE * float((together - alone).norm())
