"""Direct preference optimization: learn to prefer one answer to another, over the base model (arXiv 2305.18290).

The reference is the base itself, by the same weights with the adapter switched off. TRL's own DPO trainer averages over
the pairs of a micro batch, tokenizes by itself and keeps a copy of the adapter as reference; this one weighs every pair
of the global batch alike, as ours weighs tokens, and does the rest as for single answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from job.model.tokenizer import IGNORED
from job.train.trainer import Trainer

_COLUMNS = ["input_ids", "labels", "rejected_input_ids", "rejected_labels"]


@dataclass
class Collator:
    """Makes a batch of pairs: the preferred conversations first, and then the others in the same order."""

    pad_token_id: int

    def __call__(self, pairs: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        rows = [
            {name: pair[f"{prefix}{name}"] for name in ("input_ids", "labels")}
            for prefix in ("", "rejected_")
            for pair in pairs
        ]
        made: dict[str, torch.Tensor] = DataCollatorForLanguageModeling(pad_token_id=self.pad_token_id)(rows)
        return made


class PairTrainer(Trainer):
    """The trainer for pairs of answers; everything that is exact about the other one is so here too."""

    def __init__(self, *given: Any, beta: float, **how: Any) -> None:
        self._beta = beta
        super().__init__(*given, **how)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None  # noqa: FBT001, FBT002
    ) -> Any:  # fmt: skip
        """-log sigmoid(beta x (log-ratio of the preferred answer - that of the other)), equation 7 of the paper.

        The log-ratio of an answer is log p(answer) with the adapter - log p(answer) without, summed over its tokens.
        """
        inputs = {**inputs, "use_cache": False, "fused_lm_head": True}
        learned = model(**inputs).log_probs.sum(1)
        with torch.no_grad(), self.accelerator.unwrap_model(self.model).disable_adapter():
            reference = model(**inputs).log_probs.sum(1)
        chosen, rejected = (learned - reference).chunk(2)
        valid = _valid(inputs["labels"])
        losses = -logsigmoid(self._beta * (chosen - rejected)) * valid
        if num_items_in_batch is None:
            loss = losses.sum() / valid.sum().clamp(min=1)
        else:  # counts the pairs of all processes, and their gradients are averaged
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        self._note(chosen.detach(), rejected.detach(), valid)
        return (loss, None) if return_outputs else loss

    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor, valid: torch.Tensor) -> None:
        """Keep for the log how often the preferred answer has the higher reward, and by how much."""
        sums = torch.stack([((chosen > rejected) * valid).sum(), ((chosen - rejected) * valid).sum(), valid.sum()])
        right, margin, count = self.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
        if count:
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["rewards/accuracies"].append(right / count)
            metrics["rewards/margins"].append(self._beta * margin / count)

    def _weight(self, inputs: Any) -> int:
        return int(_valid(inputs["labels"]).sum().item())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The pairs of a step; the stock count is that of tokens, which it takes from here."""
        counted = []
        for batch in batch_samples:
            valid = _valid(batch["labels"])
            counted.append({"labels": valid, "shift_labels": torch.where(valid, 0, IGNORED)})
        return super()._get_num_items_in_batch(counted, device)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = _COLUMNS


def _valid(labels: torch.Tensor) -> torch.Tensor:
    """Which pairs of a batch have something to compare: all but the blank ones that fill it up."""
    answered = (labels != IGNORED).any(1)
    chosen, rejected = answered.chunk(2)
    return chosen & rejected
