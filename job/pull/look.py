"""What is to be brought, found and looked at without reading it: the files of a base model, and of the data."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from job import errors, inputs, log, manifest, paths, storage
from job.model import tokenizer

WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx|ckpt|ot)$")
PICKLED = re.compile(r"^pytorch_model.*\.bin$")
_SHARDS = re.compile(r"-(\d{5})-of-(\d{5})(\.safetensors|\.bin)$")
_DATA = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz|\.zst)?$")
_HIDDEN = re.compile(r"(^|/)[._]")  # of editors, and of file systems
_SHOWN = 8  # names in one line


@dataclass(frozen=True)
class Found:
    """Files of one source that belong together, not yet fetched."""

    source: storage.Source
    entries: Sequence[storage.Entry]
    listed: Sequence[storage.Entry] = ()
    """Of a base or an adapter: all files directly at the URL, as one listing had them."""

    @property
    def seal(self) -> storage.Entry | None:
        """The manifest in the same listing as the files; None if there was none."""
        return next((entry for entry in self.listed if entry.key == manifest.NAME), None)

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


def list_top(source: storage.Source) -> list[storage.Entry]:
    """Return the files directly at the source's URL, without those in folders."""
    return [entry for entry in source.list() if "/" not in entry.key]


def adapter(url: str) -> Found:
    """The files of the adapter at `url`; raises `errors.ModelError` if there is none."""
    source = storage.source(url)
    entries = list_top(source)
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
    kept = [e for e in entries if e.key in wanted or not WEIGHTS.search(e.key)]
    return Found(source, [e for e in kept if e.key != manifest.NAME], entries)


def base(url: str) -> Found:
    """The files of the base model that are needed; raises `errors.ModelError` if it is no model, or not whole."""
    source = storage.source(url)
    everything = source.list()
    entries = [e for e in everything if e.key != manifest.NAME]
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
    wanted = [e for e in entries if e.key in weights or ("/" not in e.key and not WEIGHTS.search(e.key))]
    ignored = sorted(names - {e.key for e in wanted})
    if ignored:
        log.event(
            "pull.ignored",
            f"{source.url}: not needed and left there: {_some(ignored)}",
            files=ignored,
        )
    return Found(source, wanted, [e for e in everything if "/" not in e.key])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _weights(names: set[str], where: str) -> set[str]:
    weights = {n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter_")}
    weights = weights or {n for n in names if PICKLED.match(n)}
    if not weights:
        other = sorted(n for n in names if WEIGHTS.search(n) and "/" not in n)
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
