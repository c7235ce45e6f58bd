"""Adapters of old bases: what PEFT made on Qwen v1 and ChatGLM3 as published fits what those have become."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import FAMILIES, _Trap
from torch import nn
from transformers import AutoModelForCausalLM

from job import config, convert, errors, manifest, merge, paths
from job.convert import adapters
from job.inputs import Base
from job.model import files

IDS = torch.arange(60)[None] * 7 % 300
FUSED = {"qwen": "c_attn", "chatglm": "query_key_value"}
EMBEDDING = {"qwen": "wte", "chatglm": "word_embeddings"}
LINEAR = {
    "qwen": ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"],
    "chatglm": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
SETTINGS = "adapter_config.json"
# The kind, of which layers; {fused} and {embedding} are what the family calls them.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["{fused}"], "use_dora": True},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"{fused}": 4}, "alpha_pattern": {"{fused}": 3}},
    "one layer": {"target_modules": ["{fused}"], "layers_to_transform": [1]},
    "biases": {"target_modules": ["{fused}"], "lora_bias": True, "bias": "all"},
    "embedding": {"target_modules": ["{fused}", "{embedding}"]},
    "whole embedding": {"target_modules": ["{fused}"], "modules_to_save": ["{embedding}"]},
    "whole layer": {"target_modules": ["{embedding}"], "modules_to_save": ["{fused}"]},
    "some tokens": {"target_modules": ["{fused}"], "trainable_token_indices": {"{embedding}": [3, 39]}},
}


class Layout(nn.Module):
    """The modules of an original model, by their names; it computes nothing, and PEFT needs no more."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue
            *parents, last = owner.split(".")
            at: nn.Module = self
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, nn.Module())
                at = getattr(at, parent)
            at.add_module(last, _module(owner, weight, weights.get(f"{owner}.bias")))
        self.load_state_dict(dict(weights))


def _module(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    if weight.dim() == 1:
        made = nn.Module()
        made.weight = nn.Parameter(torch.empty_like(weight))
        return made
    if name.endswith(tuple(EMBEDDING.values())):
        return nn.Embedding(*weight.shape)
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)


class Lab:
    """A base in an old layout, an adapter that PEFT made on it, and a place to convert and merge both."""

    def __init__(self, family: str, kind: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.cache = paths.Cache(folder / "cache", "run")
        self.base, self.adapter = folder / "base", folder / "adapter"
        FAMILIES[family](self.base)
        self.weights = {name: each for name, each in files.tensors(self.base) if "inv_freq" not in name}
        how = json.loads(
            json.dumps(KINDS[kind]).replace("{fused}", FUSED[family]).replace("{embedding}", EMBEDDING[family])
        )
        if how["target_modules"] == "all-linear":
            how["target_modules"] = LINEAR[family]
        torch.manual_seed(1)
        made = get_peft_model(Layout(self.weights), LoraConfig(r=2, **how))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.1 + parameter.data
        with warnings.catch_warnings(action="ignore"):  # a bias has one dimension, which PEFT finds odd
            made.save_pretrained(str(self.adapter))
        self.trained: dict[str, torch.Tensor] = made.merge_and_unload().state_dict()

    def original(self, folder: Path) -> Base:
        return Base(folder.as_uri(), folder, manifest.of(folder).digest, folder.name)

    def native(self, folder: Path) -> Base:
        with ExitStack() as keep:
            return convert.native(self.original(folder), self.cache, keep)

    def expected(self) -> Path:
        """The base with the adapter, merged by PEFT in the old layout, as it is converted."""
        place = self.folder / "expected"
        shutil.copytree(self.base, place)
        for path in place.glob("*.safetensors"):
            path.unlink()
        save_file(self.trained, place / "model.safetensors")
        return self.native(place).path

    def translated(self) -> Path:
        with ExitStack() as keep:
            return adapters.translated(self.adapter, self.original(self.base), self.cache, keep)

    def merged(self) -> Path:
        model = config.Model(base=self.base.as_uri(), quantization="none")
        wanted = config.Merge(dtype="float32")
        return merge.folder(self.native(self.base), self.translated(), model, wanted, self.folder / "merged")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_an_old_layout_is_merged_into_what_its_base_has_become(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Each weight is what PEFT makes of it in the old layout; PEFT loads the new adapter as well, and computes that."""
    lab = Lab(family, kind, tmp_path)
    expected = lab.expected()

    merged = dict(files.tensors(lab.merged()))

    for name, weight in files.tensors(expected):
        torch.testing.assert_close(merged.pop(name), weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not merged
    plain = AutoModelForCausalLM.from_pretrained(lab.native(lab.base).path, dtype=torch.float32)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(expected, dtype=torch.float32)(IDS).logits
        seen = PeftModel.from_pretrained(plain, str(lab.translated()))(IDS).logits
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda weights: [weights.pop(key) for key in list(weights) if ".h.1." in key],
            r"trained on transformer\.h\.1\.attn\.c_attn, of which it holds no weights \(1 such\): save or bring",
        ),
        (
            lambda weights: weights.update({key: each[:-2] for key, each in weights.items() if "lora_B" in key}),
            r"c_attn\.lora_B\.weight has the shape \[190, 2\], which does not fit the base",
        ),
        (
            lambda weights: weights.update({"transformer.h.0.attn.roto.lora_A.weight": torch.ones(1)}),
            r"weights for transformer\.h\.0\.attn\.roto\.weight, which no Qwen \(2023\) model has: it was trained on",
        ),
    ],
    ids=["lacking", "of another shape", "of another model"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_the_old_layout_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object], told: str, tmp_path: Path
) -> None:
    """With what does not fit; nothing is left in the cache."""
    lab = Lab("qwen", "dora", tmp_path)
    weights = load_file(lab.adapter / "adapter_model.safetensors")
    change(weights)
    save_file({key: each.contiguous() for key, each in weights.items()}, lab.adapter / "adapter_model.safetensors")

    with pytest.raises(errors.ModelError, match=told):
        lab.translated()

    assert not list(tmp_path.glob("cache/models/*/manifest.json"))


@pytest.mark.parametrize(
    ("kind", "lost", "told"),
    [
        ("biases", "h.1.attn.c_attn.base_layer.bias", r"transformer\.h\.1\.attn\.c_attn\.bias, of which it holds no"),
        ("whole embedding", "wte", r"transformer\.wte\.weight, of which it holds no"),
        ("whole layer", "h.1.attn.c_attn.weight", r"transformer\.h\.1\.attn\.c_attn\.weight, of which it holds no"),
        ("some tokens", "wte", r"wte, of which it holds no"),
    ],
)
def test_what_was_trained_besides_lora_is_missed_in_an_old_layout_too(
    kind: str, lost: str, told: str, tmp_path: Path
) -> None:
    """Under the names that it has there; renamed, nobody would know that it was wanted."""
    lab = Lab("qwen", kind, tmp_path)
    weights = load_file(lab.adapter / "adapter_model.safetensors")
    kept = {key: each for key, each in weights.items() if lost not in key}
    assert len(kept) < len(weights)
    save_file(kept, lab.adapter / "adapter_model.safetensors")

    with pytest.raises(errors.ModelError, match=told):
        lab.translated()


def test_an_adapter_of_the_new_layout_stays_what_it_is(tmp_path: Path) -> None:
    """As this job trains it, whose base was converted before."""
    lab = Lab("qwen", "lora", tmp_path)
    lab.adapter = lab.translated()

    assert lab.translated() == lab.adapter


def test_a_pickled_adapter_becomes_safetensors(tmp_path: Path) -> None:
    """With all that lies beside it; of any base."""
    lab = Lab("qwen", "lora", tmp_path)
    weights = load_file(lab.adapter / "adapter_model.safetensors")
    (lab.adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, lab.adapter / "adapter_model.bin")
    (lab.adapter / "tokenizer.json").write_text("{}", encoding="utf-8")
    (lab.base / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")

    made = lab.translated()

    read = load_file(made / "adapter_model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in read)
    assert (made / SETTINGS).read_bytes() == (lab.adapter / SETTINGS).read_bytes()
    assert (made / "tokenizer.json").exists()
    assert not (made / "adapter_model.bin").exists()


def test_a_pickled_adapter_is_not_run(tmp_path: Path) -> None:
    """Code in it is not run, and named as what it is."""
    lab = Lab("qwen", "lora", tmp_path)
    (lab.adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": _Trap(str(tmp_path / "trap"))}, lab.adapter / "adapter_model.bin")

    with pytest.raises(errors.ModelError, match=r"adapter_model\.bin is broken, or holds something other than weights"):
        lab.translated()

    assert not (tmp_path / "trap").exists()
