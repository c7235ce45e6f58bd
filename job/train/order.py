"""In which order the examples come: a function of the seed and the epoch, whatever the number of processes."""

from collections.abc import Iterator

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.model.tokenizer import IGNORED

_BLANK_TOKENS = 2  # the least that has something to predict


class Order(Sampler[int]):
    """A new order of the first `examples` rows in each epoch; the rest, `filled` up, always come last."""

    def __init__(self, examples: int, filled: int, seed: int) -> None:
        self._examples, self._filled, self._seed, self.epoch = examples, filled, seed, 0

    def __len__(self) -> int:
        return self._filled

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self._seed + self.epoch)
        yield from torch.randperm(self._examples, generator=drawn).tolist()
        yield from range(self._examples, self._filled)


class Epochs(TrainerCallback):
    """Tells the order which epoch it is; the trainer's own way loses that between accelerate's wrappers."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._order.epoch = int(state.epoch or 0)


def filled(rows: Dataset, multiple: int) -> Dataset:
    """`rows` and as many blank ones that their number is a multiple of `multiple`.

    A blank row has nothing to predict, so it adds nothing to a loss or a gradient that is weighed by tokens. Without
    it the libraries repeat examples to give every process as many, and the result depends on how many there are.
    """
    lacking = -len(rows) % multiple
    if not lacking:
        return rows
    few = rows[0]["input_ids"][:_BLANK_TOKENS]
    blank = {"input_ids": few, "labels": [IGNORED] * len(few), "seq_lengths": [len(few)], "text": "", "pictures": []}
    columns = {name: [blank[name.removeprefix("rejected_")]] * lacking for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])
