"""Add the adapter to the original base weights, never to quantized ones.

The result is a sealed folder that plain transformers loads and that needs nothing of ours.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from job import config as configs
from job import errors, log, manifest, paths
from job.config import Config
from job.inputs import Base
from job.model import tokenizer, vision, weights

_WEIGHTS = "adapter_model.safetensors"


def merged(config: Config, base: Base, adapter: Path, cache: paths.Cache) -> Path:
    """Merge the sealed `adapter` folder into `base` and return the folder of the sealed result.

    The sum is taken in float32 and rounded once to ``merge.dtype``. Raises `errors.ModelError` when the adapter was
    trained on another base, does not fit, changes nothing, or makes the weights NaN or Inf.
    """
    out = cache.work(f"merged-{paths.digest(base.digest + manifest.of(adapter).digest)}")
    if manifest.sealed(out):
        return out
    facts = json.loads((adapter / paths.TRAINING).read_text(encoding="utf-8"))
    if facts["inputs"]["base"] != base.digest:
        raise errors.ModelError(
            f"model.base: {base.url} has digest {base.digest}, the adapter was trained on "
            f"{facts['inputs']['base']}: put that base back"
        )
    if facts["inputs"]["config"] != configs.digest(config):
        raise errors.ConfigError("the adapter was trained with another config: use another run.url")
    log.event("merge.start", f"merging into the original base in {config.merge.dtype}")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network = _sum(weights.for_merging(base.path, config.model, config.merge.dtype), adapter)
    _repair_sampling(network)
    network.save_pretrained(partial, max_shard_size=config.merge.max_shard_size)
    tokenizer.load(adapter, "chat", trust_remote_code=config.model.trust_remote_code).save_pretrained(partial)
    vision.copy(adapter, partial)
    told = {**facts, "adapter": manifest.of(adapter).digest}
    (partial / paths.TRAINING).write_text(json.dumps(told, indent=1), encoding="utf-8")
    whole = manifest.seal(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    log.event("merge.done", f"merged model: {len(whole.files)} files, {log.size(whole.size)}", digest=whole.digest)
    return out


def _sum(network: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    with warnings.catch_warnings(action="ignore"):  # of keys that do not fit: `_check` makes errors of them
        adapted = PeftModel.from_pretrained(network, str(adapter))
    _check(adapted, load_file(adapter / _WEIGHTS))
    try:
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                _merge(module)
    except ValueError as e:  # safe_merge found NaN
        raise errors.ModelError(f"the adapter makes the merged weights NaN or Inf: {e}") from e
    whole: PreTrainedModel = adapted.unload()
    return whole


def _merge(module: LoraLayer) -> None:
    """Sum one layer in float32 and round once; PEFT itself rounds the update before it adds it."""
    layer = module.get_base_layer()
    kept = layer.weight.dtype
    layer.weight.data = layer.weight.data.to(torch.float32)
    module.merge(safe_merge=True)
    layer.weight.data = layer.weight.data.to(kept)


def _check(adapted: PeftModel, saved: dict[str, torch.Tensor]) -> None:
    fitting = get_peft_model_state_dict(adapted)
    wrong = sorted(saved.keys() ^ fitting.keys())
    if wrong:
        raise errors.ModelError(
            f"the adapter does not fit the base: {len(wrong)} weights have no counterpart, the first is {wrong[0]}"
        )
    broken = sorted(name for name, tensor in saved.items() if not torch.isfinite(tensor).all())
    if broken:
        raise errors.ModelError(f"the adapter holds NaN or Inf in {len(broken)} weights, the first is {broken[0]}")
    if not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):
        raise errors.ModelError(
            "the adapter changes nothing: every lora_B weight is zero, so the merged model would be the base"
        )


def _repair_sampling(network: PreTrainedModel) -> None:
    """Some published bases set a temperature without sampling (Llama-2 chat), which transformers refuses to save."""
    settings = network.generation_config
    if settings is not None and settings.do_sample is not True:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True
            log.event(
                "merge.sampling", "generation_config sets sampling parameters without do_sample: it is switched on"
            )
