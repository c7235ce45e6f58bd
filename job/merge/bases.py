"""The weights that an adapter is added to, where they are not simply those in the base's files."""

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from job import config, errors
from job.merge.sources import Source
from job.model.pieces import Pieces
from job.model.prequantized import PACKED, Scheme
from job.model.prequantized.linear import QuantizedLinear
from job.model.shard import Outline


@dataclass(frozen=True)
class Unpacked:
    """The weight of a layer that GPTQ or AWQ quantized, as it is trained on."""

    files: Pieces
    layer: str
    scheme: Scheme

    @property
    def outline(self) -> Outline:
        inputs, outputs = self.scheme.unpacked(*self.files.blank(f"{self.layer}.{PACKED[0]}").shape)
        return Outline(torch.float32, (outputs, inputs))

    @property
    def step(self) -> int:
        return self.outline.rows

    def rows(self, first: int, last: int) -> torch.Tensor:
        names = [leaf for leaf in PACKED if f"{self.layer}.{leaf}" in self.files.names]
        held = {leaf: self.files.read(f"{self.layer}.{leaf}") for leaf in names}
        outputs, inputs = self.outline.shape
        plain = nn.Linear(inputs, outputs, bias=False, device="meta")
        packed = QuantizedLinear(plain, self.scheme, held, torch.float32)
        packed.settle(self.layer)
        return packed.weight[first:last]


@dataclass(frozen=True)
class Rounded:
    """The weight of a layer as it was after model.quantization: what the adapter saw while it was trained."""

    of: Source
    settings: config.Model
    dtype: torch.dtype
    """Of the activations in training: the weight was rounded to it before, and is after."""

    @property
    def outline(self) -> Outline:
        return Outline(torch.float32, self.of.outline.shape)

    @property
    def step(self) -> int:
        return self.outline.rows

    def rows(self, first: int, last: int) -> torch.Tensor:
        weight = self.of.rows(0, self.outline.rows).to(self.dtype)
        if torch.cuda.is_available():  # where it was quantized
            weight = weight.cuda()
        if self.settings.quantization == "int8":
            held, largest, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            made = bnb.int8_vectorwise_dequant(held, largest)
        else:
            packed, state = bnb.quantize_4bit(
                weight, compress_statistics=self.settings.double_quant, quant_type=self.settings.quantization
            )
            made = bnb.dequantize_4bit(packed, state)
        whole: torch.Tensor = made
        return whole[first:last].float().cpu()


@dataclass(frozen=True)
class Returned:
    """A tensor of the files of which transformers makes other weights, which are changed and made the tensor again."""

    files: Pieces
    network: PreTrainedModel
    name: str
    change: Callable[[str, Source], Source]
    """What becomes of a weight of the model."""

    @property
    def outline(self) -> Outline:
        return Outline(torch.float32, tuple(self.files.blank(self.name).shape))

    @property
    def step(self) -> int:
        return self.outline.rows

    def rows(self, first: int, last: int) -> torch.Tensor:
        made = self.files.made(self.files.changed[self.name].target)
        changed = {name: _all(self.change(name, Held(value))) for name, value in made.items()}
        _, called = self.files.place(self.name)
        back: dict[str, torch.Tensor] = revert_weight_conversion(self.network, changed)
        if called not in back:
            raise errors.ModelError(
                f"model.base: transformers cannot make {called} again of what it made of it: merge with PEFT"
            )
        return back[called][first:last]


@dataclass(frozen=True)
class Held:
    """A tensor in memory."""

    value: torch.Tensor

    @property
    def outline(self) -> Outline:
        return Outline(self.value.dtype, tuple(self.value.shape))

    @property
    def step(self) -> int:
        return self.outline.rows

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.value[first:last]


def _all(source: Source) -> torch.Tensor:
    return source.rows(0, source.outline.rows).float()
