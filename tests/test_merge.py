"""Adding an adapter to its base: the sum is right, or there is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import files
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import config, errors, inputs, manifest, merge, paths
from job.model import lora, tokenizer, weights


@pytest.fixture
def settings(tiny_run: Callable[..., Path]) -> config.Config:
    return config.read(tiny_run())


@pytest.fixture
def cache(tmp_path: Path) -> paths.Cache:
    return paths.Cache(tmp_path / "cache", "run")


@pytest.fixture
def base(tiny_model: Path) -> inputs.Base:
    return inputs.Base(tiny_model.as_uri(), tiny_model, "the base's digest")


@pytest.fixture
def adapter(settings: config.Config, tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter whose every weight is random, as training would leave it."""
    torch.manual_seed(1)
    network = lora.adapted(weights.for_merging(tiny_model, settings.model, "float32"), settings.lora)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    folder = tmp_path / "adapter"
    network.save_pretrained(str(folder))
    tokenizer.load(tiny_model).save_pretrained(folder)
    (folder / paths.TRAINING).write_text(
        json.dumps({"inputs": {"base": "the base's digest", "config": config.digest(settings)}})
    )
    return folder


def change(adapter: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(how(load_file(path)), path)


def test_the_merged_weights_are_the_sum_rounded_once(
    settings: config.Config, base: inputs.Base, adapter: Path, cache: paths.Cache
) -> None:
    """W + alpha / r x B A, computed in float64 beside it and rounded to bfloat16, layer by layer."""
    merged = load_file(merge.merged(settings, base, adapter, cache) / "model.safetensors")

    original, added = load_file(base.path / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    changed = [name for name in merged if not torch.equal(merged[name], original[name])]
    assert len(changed) == 14
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = added[f"{module}.lora_A.weight"].double(), added[f"{module}.lora_B.weight"].double()
        exact = original[name].double() + 32 / 16 * b @ a
        assert merged[name].dtype == torch.bfloat16
        assert (merged[name].double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_the_result_loads_with_plain_transformers_and_answers_like_base_and_adapter(
    settings: config.Config, base: inputs.Base, adapter: Path, cache: paths.Cache
) -> None:
    """Weights, tokenizer, chat template and generation config are all there."""
    folder = merge.merged(settings, base, adapter, cache)

    words = AutoTokenizer.from_pretrained(folder)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "What is 1 and 2?"}], return_tensors="pt", return_dict=True
    )
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        of_base = plain(**asked).logits
        of_merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**asked).logits
        of_adapter = PeftModel.from_pretrained(plain, str(adapter))(**asked).logits
    assert (of_merged - of_adapter).abs().max() < 0.02 * of_adapter.abs().max()
    assert (of_adapter - of_base).abs().max() > 0.2 * of_adapter.abs().max()
    assert {"config.json", "generation_config.json", "tokenizer.json", "manifest.json"} < files(folder)


def test_large_models_are_saved_in_shards(
    tiny_run: Callable[..., Path], base: inputs.Base, adapter: Path, cache: paths.Cache
) -> None:
    """Each no larger than the config says."""
    small = config.read(tiny_run(merge={"max_shard_size": "1MB", "dtype": "float32"}))
    facts = {"inputs": {"base": base.digest, "config": config.digest(small)}}
    (adapter / paths.TRAINING).write_text(json.dumps(facts))

    folder = merge.merged(small, base, adapter, cache)

    assert all(p.stat().st_size < 1.1e6 for p in folder.glob("*.safetensors"))


def test_merging_again_does_nothing(
    settings: config.Config, base: inputs.Base, adapter: Path, cache: paths.Cache
) -> None:
    """A sealed result of the same base and adapter is the result."""
    one = merge.merged(settings, base, adapter, cache)
    written = (one / "model.safetensors").stat().st_mtime_ns

    assert merge.merged(settings, base, adapter, cache) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, "4 weights have no counterpart"),
        (lambda w: {k.replace("q_proj", "c_attn"): v for k, v in w.items()}, "8 weights have no counterpart"),
        (lambda w: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in w.items()}, "changes nothing"),
        (lambda w: {k: torch.full_like(v, float("inf")) for k, v in w.items()}, "holds NaN or Inf in 28 weights"),
    ],
    ids=["partial", "renamed", "zero", "infinite"],
)
def test_an_adapter_that_does_not_do_its_work_is_an_error(
    how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    told: str,
    settings: config.Config,
    base: inputs.Base,
    adapter: Path,
    cache: paths.Cache,
) -> None:
    """Never a warning, and nothing is left that looks like a result."""
    change(adapter, how)

    with pytest.raises(errors.ModelError, match=told):
        merge.merged(settings, base, adapter, cache)

    assert not [name for name in files(cache.root) if name.endswith("manifest.json")]


def test_another_base_than_the_trained_one_is_refused(
    settings: config.Config, base: inputs.Base, adapter: Path, cache: paths.Cache
) -> None:
    """By the digest of what it contains, not by its name."""
    other = inputs.Base(base.url, base.path, "another digest")

    with pytest.raises(
        errors.ModelError, match="has digest another digest, the adapter was trained on the base's digest"
    ):
        merge.merged(settings, other, adapter, cache)


def test_a_base_with_contradictory_sampling_settings_is_saved(
    settings: config.Config, tiny_model: Path, adapter: Path, cache: paths.Cache, tmp_path: Path
) -> None:
    """As published for Llama-2 chat: a temperature without sampling, which transformers refuses to save."""
    odd = Path(shutil.copytree(tiny_model, tmp_path / "odd"))
    (odd / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False}))

    folder = merge.merged(settings, inputs.Base("file:///odd", odd, "the base's digest"), adapter, cache)

    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is True
    assert manifest.sealed(folder)
