"""The step itself: what the prepared data depend on, where they lie, and whether they are there already."""

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from job import errors, log, manifest, paths, storage
from job.config import Config
from job.inputs import Base, DataFile, Prepared
from job.manifest import Manifest
from job.model import tokenizer, vision
from job.prepare.crew import Recipe
from job.prepare.preparation import Preparation

_WORDS = Path(tokenizer.__file__)
_MODEL = (_WORDS, Path(vision.__file__), *sorted(_WORDS.parent.glob("legacy/*.py")))
_SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), *_MODEL)


def dataset(
    config: Config,
    base: Base,
    train: Sequence[DataFile],
    evaluation: Sequence[DataFile],
    cache: paths.Cache,
    keep: ExitStack,
) -> Prepared:
    """Prepare both splits with the tokenizer of `base`; the result stays in the cache until `keep` is closed.

    Raises `errors.DataError` naming file, line and reason of each record that cannot be used.
    """
    if config.data.leaks == "refuse":
        _refuse_leak(train, evaluation)
    key = _key(config, base.digest, train, evaluation)
    target = cache.prepared(key)
    keep.enter_context(storage.used(target))
    with storage.alone(target) as place:
        there = place.sealed()
        if there:
            log.event("prepare.here", f"prepared data are here already ({_summary(target)})", digest=_digest(there))
            return Prepared(target, _digest(there))
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        Preparation(config, _recipe(config, base), partial).run(train, evaluation)
        whole = manifest.seal(partial)
        place.fill(partial)
    log.event(
        "prepare.done",
        f"prepared {_summary(target)}",
        digest=_digest(whole),
        **json.loads((target / "data.json").read_text(encoding="utf-8")),
    )
    return Prepared(target, _digest(whole))


def _recipe(config: Config, base: Base) -> Recipe:
    """How examples are rendered for `base`; one whose image processor is not to be had can be trained on text."""
    data = config.data
    blind = Recipe(
        base.path.absolute(), data.template, config.model.trust_remote_code, data.max_length, data.loss_on,
        data.max_pixels, "the base model does not see them",
    )  # fmt: skip
    told = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    if not vision.sees(told) or config.train.method == "dpo":
        return blind
    words = blind.renderer().tokenizer
    try:
        vision.Vision(base.path, words, data.max_pixels)
    except errors.ModelError as e:
        log.warn("prepare.blind", f"{e}; it is trained on text only")
        return replace(blind, blind=str(e))
    return replace(blind, blind="")


def _refuse_leak(train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> None:
    trained = {file.sha256: file.url for file in train}
    for file in evaluation:
        if file.sha256 in trained:
            raise errors.DataError(
                f"data.eval: {file.url} has the same content as {trained[file.sha256]} in data.train, so the eval loss "
                "would measure memory: hold out other records, or use data.eval_fraction"
            )


def _key(config: Config, base_digest: str, train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> str:
    """What the result depends on: the files, the settings, the tokenizer, and the code that reads them."""
    parts = {
        "train": [(f.url, f.sha256, f.weight, f.format, f.images and f.images.digest) for f in train],
        "eval": [(f.url, f.sha256, f.format, f.images and f.images.digest) for f in evaluation],
        "settings": config.data.model_dump(mode="json", exclude={"train", "eval"}),
        "seed": config.run.seed,
        "method": config.train.method,
        "base": base_digest,
        "code": [manifest.sha256(path) for path in _SOURCES]
        + [importlib.metadata.version(p) for p in ("transformers", "tokenizers", "trl", "datasets", "pillow")],
    }
    return paths.digest(json.dumps(parts, sort_keys=True))


def _digest(whole: Manifest) -> str:
    """Of the tokens alone: the counts beside them name URLs, which may change while the data stay the same."""
    return Manifest({name: file for name, file in whole.files.items() if name.endswith(".arrow")}).digest


def _summary(target: Path) -> str:
    counts = json.loads((target / "data.json").read_text(encoding="utf-8"))
    return "; ".join(
        f"{split}: {c['examples']} examples, {c['tokens']} tokens, {c['trained_tokens'] / c['tokens']:.0%} "
        f"of them trained, longest {c['longest']}"
        for split, c in counts.items()
    )
