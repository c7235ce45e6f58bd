"""Small files that are read before the rest is downloaded, checked as the download checks them."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from job import errors, inputs, log, manifest, paths, storage
from job.manifest import Manifest
from job.pull import look
from job.pull.look import Found

REBUILD = "start again what made it; if it was changed on purpose, remove its training.json"
_LIMIT = 4_000_000  # bytes: configs have kilobytes, and the code of a model rarely 200 kB


def read_file(found: Found, name: str) -> bytes:
    """Return the content of the small file `name`, compared with the store's own checksum.

    Raises `errors.ModelError` if it is too large for a config or for code.
    """
    entry = next(entry for entry in found.entries if entry.key == name)
    return _read_entry(found, entry, "model.base")


def read_manifest(found: Found, facts: Mapping[str, Any], what: str) -> Manifest | None:
    """Return the manifest that a run or a merge sealed `found` with; None if it was made elsewhere.

    It is the one that was listed together with the files, so that a manifest of other files never
    judges these. `facts` are those of its training.json. Raises `errors.ModelError` if the manifest
    is missing, for it is written last, or damaged where it is stored, and `errors.ChangedError` if
    the files are being replaced.
    """
    if not {"inputs", "made_of"} & facts.keys():
        return None  # others call other things a manifest
    if found.seal is None:
        raise_unsealed(found, f"has no {manifest.NAME}, so it is not whole", what)
    url = found.source.url
    sealed = _read_entry(found, found.seal, what)
    if storage.is_void(sealed):
        raise errors.ChangedError(
            f"{what}: {url} is being replaced: start again when that has ended; if it was given "
            "up, start again what made it"
        )
    try:
        return manifest.parse(sealed, f"{url}/{manifest.NAME}")
    except errors.DamagedError:
        again = _read_entry(found, found.seal, what)  # some stores keep no checksum
        if again != sealed:
            return manifest.parse(again, f"{url}/{manifest.NAME}")
        raise_unsealed(found, f"has a damaged {manifest.NAME}", what)


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
    """Raise what `raise_unsealed` does if any files are `changed` since they were sealed."""
    if changed:
        fault = f"is not what its {manifest.NAME} says, such as {min(changed)}"
        raise_unsealed(found, fault, what)


def raise_unsealed(found: Found, fault: str, what: str) -> NoReturn:
    """Raise `errors.ModelError` with the `fault` for which `found` is not what was sealed.

    Raises `errors.ChangedError` if it was replaced meanwhile. A listing is not made in one moment,
    so files of one version can stand in it beside the manifest of another.
    """
    url = found.source.url
    if look.list_top(found.source) != list(found.listed):
        raise errors.ChangedError(f"{what}: {url} was changed while it was read: start again")
    raise errors.ModelError(f"{what}: {url} {fault}: {REBUILD}")


def _read_entry(found: Found, entry: storage.Entry, what: str) -> bytes:
    if entry.size > _LIMIT:
        raise errors.ModelError(
            f"{what}: {found.source.url}/{entry.key} has {log.size(entry.size)}, more than the "
            f"{log.size(_LIMIT)} that such a file may have: upload the right {entry.key}"
        )
    return storage.read_file(found.source, entry)
