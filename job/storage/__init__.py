"""Directories and small objects to and from a store, whole or not at all."""

from pathlib import Path
from urllib.parse import unquote

from job import errors
from job.storage.conditions import checked
from job.storage.directory import is_void, read_file, read_range, remove, sealed
from job.storage.download import fetch, here, pull
from job.storage.evict import make_room, on_disk
from job.storage.folder import Folder
from job.storage.local import alone, used
from job.storage.store import Blob, Entry, Source, Store
from job.storage.upload import push

__all__ = [
    "Blob",
    "Entry",
    "Folder",
    "Source",
    "Store",
    "alone",
    "checked",
    "connect",
    "fetch",
    "here",
    "is_void",
    "make_room",
    "on_disk",
    "pull",
    "push",
    "read_file",
    "read_range",
    "remove",
    "sealed",
    "source",
    "used",
]


def connect(url: str) -> Store:
    """The writable store at ``s3://bucket/prefix`` or ``file:///path``."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        return Folder(Path(unquote(rest)))
    if scheme == "s3":
        from job.storage.s3 import S3  # boto3 takes a third of a second to import

        bucket, _, prefix = rest.partition("/")
        return S3(bucket, prefix.strip("/"))
    raise errors.ConfigError(f"{url}: no store; use s3://bucket/prefix or file:///absolute/path")


def source(url: str) -> Source:
    """What can be read at `url`: a writable store, ``hf://org/name@revision`` or ``hf://datasets/org/name@revision``.

    Of data also a folder in the repository: ``hf://datasets/org/name@revision/folder``.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "hf":
        return connect(url)
    from job.storage.hub import Hub

    if not rest.startswith("datasets/"):
        repository, _, revision = rest.partition("@")
        return Hub(repository, unquote(revision))
    repository, at, after = rest.removeprefix("datasets/").partition("@")
    parts = (after if at else repository).split("/")
    length = 2 if not at else 3 if parts[0] == "refs" else 1  # org/name; refs/pr/1, refs/convert/parquet; a branch
    first, below = "/".join(parts[:length]), "/".join(parts[length:])
    name, revision = (repository, first) if at else (first, "")
    return Hub(name, unquote(revision), "dataset", f"{below}/" if below else "")
