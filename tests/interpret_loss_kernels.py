"""Compare TRL's Triton loss kernels, interpreted on the CPU, with full logits in float64.

Run with TRITON_INTERPRET=1. The losses are computed by `Trainer.compute_loss` and
`PairTrainer.compute_loss` themselves, on top of TRL's fused LM head, of which only the question
whether the tensors are on a GPU is answered with yes. Prints a line of JSON for each case: relative
errors of the loss and of its gradients, and how large they may be.
"""

import contextlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig
from triton.runtime.interpreter import InterpretedFunction
from trl import SFTConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils

from job.model.tokenizer import IGNORED
from job.train.pairs import PairTrainer
from job.train.trainer import Trainer

HIDDEN, BETA, ITEMS = 32, 0.3, 11
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float16 is what a T4 computes in
ROWS, LENGTH = 4, 7


@dataclass(frozen=True)
class Case:
    """One comparison."""

    method: str
    dtype: torch.dtype
    vocabulary: int
    chunk: int
    """Columns of a tile of logits."""
    softcap: float | None = None
    scale: float = 1.0
    train_head: bool = True


class Backbone(torch.nn.Module):
    """All layers below the LM head: their output is a parameter, whose gradient is compared."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = (2, ROWS, LENGTH, HIDDEN)  # with the adapter, and without
        self.hidden = torch.nn.Parameter(torch.randn(shape).to(case.dtype))
        self.adapted = True

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden[0 if self.adapted else 1])


class Model(torch.nn.Module):
    """As much of a PEFT model as the trainers and TRL's fused LM head look at."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.config = LlamaConfig(final_logit_softcapping=case.softcap, logit_scale=case.scale)
        self.base_model = Backbone(case)
        self.head = torch.nn.Linear(HIDDEN, case.vocabulary, bias=False, dtype=case.dtype)
        torch.nn.init.normal_(self.head.weight, std=0.4)
        self.head.weight.requires_grad_(case.train_head)
        utils.add_fused_lm_head(self, outputs=("log_probs", "entropy", "is_top1"))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, **_: object) -> None:
        raise NotImplementedError("the fused LM head replaces it")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.base_model.adapted = False
        yield
        self.base_model.adapted = True


def trainer_of(case: Case, model: Model, folder: Path) -> Trainer:
    """The trainer of the method, with what its loss reads and without a run around it."""
    kind = PairTrainer if case.method == "dpo" else Trainer
    trainer: Any = kind.__new__(kind)
    trainer.args = SFTConfig(output_dir=str(folder), use_cpu=True, report_to=[], max_length=None)
    trainer.model, trainer.accelerator = model, Accelerator(cpu=True)
    trainer.aux_loss_enabled, trainer.compute_loss_func, trainer.label_smoother = False, None, None
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.is_deepspeed_enabled = False
    trainer._total_train_tokens, trainer._tp_size, trainer._beta = 0, 1, BETA
    return trainer  # type: ignore[no-any-return]


def labels_of(case: Case) -> torch.Tensor:
    """Labels with ignored ones at the beginning, in the middle, and in whole rows."""
    labels = torch.randint(0, case.vocabulary, (ROWS, LENGTH))
    labels[:, 0] = case.vocabulary - 1  # shifted away
    labels[0, 1:3] = IGNORED
    labels[1, 4] = IGNORED
    labels[1, 5] = case.vocabulary - 1  # in the last, incomplete block
    if case.method == "sft":
        labels[3] = IGNORED
    return labels


def reference_loss(
    case: Case,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The loss by full logits: cross-entropy, or equation 7 of the DPO paper."""
    logits = hidden[:, :, :-1] @ weight.T * case.scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    wanted = labels[:, 1:]
    picked = wanted.clamp(min=0)[None, ..., None].expand(2, -1, -1, 1)
    scores = logits.log_softmax(-1).gather(-1, picked).squeeze(-1) * (wanted != IGNORED)
    if case.method == "sft":
        return -scores[0].sum() / ITEMS
    ratios = scores.sum(-1)[0] - scores.sum(-1)[1].detach()
    better, worse = ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (better - worse)).sum() / ITEMS


def tolerance(case: Case) -> float:
    """Return the relative error that is allowed: four roundings.

    They are those of a logit in its tile, of the softmax, of the gradient in the tile, and of what
    is returned. In 16 bits matrix products add in float32, and a rounding counts as half the unit
    roundoff (2^-8 of bfloat16, 2^-11 of float16), for the errors of many numbers average out. In
    float32 it counts whole (2^-24), and so do the addends of a logit.

    Measured: at most 0.71 of what is allowed in bfloat16, 0.56 in float16 and 0.20 in float32.
    """
    if case.dtype == torch.float32:
        return 4 * 2.0**-24 * HIDDEN
    roundoff = torch.finfo(case.dtype).eps / 2
    return 4 * roundoff / 2


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


def compare(case: Case, folder: Path) -> dict[str, object]:
    """Return the errors of one case."""
    torch.manual_seed(3)
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = case.chunk
    model, labels = Model(case), labels_of(case)
    inputs = {"labels": labels, "attention_mask": torch.ones_like(labels)}
    trainer = trainer_of(case, model, folder)
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(ITEMS))
    loss.backward()

    parameters = (model.base_model.hidden, model.head.weight)
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    expected = reference_loss(case, *exact, labels)
    expected.backward()
    found = {"loss": relative(loss.detach(), expected.detach())}
    found["hidden"] = relative(model.base_model.hidden.grad, exact[0].grad)
    if case.train_head:
        found["head"] = relative(model.head.weight.grad, exact[1].grad)
    return {
        **{name: str(value) for name, value in vars(case).items()},
        "errors": found,
        "tolerance": tolerance(case),
        "ignored": float(model.base_model.hidden.grad[0, 0, :2].float().abs().max()),
    }


def main() -> None:
    interpreted = isinstance(chunked_logprob._forward_kernel, InterpretedFunction)
    assert interpreted, "set TRITON_INTERPRET=1"
    chunked_logprob._use_triton = utils._use_triton = lambda _: True  # else only on a GPU
    cases = [
        Case(method, dtype, vocabulary, chunk, softcap, scale, train_head=softcap is None)
        for method, dtype in itertools.product(("sft", "dpo"), DTYPES)
        for vocabulary, chunk, softcap, scale in (
            (1000, 32_768, None, 1.0),  # less than one block of 1024 columns
            (2500, 1500, None, 1.0),  # two tiles, each of two blocks, none of them full
            (2049, 2048, 10.0, 0.5),  # a last tile of one column
        )
    ]
    cases.append(Case("sft", torch.bfloat16, 33_001, 32_768))  # as TRL tiles it, unchanged
    with TemporaryDirectory() as folder:
        for case in cases:
            sys.stdout.write(json.dumps(compare(case, Path(folder))) + "\n")


if __name__ == "__main__":
    main()
