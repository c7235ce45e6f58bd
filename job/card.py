"""The README.md of a published model: what it is, what it was made of, how good it is, and how to load it.

Its head is what the Hugging Face Hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from job import config
from job.model import vision

NAME = "README.md"
_HEAD = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENSE = ("license", "license_name", "license_link")  # as the Hub calls them
CALLED = {
    "base": "the base alone",
    "trained": "the base as it was trained on, with the adapter",
    "adapted": "the original base with the adapter",
    "merged": "the merged model",
    "other": "the other merge, for comparison",
}
_SHOWN = ("r", "alpha", "dropout", "rslora", "dora")
_LOAD = {
    "adapter": """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this folder")  # finds the base by adapter_config.json
tokenizer = AutoTokenizer.from_pretrained("this folder")
```""",
    "merged": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`vllm serve` and text-generation-inference take the folder as it is.""",
    "seeing": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("this folder", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("this folder")
```

`vllm serve` takes the folder as it is.""",
}


def adapter(settings: config.Config, base: Path, facts: Mapping[str, Any]) -> str:
    """The card of the adapter of a run, whose base lies in the folder `base`."""
    return _card(settings.run.name, settings.model.base, base, "adapter", _training(settings, facts))


def merged(settings: config.Config, base: Path, facts: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    """The card of a run's merged model, with what was `seen` of it."""
    rows = {**_training(settings, facts), **_merge(facts, seen)}
    return _card(settings.run.name, settings.model.base, base, "merged", rows, losses(seen), left(seen))


def alone(order: config.Merging, base: Path, facts: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    """The card of an adapter from elsewhere, merged."""
    rows = {"Adapter": f"{order.adapter.url}, digest {facts['adapter']}", **_merge(facts, seen)}
    return _card(order.run.url.rpartition("/")[2], order.model.base, base, "merged", rows, losses(seen), left(seen))


def _card(name: str, url: str, base: Path, kind: str, rows: Mapping[str, str], *more: str) -> str:
    sees = vision.sees(json.loads((base / "config.json").read_text(encoding="utf-8")))
    of_hub = url.removeprefix("hf://").partition("@")[0] if url.startswith("hf://") else None
    head: dict[str, Any] = {
        **({"base_model": of_hub} if of_hub else {}),
        "base_model_relation": "adapter" if kind == "adapter" else "finetune",
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["lora"],
        **_license(base),
    }
    what = f"A LoRA adapter for {url}." if kind == "adapter" else f"{url} with a LoRA adapter merged into it."
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        what,
        "\n".join(f"- **{key}**: {value}" for key, value in rows.items()),
        *more,
        "## How to load it",
        _LOAD["seeing" if sees and kind == "merged" else kind],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _license(base: Path) -> dict[str, Any]:
    """What the base's own card says of its licence, which its children inherit."""
    path = base / NAME
    found = _HEAD.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        told = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError):  # such as a day that no month has
        return {}
    return {key: told[key] for key in _LICENSE if told.get(key)} if isinstance(told, dict) else {}


def _training(settings: config.Config, facts: Mapping[str, Any]) -> dict[str, str]:
    data = ", ".join(source.url for source in settings.data.sources("train"))
    shape = ", ".join(f"{key} {getattr(settings.lora, key)}" for key in _SHOWN)
    return {
        "Base": f"{facts['base']}, digest {facts['inputs']['base']}",
        "Adapter": f"{shape}, targets {settings.lora.targets}; trained by {settings.train.method} over a base that was "
        f"held as {settings.model.quantization}",
        "Data": f"{data}, digest {facts['inputs']['data']}",
        "Config": f"learning rate {settings.train.learning_rate:g}, global batch {settings.train.global_batch_size}, "
        f"up to {settings.data.max_length} tokens, seed {settings.run.seed}; digest {facts['inputs']['config']}",
        "Training": f"{facts['steps']} steps, {facts['epochs']:.2f} epochs, {facts['tokens']:,} tokens; the adapter is "
        f"that of step {facts['step_kept']}",
        f"Loss ({facts['loss_measured_on']})": f"{facts['loss_before']:.4f} before, {facts['loss_after']:.4f} after",
    }


def _merge(facts: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, str]:
    told = facts["merge"]
    rows = {"Merge": f"into the {told['base']} base, in {told['dtype']}; {told['checked']}"}
    if "off" in seen:
        rows["Opened"] = (
            f"by plain transformers as {seen['class']}: its logits are within {seen['off']:.2%} of those of the base "
            f"with the adapter, which differ from the base's by {seen['effect']:.2%}"
        )
    return rows


def left(seen: Mapping[str, Any]) -> str:
    """Return a list of what was not verified, and why."""
    told = [f"- {CALLED[name]}: {why}" for name, why in seen.get("left", {}).items()]
    return "\n".join(["Not verified:", "", *told]) if told else ""


def losses(seen: Mapping[str, Any]) -> str:
    """A table of the losses that were measured on the same examples, and which merge is nearer to what was trained."""
    measured, far = seen.get("loss", {}), seen.get("from_trained", {})
    if len(measured) < 2:  # noqa: PLR2004 - nothing to compare
        return ""
    names = dict(CALLED)
    if "bases" in seen:  # of a merged model, which of the two it is
        names |= {name: f"{CALLED[name]}: into the {base} base" for name, base in seen["bases"].items()}
    rows = [f"| {shown} | {measured[name]:.4f} |" for name, shown in names.items() if name in measured]
    table = "\n".join([f"| on {seen['on']} | loss |", "| --- | --- |", *rows])
    if len(far) < 2:  # noqa: PLR2004
        return table
    near, farther = sorted(far, key=far.__getitem__)
    return (
        f"{table}\n\nNearer to what was trained is the merge into the {seen['bases'][near]} base: its logits are off "
        f"by {far[near]:.2%}, those of the other by {far[farther]:.2%}."
    )
