"""Bring the base model and the data to this machine, and say in the first second what cannot be brought.

Files of a ``file://`` URL are used where they lie; everything else is copied to the cache, once.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from job import errors, log, manifest, paths, storage
from job.config import Config
from job.inputs import Base, DataFile, Prepared
from job.manifest import Manifest

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx|ckpt|ot)$")
_SHARDS = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_DATA = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz|\.zst)?$")
_SHOWN = 8  # names in one line


@dataclass(frozen=True)
class _Found:
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


def preflight(
    config: Config,
    cache: paths.Cache,
    keep: ExitStack,
    *,
    trained: bool = False,
    look: bool = False,
    helps: bool = False,
) -> None:
    """Look at everything that the run will read, without reading it: it is there, usable, and there is room.

    The data are not needed any more when the run is `trained`, nor by a machine that `helps` another one, and that one
    alone merges. What the run uses of the cache is not evicted until
    `keep` is closed; what nobody uses is, where room is short, unless this is only a `look`.

    Raises the error that the run would end with later.
    """
    urls = () if trained or helps else (*config.data.train, *config.data.eval)
    found = [_base(config), *(_data(url) for url in urls)]
    _trainable(found[0])
    keep.enter_context(storage.used(cache.work("")))
    places = [cache.base(found[0].fingerprint), *(cache.data(f.fingerprint) for f in found[1:])]
    pulled = 0
    for each, place in zip(found, places, strict=True):
        keep.enter_context(storage.used(place))
        if not isinstance(each.source, storage.Folder) and not manifest.sealed(place):
            pulled += max(0, each.size - storage.on_disk(place))
    needed = pulled + (found[0].size if config.merge.enabled and not helps else 0)
    storage.make_room(cache.shelves(), needed, config.run.cache_limit, look=look)
    log.event(
        "preflight",
        f"found the base model ({log.size(found[0].size)}) and the data ({log.size(sum(f.size for f in found[1:]))})",
        bytes=pulled,
    )


def base(config: Config, cache: paths.Cache) -> Base:
    """Bring the base model here, verified, and say which one it is."""
    found = _base(config)
    path, whole = _here(found, cache.base(found.fingerprint))
    return Base(config.model.base, path, whole.digest)


def data(urls: Iterable[str], cache: paths.Cache) -> list[DataFile]:
    """Bring the data files of one split here, in the order of `urls` and of their names."""
    files = []
    for url in urls:
        found = _data(url)
        path, whole = _here(found, cache.data(found.fingerprint))
        below = found.source.url
        files += [DataFile(f"{below}/{e.key}", path / e.key, whole.files[e.key].sha256) for e in found.entries]
    return files


def prepared(store: storage.Store, digest: str, cache: paths.Cache) -> Prepared:
    """Bring the data here that another machine of this attempt has prepared, verified."""
    target = cache.work("prepared")
    if storage.fetch(store, paths.PREPARED, target) is None:
        raise errors.StoreError(f"{store.url}/{paths.PREPARED} is not whole although it was a moment ago; start again")
    return Prepared(target, digest)


def artefact(store: storage.Store, place: str, cache: paths.Cache, confirm: Callable[[], None]) -> Path:
    """Bring a sealed directory of the run here, verified; raises `errors.StoreError` if it is not whole.

    One that is damaged where it lies loses its seal, so that the next start makes it anew.
    """
    target = cache.work(place.rstrip("/"))
    try:
        whole = storage.fetch(store, place, target)
    except errors.CorruptError as e:
        confirm()
        store.delete(place + manifest.NAME)
        raise errors.StoreError(
            f"{store.url}/{place} is damaged where it lies: {e}. Start again to make it anew"
        ) from e
    if whole is None:
        raise errors.StoreError(f"{store.url}/{place} is not whole although it was a moment ago; start again")
    return target


def _here(found: _Found, target: Path) -> tuple[Path, Manifest]:
    if isinstance(found.source, storage.Folder):
        return found.source.root, _recorded(found.source, found, target.with_suffix(".json"))
    if there := storage.here(target):
        log.event("pull.here", f"{found.name} is here already", url=found.name, digest=there.digest)
        return target, there
    whole = storage.pull(found.source, found.entries, target)
    log.event(
        "pull.done",
        f"{found.name}: {len(whole.files)} file(s), {log.size(whole.size)}, verified",
        url=found.name,
        digest=whole.digest,
    )
    return target, whole


def _recorded(folder: storage.Folder, found: _Found, record: Path) -> Manifest:
    """Hash files that are used in place, once: the record's name changes when a size or a time does."""
    with contextlib.suppress(FileNotFoundError, errors.DamagedError):
        return manifest.parse(record.read_bytes(), str(record))
    files = {e.key: manifest.File(size=e.size, sha256=manifest.sha256(folder.path(e))) for e in found.entries}
    record.parent.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(f".{os.getpid()}.part")
    temporary.write_bytes(Manifest(files).to_json())
    temporary.rename(record)
    log.event(
        "pull.in_place",
        f"{found.name}: {len(files)} file(s), {log.size(found.size)}, used in place",
        url=found.name,
        digest=Manifest(files).digest,
    )
    return Manifest(files)


def _base(config: Config) -> _Found:
    source = storage.source(config.model.base)
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
    if not names.intersection(_TOKENIZERS):
        raise errors.ModelError(
            f"model.base: {source.url} has no tokenizer (one of {', '.join(_TOKENIZERS)}): upload it beside the weights"
        )
    wanted = [e for e in entries if e.key in weights or ("/" not in e.key and not _WEIGHTS.search(e.key))]
    ignored = sorted(names - {e.key for e in wanted})
    if ignored:
        log.event(
            "pull.ignored",
            f"{source.url}: not needed and left there: {_some(ignored)}",
            files=ignored,
        )
    return _Found(source, wanted)


def _trainable(found: _Found) -> None:
    """Raise `errors.ModelError` if the model's config.json says that it cannot be trained, before gigabytes move."""
    entry = next(e for e in found.entries if e.key == "config.json")
    try:
        told = json.loads(storage.read_range(found.source, entry, 0, entry.size))
        quantized = told.get("quantization_config")
    except (ValueError, AttributeError) as e:
        raise errors.ModelError(f"model.base: {found.source.url}/config.json cannot be read ({e})") from e
    if quantized:
        raise errors.ModelError(
            f"model.base: {found.source.url} is quantized already ({quantized.get('quant_method', 'in its own way')}), "
            "and such weights can neither be shared out by fsdp or zero3 nor be merged into: use the original ones; "
            "model.quantization makes them small"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _weights(names: set[str], where: str) -> set[str]:
    weights = {n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter_")}
    if not weights:
        other = sorted(n for n in names if _WEIGHTS.search(n) and "/" not in n)
        seen = f"only {_some(other)}" if other else "no weights at all"
        raise errors.ModelError(
            f"model.base: {where} has {seen}: the job reads *.safetensors; convert the model and upload it again"
        )
    for name in sorted(weights):
        shard = _SHARDS.search(name)
        if shard:
            stem = name[: shard.start()]
            missing = [
                s
                for i in range(1, int(shard[2]) + 1)
                if (s := f"{stem}-{i:05d}-of-{shard[2]}.safetensors") not in weights
            ]
            if missing:
                raise errors.ModelError(
                    f"model.base: {where} lacks {_some(missing)}: the upload of the model was not finished"
                )
    return weights


def _data(url: str) -> _Found:
    folder, _, name = url.rpartition("/")
    source = storage.source(folder)
    if isinstance(source, storage.Folder):
        name = unquote(name)
    if name:
        entries = [e for e in source.list(name) if e.key == name]
    else:
        entries = [e for e in source.list() if _DATA.search(e.key)]
    if not entries:
        raise errors.NotFoundError(
            f"data: {url} {'does not exist' if name else 'holds no data files'}: correct the URL"
        )
    if not all(_DATA.search(e.key) for e in entries):
        raise errors.DataError(
            f"data: {url}: the name must end in .jsonl, .json, .csv or .parquet, or one of the first three "
            "and .gz or .zst"
        )
    return _Found(source, entries)
