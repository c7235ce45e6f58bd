"""What a URL in a config must look like, and what a plain path stands for."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from job import errors

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def sound(url: str) -> str:
    """Return `url`; raise `ValueError` if it carries credentials or names no possible bucket."""
    scheme, _, rest = url.partition("://")
    if scheme in ("s3", "hf") and "@" in rest.split("/")[0]:
        raise ValueError(
            "must not carry credentials; they come from the standard AWS and Hugging Face chain "
            "(environment, profile, role)"
        )
    if scheme == "s3" and not _BUCKET.match(rest.split("/")[0]):
        raise ValueError(f"{rest.split('/')[0]!r} is no bucket name (3 to 63 of a-z, 0-9, dots and dashes)")
    return url


def within(url: str, place: str) -> bool:
    """Whether `url` is `place` or lies in it; of folders, wherever their links lead and however they are spelled."""
    one, other = map(_found, (url, place))
    return f"{one}/".startswith(f"{other}/")


def _found(url: str) -> str:
    return (
        Path(unquote(url.removeprefix("file://"))).resolve().as_posix() if url.startswith("file:") else url.rstrip("/")
    )


def is_commit(revision: str) -> bool:
    """Whether `revision` is a full git commit."""
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)  # noqa: PLR2004 - digits of a git commit


def all_absolute(tree: dict[str, Any]) -> dict[str, Any]:
    """Turn plain paths of data files into file:// URLs, so that the resolved config means the same everywhere."""
    data = tree.get("data")
    if isinstance(data, dict):
        for split in ("train", "eval"):
            paths = data.get(split)
            if isinstance(paths, list):
                data[split] = [_source(each) for each in paths]
        if isinstance(data.get("images"), str):
            data["images"] = absolute(data["images"])
    for section, key in (("run", "url"), ("model", "base"), ("adapter", "url")):
        values = tree.get(section)
        if (
            isinstance(values, dict)
            and isinstance(values.get(key), str)
            and values[key].startswith(("./", "../", "/", "~"))
        ):
            values[key] = absolute(values[key])
    return tree


def _source(given: object) -> object:
    if isinstance(given, dict) and isinstance(given.get("url"), str):
        return given | {"url": absolute(given["url"])}
    return absolute(given) if isinstance(given, str) else given


def absolute(path: str) -> str:
    """The URL of a plain path; a URL as it is."""
    if "://" in path or not path:
        return path
    folder = "/" if path.endswith("/") else ""
    try:
        absolute = Path(path).expanduser().absolute()
    except RuntimeError as e:
        raise errors.ConfigError(f"{path}: {e}") from e
    # Without following links: a link's name says what is in it, its target's often does not.
    return Path(os.path.normpath(absolute)).as_uri() + folder
