"""What lies beside the merged weights: the base's config and the like, and the adapter's tokenizer."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from job import errors, log, paths
from job.merge.plan import Plan
from job.model import tokenizer

CONFIG = "config.json"
_GENERATION = "generation_config.json"
# What of a model's folder is needed to use it, besides its weights.
_KEPT = re.compile(
    r"(config|generation_config|vocab|added_tokens|special_tokens_map|chat_template|tokenizer[^/]*|"
    rf"[^/]*processor_config)\.json|(vocab|merges)\.txt|[^/]*\.(py|model|tiktoken|jinja)|{paths.TERMS}",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens|merges|spiece)|.*\.tiktoken")
_SEEN = re.compile(r"[^/]*processor_config\.json")  # how images become numbers
_TEMPLATE = "chat_template"
_TYPE = ("dtype", "torch_dtype")  # what transformers calls it, and what it called it before version 5
_QUANTIZED = ("quantization_config", "compression_config")


def write(base: Path, adapter: Path, target: Path, plan: Plan, dtype: torch.dtype) -> None:
    """Put what a model is used with into the folder `target`: the base's, and the adapter's where it has its own."""
    own = tokenizer.home(adapter, base) == adapter  # a part of one is none
    template = tokenizer.template(adapter)
    for path in _files(base):  # files of two tokenizers do not make one, and a second template would hide the first
        if not (own and _WORDS.match(path.name)) and not (template and path.name.startswith(_TEMPLATE)):
            shutil.copyfile(path, target / path.name)
    for path in _files(adapter):  # the model is the base's, also where somebody saved its config, code or licence here
        if (own and (_WORDS.match(path.name) or path.name.startswith(_TEMPLATE))) or _SEEN.match(path.name):
            shutil.copyfile(path, target / path.name)
    if template and not own:
        _speak(target, template)
    _describe(target / CONFIG, plan, str(dtype).removeprefix("torch."))
    if (target / _GENERATION).is_file():
        _repair(target)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and _KEPT.fullmatch(path.name))


def _speak(folder: Path, template: str) -> None:
    """Give the tokenizer in the folder that chat template, and no other."""
    (folder / f"{_TEMPLATE}.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if told.pop(_TEMPLATE, None):
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(path: Path, plan: Plan, dtype: str) -> None:
    """Make the base's config.json the merged model's; what it does not have to say anew stays as it was written."""
    told = json.loads(path.read_text(encoding="utf-8"))
    parts = [told, *(each for each in told.values() if isinstance(each, dict))]
    for part in parts:
        for key in _QUANTIZED:
            part.pop(key, None)
        for key in set(_TYPE) & part.keys():
            part[key] = dtype
        if plan.untied and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
        if plan.vocabulary and "vocab_size" in part:
            part["vocab_size"] = plan.vocabulary
    if not set(_TYPE) & told.keys():
        told["dtype"] = dtype
    if plan.untied:
        told["tie_word_embeddings"] = False
    told.setdefault("architectures", [plan.architecture])
    told.pop("_name_or_path", None)
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _repair(folder: Path) -> None:
    """Some published bases set a temperature without sampling (Llama-2 chat), which transformers refuses to save."""
    path = folder / _GENERATION
    try:
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as e:
        raise errors.ModelError(f"model.base: its {_GENERATION} cannot be read ({e})") from e
    if settings.do_sample is True:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told["do_sample"] = True
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        log.event("merge.sampling", "generation_config sets sampling parameters without do_sample: it is switched on")
