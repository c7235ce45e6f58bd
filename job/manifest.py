"""When is a directory complete? When its ``manifest.json`` lists every file with size and SHA-256, and they match.

The manifest is written last, so its presence means that everything before it arrived.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from job import errors

NAME = "manifest.json"
_TEMPORARY = f".{NAME}.part"
_BLOCK = 1 << 20  # bytes read at once when hashing


@dataclass(frozen=True)
class File:
    """One file of a directory: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a complete directory, by their path relative to it (``/`` between parts)."""

    files: Mapping[str, File]

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and contents: equal if and only if the directories are equal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> bytes:
        """The canonical bytes: equal manifests give equal bytes."""
        files = {name: {"sha256": file.sha256, "size": file.size} for name, file in sorted(self.files.items())}
        return json.dumps({"files": files}, indent=1, sort_keys=True).encode()


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest that came from `where`.

    Raises `errors.DamagedError` when the bytes are not a manifest: such a directory is not complete.
    """
    try:
        files = json.loads(data)["files"]
        return Manifest({safe(name): File(size=int(f["size"]), sha256=str(f["sha256"])) for name, f in files.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise errors.DamagedError(
            f"{where} is not a manifest ({e!r}): the directory beside it cannot be trusted"
        ) from e


def safe(name: str) -> str:
    """Return `name` if it stays inside the directory that it is relative to; raise `ValueError` if it does not.

    Names come from a bucket that others may write: ``../`` must not reach the rest of the disk.
    """
    if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"unsafe file name {name!r}")
    return name


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal, in constant memory."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def files(directory: Path) -> dict[str, Path]:
    """Every file below `directory` by its name in a manifest, except a manifest that is there already."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file())
    names = {p.relative_to(directory).as_posix(): p for p in paths}
    for own in (NAME, _TEMPORARY):
        names.pop(own, None)
    return names


def of(directory: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """Describe every file below `directory`, except a manifest that is there already.

    The SHA-256 of those that are `known`, by name, is not computed again.
    """
    digests = known or {}
    return Manifest(
        {
            name: File(size=path.stat().st_size, sha256=digests.get(name) or sha256(path))
            for name, path in files(directory).items()
        }
    )


def seal(directory: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """Declare the local `directory` complete: write its manifest, as the last file and by rename.

    The SHA-256 of files that were hashed while they were written need not be computed again: `known`, by name.
    """
    manifest = of(directory, known)
    temporary = directory / _TEMPORARY
    temporary.write_bytes(manifest.to_json())
    temporary.rename(directory / NAME)
    return manifest


def sealed(directory: Path) -> Manifest | None:
    """The manifest of a local directory if it is complete, judged by file sizes; None otherwise."""
    try:
        manifest = parse((directory / NAME).read_bytes(), str(directory / NAME))
        whole = all((directory / name).stat().st_size == file.size for name, file in manifest.files.items())
    except (FileNotFoundError, NotADirectoryError, errors.DamagedError):
        return None
    return manifest if whole else None


def sha256_of(data: bytes) -> str:
    """SHA-256 of bytes in memory, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
