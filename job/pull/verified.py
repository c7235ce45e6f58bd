"""Small files that are read before the rest is downloaded, checked as the download checks them."""

from collections.abc import Collection, Mapping
from typing import Any

from job import errors, inputs, log, manifest, paths, storage
from job.manifest import Manifest
from job.pull.look import Found

REBUILD = "start again what made it; if it was changed on purpose, remove its training.json"
_LIMIT = 4_000_000  # bytes: configs have kilobytes, and the code of a model rarely 200 kB


def read_file(found: Found, name: str) -> bytes:
    """Return the content of the small file `name`, compared with the store's own checksum.

    Raises `errors.ModelError` if it is too large for a config or for code.
    """
    entry = next(entry for entry in found.entries if entry.key == name)
    if entry.size > _LIMIT:
        raise errors.ModelError(
            f"model.base: {found.source.url}/{name} has {log.size(entry.size)}, more than the "
            f"{log.size(_LIMIT)} that a config or code may have: upload the right {name}"
        )
    return storage.read_file(found.source, entry)


def read_manifest(found: Found, facts: Mapping[str, Any], what: str) -> Manifest | None:
    """Return the manifest that a run or a merge sealed `found` with; None if it was made elsewhere.

    `facts` are those of its training.json. Raises `errors.ModelError` if the manifest is missing,
    for it is written last.
    """
    if not {"inputs", "made_of"} & facts.keys():
        return None  # others call other things a manifest
    url = found.source.url
    seal = next((entry for entry in found.source.list() if entry.key == manifest.NAME), None)
    if seal is None:
        lacks = f"{what}: {url} has no {manifest.NAME}, so it is not whole"
        raise errors.ModelError(f"{lacks}: {REBUILD}")
    sealed = storage.read_range(found.source, seal, 0, seal.size)
    return manifest.parse(sealed, f"{url}/{manifest.NAME}")


def read_sealed(found: Found, names: Collection[str], what: str) -> dict[str, bytes]:
    """Return the content of the small files `names`, as it was sealed.

    Raises `errors.ModelError` if one differs from the manifest, or if Python code that is in the
    manifest is missing. Of a base that was made elsewhere nothing is compared.
    """
    content = {name: read_file(found, name) for name in names}
    there = {entry.key for entry in found.entries}
    if paths.TRAINING not in there:
        return content
    training = f"{found.source.url}/{paths.TRAINING}"
    facts = inputs.parse_facts(read_file(found, paths.TRAINING), training)
    sealed = read_manifest(found, facts, what)
    if sealed:
        changed = {name for name in sealed.files.keys() - there if name.endswith(".py")}
        for name, data in content.items():
            arrived = manifest.File(size=len(data), sha256=manifest.sha256_of(data))
            if sealed.files.get(name) != arrived:
                changed.add(name)
        raise_changed(found, changed, what)
    return content


def raise_changed(found: Found, changed: Collection[str], what: str) -> None:
    """Raise `errors.ModelError` if any files are `changed` since they were sealed."""
    if changed:
        differs = f"{found.source.url} is not what its {manifest.NAME} says, such as {min(changed)}"
        raise errors.ModelError(f"{what}: {differs}: {REBUILD}")
