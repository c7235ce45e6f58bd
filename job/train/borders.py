"""Whether a model keeps the examples of a packed sequence apart, asked of the model itself.

Most families do by the position of each token, which begins at 0 in each example. Some ignore it (of those that
transformers 5.23 has: Falcon, BLOOM, OPT, GPT-OSS, and what carries a state from token to token), with some kinds of
attention, and say nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from job import errors

_TOKENS = 16
_SHARE = 0.01  # of what reading another example changes; where none is read, nothing changed on the CPU


class Borders(TrainerCallback):
    """Raises `errors.ModelError` before the first step if the model of `trainer` reads across them in `tokens`."""

    def __init__(self, trainer: Trainer, tokens: Sequence[int]) -> None:
        self._trainer = trainer
        self._tokens = tokens[:_TOKENS]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        network: Any = self._trainer.model
        ids = torch.tensor([self._tokens], device=args.device)
        # ZeRO-3 fetches weights for a forward pass alone, and for a backward one only in its own engine.
        asked = seems_apart if is_deepspeed_zero3_enabled() else kept_apart  # type: ignore[no-untyped-call]
        network.eval()
        with self._trainer.accelerator.autocast():
            apart = asked(network, ids)
        network.train()
        if not apart:
            kind, attention = network.config.model_type, network.config._attn_implementation  # noqa: SLF001 - no other name
            raise errors.ModelError(
                f"data.packing: {kind} with {attention} attention does not keep packed examples apart, and would learn "
                "from one what follows in another: set data.packing to false"
            )


def kept_apart(network: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether nothing of what is said to the second half of `ids`, [1, tokens], comes from the first, packed before it.

    Told by the gradient, which is zero then, and not by what is said: that is rounded in another way in another place.
    Raises `errors.ModelError` if what is said is no number.
    """
    half = ids.shape[1] // 2
    read: list[torch.Tensor] = []

    def note(_module: torch.nn.Module, _given: object, embedded: torch.Tensor) -> torch.Tensor:
        read.append(embedded.detach().requires_grad_())
        return read[-1]

    handle = network.get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            said = _said(network, ids, half).logsumexp(-1).sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(said, read[:1])
    return not gradient[0, :half].any()


def seems_apart(network: PreTrainedModel, ids: torch.Tensor) -> bool:
    """The same without a gradient: whether what is said to the second half stays the same when the first is another.

    Compared with how much it changes where both are one example.
    """
    half = ids.shape[1] // 2
    words = network.config.get_text_config().vocab_size
    other = torch.cat([(ids[:, :half] + 1) % words, ids[:, half:]], dim=1)
    with torch.no_grad():
        change = [_said(network, ids, at) - _said(network, other, at) for at in (half, 0)]
    packed, together = (float(each[half - ids.shape[1] :].norm()) for each in change)
    return packed <= _SHARE * together


def _said(network: PreTrainedModel, ids: torch.Tensor, border: int) -> torch.Tensor:
    """The logits of what stands behind the `border`, [tokens, vocabulary], packed there."""
    places = torch.cat([torch.arange(border), torch.arange(ids.shape[1] - border)])[None].to(ids.device)
    said: torch.Tensor = network(input_ids=ids, position_ids=places, use_cache=False).logits[0, border:].float()
    if said.isnan().any():
        raise errors.ModelError(
            "model.base: it answers with NaN before any training: it is damaged, or too large for model.compute_dtype "
            "float16"
        )
    return said
