"""The base model piece by piece: an outline without weights, and the weights of one module when they are wanted.

So a model that no GPU could hold whole is shared out while it is loaded. Every process reads the same files, through
the page cache that they share, and no process holds more than a layer that it does not keep.
"""

import copy
import functools
import json
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)  # fmt: skip
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import local_torch_dtype, set_zero3_state
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from job import errors
from job.model import parts
from job.model.prequantized import PACKED
from job.model.shard import Shard

_WRAPPED = ("base_model.model.", ".base_layer")  # what PEFT adds to a name


@dataclass(frozen=True)
class Change:
    """How transformers makes weights of a model of some tensors in its files."""

    rule: WeightConverter
    pattern: str
    """Which of the rule's patterns a tensor's name fits."""
    target: str
    """The first of the weights that are made."""


class Pieces:
    """The weights in the safetensors files of `base`, and on which device they are wanted, in which number format."""

    def __init__(self, base: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self._device, self._dtype = base, device, dtype
        self.changed: dict[str, Change] = {}
        """What transformers would make something else of while loading."""
        self._network: PreTrainedModel | None = None
        self._in_float32: re.Pattern[str] | None = None
        """Names of weights that transformers keeps in float32, whatever the dtype."""
        self._files: dict[str, tuple[Shard, str]] = {}
        for file in map(Shard, weight_files(base)):
            if twice := sorted(file.tensors.keys() & self._files.keys()):
                raise errors.ModelError(
                    f"model.base: {twice[0]} is in {file.path.name} and in {self._files[twice[0]][0].path.name} "
                    f"({base}): take one out"
                )
            self._files |= {key: (file, key) for key in file.tensors}

    @property
    def names(self) -> AbstractSet[str]:
        """Of all tensors in the files."""
        return self._files.keys()

    def call_as(self, network: PreTrainedModel) -> None:
        """Call each tensor as the `network` does, where its family has other names for it in files.

        One that transformers would also change while loading is nothing that the network has.
        """
        told = get_model_conversion_mapping(network)
        rename = [each for each in told if isinstance(each, WeightRenaming)]
        change = [each for each in told if isinstance(each, WeightConverter)]
        there, files = network.state_dict(), self._files
        makers = {pattern: each for each in change for pattern in each.source_patterns}
        self._files = {}
        for key, place in files.items():
            stem, _, leaf = key.rpartition(".")
            usual = f"{stem}.weight" if leaf in PACKED else key
            name, changed = rename_source_key(usual, rename, change, network.base_model_prefix, there)
            if name not in there and usual in there:
                name, changed = usual, None
            if leaf in PACKED:
                name = f"{name.removesuffix('.weight')}.{leaf}"
            target, name = name, key if changed else name
            if name in self._files:
                raise errors.ModelError(
                    f"model.base: {name} is in the files twice, as {key} and as {self._files[name][1]}: take one out"
                )
            self._files[name] = place
            if changed:
                self.changed[name] = Change(makers[changed], changed, target)
        network._weight_conversions = [each for each in told if each.was_used()]  # type: ignore[assignment]  # noqa: SLF001 - as its loader does
        self._network = network
        plan = network._get_dtype_plan(self._dtype)  # noqa: SLF001 - as its loader does
        if plan:
            self._in_float32 = build_glob_alternation(list(plan))[0]

    @functools.cached_property
    def _conversions(self) -> dict[str, str]:
        """For each weight that is made of changed tensors, the target of their conversion."""
        found: dict[str, str] = {}
        for target in {each.target for each in self.changed.values()}:
            found |= dict.fromkeys(self.made(target, blank=True), target)
        return found

    def fit(self, network: PreTrainedModel) -> bool:
        """Return whether the files hold every weight of `network`, or what it is converted from.

        Tied weights may be missing. Where they are stored twice and differ, transformers does not
        tie them, and `fill` cannot load them.
        """
        own = {name for name, _ in network.named_parameters()}
        loadable = (self._files.keys() - self.changed.keys()) | self._conversions.keys()
        tied: dict[str, str] = network.all_tied_weights_keys
        stored_twice = [(name, other) for name, other in tied.items() if name in self._files]
        return own <= loadable and all(self.same(name, other) for name, other in stored_twice)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Load the weights of `module`, which is called `prefix` in the network, as far as they are still missing.

        Those of an adapter get memory, and no values yet.
        """
        for name, parameter in [(name, each) for name, each in module.named_parameters() if each.is_meta]:
            owner, _, leaf = name.rpartition(".")
            if parameter.requires_grad:
                made = nn.Parameter(torch.empty_like(parameter, device=self._device))
            else:
                key = _plain(f"{prefix}.{name}" if prefix else name)
                # bitsandbytes' layers in place of GPT-2's Conv1D have their weights transposed
                source = getattr(module.get_submodule(owner), "source_cls", nn.Linear)
                made = self._loaded(parameter, key, transposed=issubclass(source, Conv1D))
            setattr(module.get_submodule(owner), leaf, made)
        for name, buffer in list(module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            holder, key = module.get_submodule(owner), _plain(f"{prefix}.{name}" if prefix else name)
            kept = key in self._files and leaf not in holder._non_persistent_buffers_set  # noqa: SLF001 - torch tells nowhere else
            dtype = self._find_dtype(key, buffer)
            setattr(holder, leaf, (self.read(key).to(dtype) if kept else buffer).to(self._device))

    def _loaded(self, outline: nn.Parameter, key: str, *, transposed: bool) -> nn.Parameter:
        dtype = self._find_dtype(key, outline)
        if key in self._conversions:
            value = self.made(self._conversions[key], dtype=dtype)[key]
        else:
            value = self.read(key).to(dtype)
        if transposed and isinstance(outline, bnb.nn.Params4bit):
            value = value.T.contiguous()
        if value.shape != outline.shape:
            raise errors.ModelError(
                f"model.base: {key} has the shape {list(value.shape)} in its files, and {list(outline.shape)} in the "
                "model that config.json tells of: they do not belong together"
            )
        if isinstance(outline, bnb.nn.Params4bit):
            made = bnb.nn.Params4bit(value, requires_grad=False, **outline.__dict__)
            return cast("nn.Parameter", made.to(self._device))  # which quantizes it
        return nn.Parameter(value.to(self._device), requires_grad=False)

    def _find_dtype(self, name: str, outline: torch.Tensor) -> torch.dtype:
        """Return the dtype that transformers loads the weight or buffer `name` in."""
        if self._in_float32 and self._in_float32.search(name):
            return torch.float32
        # some classes choose a dtype themselves; what is quantized is read in that of activations
        return self._dtype if isinstance(outline, bnb.nn.Params4bit) else outline.dtype

    def made(
        self,
        target: str,
        *,
        blank: bool = False,
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return what transformers makes of the tensors of which `target` is made, by names.

        These are the names in the model that `call_as` was given. With `dtype` the tensors are cast
        first, as transformers does when it loads a model. With `blank` the result has shapes and no
        memory; then `errors.ModelError` is raised if the tensors do not belong together.
        """
        assert self._network is not None, "call_as comes first"
        parts = sorted((name for name, each in self.changed.items() if each.target == target), key=dot_natural_key)
        rule = copy.deepcopy(self.changed[parts[0]].rule)
        for name in parts:
            value: Any = self.blank(name) if blank else self.read(name)
            value = value if dtype is None else value.to(dtype)
            rule.add_tensor(target, name, self.changed[name].pattern, value)
        try:
            made = rule.convert(target, model=self._network, config=self._network.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as e:
            if not blank:  # such as too little memory
                raise
            raise errors.ModelError(
                f"model.base: {target} cannot be made of its {len(parts)} tensors in {self.base}, the "
                f"first is {parts[0]} ({e}): some are missing, or they belong to another model than "
                "config.json describes: upload the model again"
            ) from e
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def place(self, name: str) -> tuple[Shard, str]:
        """The file that holds the tensor of that name, and what it is called there."""
        return self._files[name]

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that name, in host memory."""
        file, called = self._files[key]
        return file.read(called)

    def same(self, key: str, other: str) -> bool:
        """Whether two tensors are equal, if both are there."""
        return other not in self._files or torch.equal(self.read(key), self.read(other))

    def blank(self, key: str) -> torch.Tensor:
        """Its shape and number format, without memory."""
        file, called = self._files[key]
        told = file.tensors[called]
        return torch.empty(told.shape, dtype=told.dtype, device="meta")


def skeleton(described: PretrainedConfig, dtype: torch.dtype, **how: object) -> PreTrainedModel:
    """The modules of the model alone: even its largest weight never has memory."""
    with torch.device("meta"):
        network: PreTrainedModel = kind(described).from_config(described, dtype=dtype, **how)
    network.tie_weights()
    return network


def kind(described: PretrainedConfig) -> Any:  # noqa: ANN401 - transformers' classes that choose a class have no base
    """How transformers calls models of that kind: those that see images are not among those that do not."""
    return AutoModelForImageTextToText if parts.sees(described) else AutoModelForCausalLM


def outline(
    described: PretrainedConfig, dtype: torch.dtype, quantization: BitsAndBytesConfig | None, **how: object
) -> PreTrainedModel:
    """The modules of the model that `described` is the config of, quantized where they will be, without weights."""
    with set_zero3_state(), init_empty_weights(include_buffers=False):  # DeepSpeed cannot share out what has no memory
        network: PreTrainedModel = kind(described).from_config(described, dtype=dtype, **how)
    if quantization is not None:
        quantize(network, quantization, dtype)
    network.tie_weights()  # which `init_empty_weights` undoes
    network.requires_grad_(requires_grad=False)
    network.eval()  # type: ignore[no-untyped-call]
    return network


def quantize(network: PreTrainedModel, how: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Replace the layers of `network` that `how` quantizes, still without weights.

    Their biases have `dtype`.
    """
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
    with local_torch_dtype(dtype):  # as its loader does
        quantizer.preprocess_model(model=network, device_map=None)
    quantizer.postprocess_model(network)
    network.hf_quantizer = quantizer


def weight_files(base: Path) -> list[Path]:
    """The files that transformers reads, which looks for a single one first.

    Others may lie beside them, such as the original ones of Llama and Mistral. Raises `errors.ModelError` if one lacks.
    """
    index = base / SAFE_WEIGHTS_INDEX_NAME
    if (base / SAFE_WEIGHTS_NAME).is_file():
        return [base / SAFE_WEIGHTS_NAME]
    if not index.is_file():
        return sorted(path for path in base.glob("*.safetensors") if not path.name.startswith("adapter_"))
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise errors.ModelError(f"model.base: {index} cannot be read ({type(e).__name__}: {e}): bring it again") from e
    if lost := [name for name in named if not (base / name).is_file()]:
        raise errors.ModelError(f"model.base: {base} lacks {lost[0]}, which {index.name} names: bring the model again")
    return [base / name for name in named]


def _plain(name: str) -> str:
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name
