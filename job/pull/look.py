"""What is to be brought, found and looked at without reading it: the files of a base model, and of the data."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from job import errors, inputs, log, manifest, paths, storage
from job.config import Config
from job.model import legacy, prequantized, tokenizer, vision

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx|ckpt|ot)$")
_PICKLED = re.compile(r"^pytorch_model.*\.bin$")
_SHARDS = re.compile(r"-(\d{5})-of-(\d{5})(\.safetensors|\.bin)$")
_DATA = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz|\.zst)?$")
_HIDDEN = re.compile(r"(^|/)[._]")  # of editors, and of file systems
_ASIDE = ("quantize_config.json", "quant_config.json")  # where AutoGPTQ and AutoAWQ first told what they did
_HEADER = 100_000_000  # bytes: safetensors takes no more
_SHOWN = 8  # names in one line


@dataclass(frozen=True)
class Found:
    """Files of one source that belong together, not yet fetched."""

    source: storage.Source
    entries: Sequence[storage.Entry]

    @property
    def name(self) -> str:
        """The source's URL, or that of its only file."""
        return f"{self.source.url}/{self.entries[0].key}" if len(self.entries) == 1 else self.source.url

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        listing = [[e.key, e.size, e.version] for e in self.entries]
        return paths.digest(json.dumps([self.source.url, listing]))


def adapter(url: str) -> Found:
    """The files of the adapter at `url`; raises `errors.ModelError` if there is none."""
    source = storage.source(url)
    entries = [e for e in source.list() if "/" not in e.key]
    names = {e.key for e in entries}
    weights = {"adapter_model.safetensors", "adapter_model.bin"} & names
    if "adapter_config.json" not in names or not weights:
        there = f"it holds {_some(sorted(names))}" if names else "it holds no files"
        raise errors.ModelError(
            f"--adapter: {url} has no adapter_config.json and adapter_model.safetensors ({there}): give the URL of a "
            "folder that PEFT wrote, such as the adapter/ of a run"
        )
    if paths.TRAINING in names and manifest.NAME not in names:
        raise errors.ModelError(
            f"--adapter: {url} is of a run that has not published it whole: start the run again first"
        )
    wanted = {"adapter_config.json", max(weights)}  # safetensors, if there are both
    kept = [e for e in entries if e.key in wanted or not _WEIGHTS.search(e.key)]
    return Found(source, [e for e in kept if e.key != manifest.NAME])


def base(url: str) -> Found:
    """The files of the base model that are needed; raises `errors.ModelError` if it is no model, or not whole."""
    source = storage.source(url)
    entries = [e for e in source.list() if e.key != manifest.NAME]
    if not entries:
        raise errors.NotFoundError(
            f"model.base: {source.url} holds no files: correct the URL, or upload the model there"
        )
    names = {e.key for e in entries}
    weights = _weights(names, source.url)
    if "config.json" not in names:
        raise errors.ModelError(
            f"model.base: {source.url} has no config.json: it is not a model folder in Hugging Face layout"
        )
    if not names.intersection(tokenizer.FILES):
        raise errors.ModelError(
            f"model.base: {source.url} has no tokenizer (one of {', '.join(tokenizer.FILES)}): upload it beside the "
            "weights"
        )
    wanted = [e for e in entries if e.key in weights or ("/" not in e.key and not _WEIGHTS.search(e.key))]
    ignored = sorted(names - {e.key for e in wanted})
    if ignored:
        log.event(
            "pull.ignored",
            f"{source.url}: not needed and left there: {_some(ignored)}",
            files=ignored,
        )
    return Found(source, wanted)


@dataclass(frozen=True)
class Kind:
    """What config.json and the names of its files tell of a base model."""

    converts: bool
    """Whether it has to be converted before transformers loads it."""
    sees: bool
    """Whether it takes images."""
    context: int | None
    """Tokens that it was made for, if anybody says."""
    scheme: str
    """How it is quantized already, if it is."""


def kind(found: Found) -> Kind:
    """What the base is, told before gigabytes move; raises `errors.ModelError` if it cannot be used."""
    entry = next(e for e in found.entries if e.key == "config.json")
    try:
        told = dict(json.loads(storage.read_range(found.source, entry, 0, entry.size)))
    except (ValueError, TypeError) as e:
        raise errors.ModelError(f"model.base: {found.source.url}/config.json cannot be read ({e})") from e
    called = told.get("architectures") or []
    if told.get("is_encoder_decoder") and not any(str(each).endswith("ForCausalLM") for each in called):
        raise errors.ModelError(
            f"model.base: {found.source.url} is an encoder with a decoder ({', '.join(called) or 'see config.json'}): "
            "the job trains and merges language models, which are decoders alone"
        )
    layout = legacy.recognise(told, found.source.url)
    aside = [entry.key for entry in found.entries if entry.key in _ASIDE]
    if aside and not told.get("quantization_config"):
        raise errors.ModelError(
            f"model.base: {found.source.url} has {aside[0]} beside a config.json that says nothing of it, as old "
            "quantized models do: put it into config.json as quantization_config, with quant_method gptq or awq"
        )
    scheme = prequantized.recognise(told, found.source.url)
    if scheme:
        prequantized.check(_tensors(found), scheme, found.source.url)
    if scheme and layout:
        raise errors.ModelError(
            f"model.base: {found.source.url} is a {layout.NAMES} model that is quantized already ({scheme}), which the "
            "job does not convert: use the original weights"
        )
    converts = layout is not None or all(_PICKLED.match(e.key) for e in found.entries if _WEIGHTS.search(e.key))
    return Kind(converts, vision.sees(told), layout.context if layout else _context(told), str(scheme or ""))


def suits(config: Config, kind: Kind, where: str) -> None:
    """Raise `errors.ConfigError` if a base of that `kind`, which is at `where`, cannot be trained as `config` says."""
    if kind.context and config.data.max_length > kind.context:
        raise errors.ConfigError(
            f"data.max_length {config.data.max_length} is more than the {kind.context} tokens that {where} was "
            "made for (in its config.json): lower it"
        )
    if kind.scheme and config.distributed.strategy not in ("auto", "ddp"):
        raise errors.ConfigError(
            f"distributed.strategy {config.distributed.strategy} cannot share out a base that is quantized already "
            f"({where}: {kind.scheme}): use ddp, or the original weights"
        )
    if config.data.images and not kind.sees:
        raise errors.ConfigError(f"data.images: the base {where} sees no images: leave it out, or use a base that does")


def _tensors(found: Found) -> list[str]:
    """The names of the tensors in the safetensors files of a base, without fetching those."""
    names: list[str] = []
    for entry in found.entries:
        if entry.key.endswith(".safetensors"):
            try:
                size = int.from_bytes(storage.read_range(found.source, entry, 0, 8), "little")
                names += json.loads(storage.read_range(found.source, entry, 8, 8 + min(size, _HEADER, entry.size - 8)))
            except (ValueError, TypeError) as e:
                raise errors.ModelError(
                    f"model.base: {found.source.url}/{entry.key} is no safetensors file ({e}): upload it again"
                ) from e
    return names


def _context(told: Mapping[str, Any]) -> int | None:
    """How many tokens the model takes, with what its config.json says of stretching them; None if it says nothing."""
    told = told["text_config"] if isinstance(told.get("text_config"), dict) else told
    context = told.get("max_position_embeddings")
    if not isinstance(context, int):
        return None
    stretched = told.get("rope_scaling") or told.get("rope_parameters")
    if not isinstance(stretched, dict) or not isinstance(stretched.get("factor"), int | float):
        return context
    return max(context, int(stretched.get("original_max_position_embeddings", context) * stretched["factor"]))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _weights(names: set[str], where: str) -> set[str]:
    weights = {n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter_")}
    weights = weights or {n for n in names if _PICKLED.match(n)}
    if not weights:
        other = sorted(n for n in names if _WEIGHTS.search(n) and "/" not in n)
        seen = f"only {_some(other)}" if other else "no weights at all"
        raise errors.ModelError(
            f"model.base: {where} has {seen}: the job reads *.safetensors and pytorch_model*.bin; convert "
            "the model and upload it again"
        )
    for name in sorted(weights):
        shard = _SHARDS.search(name)
        if shard:
            stem = name[: shard.start()]
            missing = [
                s
                for i in range(1, int(shard[2]) + 1)
                if (s := f"{stem}-{i:05d}-of-{shard[2]}{shard[3]}") not in weights
            ]
            if missing:
                raise errors.ModelError(
                    f"model.base: {where} lacks {_some(missing)}: the upload of the model was not finished"
                )
    return weights


def images(folder: str | None, url: str) -> Found | None:
    """The images in `folder`, or beside the data at `url` if no folder is given: None if there are none.

    Beside data in the root of a bucket lies everything that is in it: from there none are taken unasked. Raises
    `errors.NotFoundError` if there are none in the folder.
    """
    place = folder or url.rpartition("/")[0]
    if not folder and re.fullmatch("s3://[^/]+", place):
        return None
    source = storage.source(place)
    entries = [e for e in source.list() if inputs.is_image(e.key)]
    if not entries and folder:
        raise errors.NotFoundError(f"data.images: {folder} holds no images: correct the URL, or upload them there")
    return Found(source, entries) if entries else None


def data(url: str) -> Found:
    """The data file at `url`, those whose names fit its *, or those in that folder.

    Raises `errors.NotFoundError` or `errors.DataError`.
    """
    folder, _, name = url.rpartition("/")
    source = storage.source(folder)
    if isinstance(source, storage.Folder):
        name = unquote(name)
    start, star, _ = name.partition("*")
    if name:
        fitting = re.compile("[^/]*".join(map(re.escape, name.split("*"))))
        entries = [e for e in source.list(start) if fitting.fullmatch(e.key)]
    else:
        entries = [e for e in source.list() if _DATA.search(e.key) and not _HIDDEN.search(e.key)]
    if not entries:
        seen = "fits no file" if star else "does not exist" if name else "holds no data files"
        there = _some([e.key for e in source.list() if _DATA.search(e.key)]) if name else ""
        raise errors.NotFoundError(
            f"data: {url} {seen}: correct the URL{f'; {folder}/ holds {there}' if there else ''}"
        )
    if not all(_DATA.search(e.key) for e in entries):
        raise errors.DataError(
            f"data: {url}: the name must end in .jsonl, .json, .csv or .parquet, or one of the first three "
            "and .gz or .zst"
        )
    return Found(source, entries)
