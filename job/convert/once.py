"""What is made of something in the cache, kept there beside it: written once, and again when that has changed."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from job import errors, log, manifest, storage

_MADE_FROM = "converted-from.txt"


def made(target: Path, source: str, made_from: str, write: Callable[[Path], None], keep: ExitStack) -> Path:
    """The folder `target` as `write` fills it from `source`, with the digest `made_from`; used until `keep` closes."""
    keep.enter_context(storage.used(target))
    with storage.alone(target) as place:
        if place.sealed() and (target / _MADE_FROM).read_text(encoding="ascii") == made_from:
            log.event("convert.here", f"{source} is converted already")
        else:
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            (partial / _MADE_FROM).write_text(made_from, encoding="ascii")
            whole = manifest.seal(partial)
            place.fill(partial)
            log.event("convert.done", f"converted {source}: {log.size(whole.size)}", digest=whole.digest)
    return target


def described(path: Path) -> Mapping[str, Any]:
    """The JSON object in the file `path`; raises `errors.ModelError` if it holds none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise errors.ModelError(f"{path} cannot be read ({e}): bring it again") from e
    if not isinstance(told, dict):
        raise errors.ModelError(f"{path} is not a JSON object: bring it again")
    return told
