"""The step itself: look at everything first, then copy what is not on this machine yet."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from job import errors, inputs, log, manifest, paths, storage
from job.config import Config, Merging, Source
from job.inputs import Base, DataFile, Images, Prepared
from job.manifest import Manifest
from job.model import vision
from job.pull import kinds, verified
from job.pull import look as looked
from job.pull.kinds import Kind
from job.pull.look import Found

_ABOUT = re.compile(rf"[^/]*\.(md|png|jpe?g|gif|svg|pdf)|\.git[^/]*|{paths.TERMS}", re.IGNORECASE)
"""What lies beside a model, and copies of it come with or without: it is the same model."""
_PACKED = 4  # times as large a base that was quantized to 4 bits is in 16
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number; most bases have 16 bits


@dataclass(frozen=True)
class Survey:
    """What the run will read, found but not yet downloaded."""

    found: Sequence[Found]
    """The base first, then data and images."""
    kind: Kind

    def outline(self, folder: Path, *, code: bool) -> None:
        """Write to `folder` what tells how large the base is, with its Python files if `code`."""
        kinds.outline(self.found[0], self.kind, folder, code=code)


def survey(config: Config, *, trained: bool = False, helps: bool = False) -> Survey:
    """Find everything that the run will read, without reading it.

    The data are not needed any more when the run is `trained`, nor by a machine that `helps`
    another one. Raises the error that the run would end with later.
    """
    sources = () if trained or helps else (*config.data.sources("train"), *config.data.sources("eval"))
    found = [looked.base(config.model.base), *(looked.data(source.url) for source in sources)]
    kind = kinds.kind(found[0])
    kinds.suits(config, kind, found[0].source.url)
    found += _images(config, sources) if kind.sees and config.train.method == "sft" else ()
    return Survey(found, kind)


def preflight(
    config: Config,
    cache: paths.Cache,
    keep: ExitStack,
    surveyed: Survey,
    *,
    scratch: int = 0,
    look: bool = False,
    helps: bool = False,
) -> None:
    """Make sure that the disk has room for all that the run puts there, before it is downloaded.

    That is the base, what it is converted to, the merged model (not on a machine that `helps`), and
    `scratch`: the bytes of checkpoints and adapters. What the run uses of the cache is not evicted
    until `keep` is closed; what nobody uses is, where room is short, unless this is only a `look`.
    Raises `errors.DiskFullError` if there is none.
    """
    found, kind = surveyed.found, surveyed.kind
    places = [cache.base(found[0].fingerprint), *(cache.data(f.fingerprint) for f in found[1:])]
    _used(found, places, cache, keep)
    pulled = _to_pull(found, places)
    merges = config.merge.enabled and not helps
    needed = pulled + scratch + _written(found[0], kind, cache, config.merge.dtype, merges=merges)
    compared = 0
    quantizes = config.model.quantization != "none" and not kind.scheme
    if merges and config.examine.minutes and quantizes:
        compared = _merged_size(found[0], kind, config.merge.dtype)
    _make_room(cache, needed, compared, config.run.cache_limit, look=look)
    log.event(
        "preflight",
        f"found the base model ({log.size(found[0].size)}) and the data ({log.size(sum(f.size for f in found[1:]))})",
        bytes=pulled,
    )


def _make_room(cache: paths.Cache, needed: int, compared: int, limit: int | None, *, look: bool) -> None:
    """Make room for what the run needs, and for the comparison model if that fits too.

    The result is whole without the comparison, so a disk that is too small for it is only reported.
    """
    if compared:
        try:
            storage.make_room(cache.shelves(), needed + compared, limit, look=True)
        except errors.DiskFullError as e:
            log.warn(
                "preflight.compared",
                "the disk has no room for the model that the merged one is to be compared with "
                f"({log.size(compared)}), so the report will not have its loss: {e}",
                bytes=compared,
            )
            compared = 0
    storage.make_room(cache.shelves(), needed + compared, limit, look=look)


def base(url: str, cache: paths.Cache) -> Base:
    """Bring the base model at `url` here, verified, and say which one it is."""
    found = looked.base(url)
    path, whole = _here(found, cache.base(found.fingerprint))
    _unchanged(found, path, whole, "model.base")
    computes = {name: file for name, file in whole.files.items() if not _ABOUT.fullmatch(name)}
    return Base(url, path, Manifest(computes).digest, found.fingerprint)


def both(order: Merging, cache: paths.Cache, keep: ExitStack) -> str:
    """Look at the base and the adapter of a merge on its own, as `preflight` does; returns what names both."""
    found = [looked.base(order.model.base), looked.adapter(order.adapter.url)]
    places = [cache.base(found[0].fingerprint), cache.adapter(found[1].fingerprint)]
    needed = _to_pull(found, places) + _written(found[0], kinds.kind(found[0]), cache, order.merge.dtype, merges=True)
    _used(found, places, cache, keep)
    storage.make_room(cache.shelves(), needed, order.run.cache_limit, look=False)
    return paths.digest(" ".join(each.fingerprint for each in found))


def adapter(url: str, cache: paths.Cache) -> Path:
    """Bring the adapter at `url` here, verified: against its manifest if it is of a run."""
    found = looked.adapter(url)
    path, whole = _here(found, cache.adapter(found.fingerprint))
    _unchanged(found, path, whole, "--adapter")
    return path


def _unchanged(found: Found, path: Path, whole: Manifest, what: str) -> None:
    """Raise `errors.ModelError` if what a run or a merge published is not what it sealed."""
    sealed = verified.read_manifest(found, inputs.facts(path), what)
    if sealed:
        differing = {name for name, _ in sealed.files.items() ^ whole.files.items()}
        changed = [name for name in differing if not _ABOUT.fullmatch(name)]
        verified.raise_changed(found, changed, what)


def _used(found: Sequence[Found], places: Sequence[Path], cache: paths.Cache, keep: ExitStack) -> None:
    """Keep what is pulled, and made of it, from being evicted until `keep` is closed."""
    for place in (*cache.conversions(found[0].fingerprint), cache.work(""), *places):
        keep.enter_context(storage.used(place))


def _written(base: Found, kind: Kind, cache: paths.Cache, dtype: str, *, merges: bool) -> int:
    """Return the bytes that are still to be made of the base: converted, and merged."""
    converts = kind.converts and not any(map(manifest.sealed, cache.conversions(base.fingerprint)))
    merged = _merged_size(base, kind, dtype) if merges else 0
    names = {path.name.removesuffix(".partial") for path in cache.work("").glob("merged-*") if path.is_dir()}
    # of a start that was stopped in the merge
    there = sum(storage.on_disk(cache.work(name)) for name in names)
    return base.size * converts + max(0, merged - there)


def _merged_size(base: Found, kind: Kind, dtype: str) -> int:
    """Return about how many bytes the base takes unpacked, with numbers of `dtype`."""
    stored = str(kind.config.get("dtype") or kind.config.get("torch_dtype") or "bfloat16")
    if kind.scheme:
        return base.size * _PACKED * _BYTES[dtype] // 2
    return base.size * _BYTES[dtype] // _BYTES.get(stored, 2)


def _to_pull(found: Sequence[Found], places: Sequence[Path]) -> int:
    """Bytes that are not on this machine yet."""
    there = [
        isinstance(each.source, storage.Folder) or manifest.sealed(at) for each, at in zip(found, places, strict=True)
    ]
    return sum(
        max(0, each.size - storage.on_disk(at)) for each, at, here in zip(found, places, there, strict=True) if not here
    )


def data(
    sources: Iterable[Source], cache: paths.Cache, base: Base | None = None, images: str | None = None
) -> list[DataFile]:
    """Bring the data files of one split here, in the order of `sources` and of their names.

    If `base` sees images, those that lie beside the data come too, or all in the folder `images`.
    """
    files = []
    sees = base is not None and vision.sees(json.loads((base.path / "config.json").read_text(encoding="utf-8")))
    for each in sources:
        found = looked.data(each.url)
        path, whole = _here(found, cache.data(found.fingerprint))
        beside, seen = looked.images(images, each.url) if sees else None, None
        if beside:
            folder, held = _here(beside, cache.data(beside.fingerprint))
            seen = Images(beside.source.url, folder, held.digest)
        files += [
            DataFile(
                f"{found.source.url}/{e.key}", path / e.key, whole.files[e.key].sha256, each.weight, each.format, seen
            )
            for e in found.entries
        ]
    return files


def _images(config: Config, sources: Iterable[Source]) -> list[Found]:
    """The folders of images that belong to the `sources`, each once."""
    found = {each.fingerprint: each for source in sources if (each := looked.images(config.data.images, source.url))}
    return list(found.values())


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


def _here(found: Found, target: Path) -> tuple[Path, Manifest]:
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


def _recorded(folder: storage.Folder, found: Found, record: Path) -> Manifest:
    """Hash files that are used in place, once: the record's name changes when a size or a time does."""
    with contextlib.suppress(FileNotFoundError, errors.DamagedError):
        return manifest.parse(record.read_bytes(), str(record))
    files = {e.key: manifest.File(e.size, _hash_entry(folder, e)) for e in found.entries}
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


def _hash_entry(folder: storage.Folder, entry: storage.Entry) -> str:
    """Return the SHA-256 of a file; raises `errors.ChangedError` if it is not as it was listed."""
    digest = hashlib.sha256()
    for block in folder.stream(entry, 0, entry.size):
        digest.update(block)
    return digest.hexdigest()
