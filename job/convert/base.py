"""A base model in an old layout, or in pickled files, becomes what transformers loads."""

import importlib.metadata
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from job import errors, log, manifest, paths
from job.convert import once
from job.inputs import Base
from job.model import legacy

if TYPE_CHECKING:
    import torch

_KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # of a base whose weights alone are converted
_TOLD = ("README.md", "LICEN", "NOTICE")  # how the names of those begin that say whose the base is
_SOURCES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    *sorted(Path(legacy.__file__).parent.glob("*.py")),
    Path(legacy.__file__).parent.with_name("files.py"),
)


def native(base: Base, cache: paths.Cache, keep: ExitStack) -> Base:
    """`base` itself if transformers loads it, otherwise what it becomes, in the cache until `keep` is closed.

    It stays the same base, by URL and digest. Raises `errors.ModelError` if it is not what its config.json says.
    """
    layout = legacy.recognise(once.described(base.path / "config.json"), base.url)
    if layout is None and any(not path.name.startswith("adapter_") for path in base.path.glob("*.safetensors")):
        return base
    target = cache.converted(base.fingerprint, _made_by())
    once.made(target, base.url, base.digest, lambda folder: _convert(base, layout, folder), keep)
    return Base(base.url, target, base.digest)


def _made_by() -> str:
    """What the result depends on besides the base: this code, and what writes the tokenizer."""
    code = [manifest.sha256(path) for path in _SOURCES]
    return paths.digest(" ".join([*code, *map(importlib.metadata.version, ("transformers", "tokenizers"))]))


def _convert(base: Base, layout: legacy.Layout | None, target: Path) -> None:
    from job.model import files  # torch takes seconds to import, and most bases need no conversion

    for path in base.path.iterdir():
        if path.is_file() and path.name.startswith(_TOLD):
            shutil.copyfile(path, target / path.name)
    if layout is None:
        log.event("convert.start", f"{base.url} has pickled weights: writing them as safetensors")
        for path in base.path.iterdir():
            if path.suffix in _KEPT and path.name not in (manifest.NAME, "pytorch_model.bin.index.json"):
                shutil.copyfile(path, target / path.name)
        files.write(files.tensors(base.path), target)
        return
    log.event(
        "convert.start", f"{base.url} is a {layout.NAMES} model: converting it to {layout.config()['model_type']}"
    )
    generation = base.path / "generation_config.json"
    told = once.described(generation) if generation.exists() else {}
    try:
        words = layout.tokenizer(base.path, told)
    except Exception as e:  # a broken file makes libraries fail in many ways
        raise errors.ModelError(f"model.base: the tokenizer of {base.url} cannot be converted: {e}") from e
    words.save_pretrained(target)
    for name, content in [("config.json", layout.config()), (generation.name, layout.generation(told, words))]:
        (target / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    renamed = (pair for name, tensor in files.tensors(base.path) for pair in _renamed(layout, name, tensor, base.url))
    _check(target, files.write(renamed, target), base.url)


def _renamed(layout: legacy.Layout, name: str, tensor: "torch.Tensor", where: str) -> "list[tuple[str, torch.Tensor]]":
    try:
        return list(layout.weights(name, tensor).items())
    except KeyError as e:
        raise errors.ModelError(
            f"model.base: {where} holds the weight {name}, which no {layout.NAMES} model has"
        ) from e
    except RuntimeError as e:
        raise errors.ModelError(f"model.base: {where} is not what its config.json says: the weight {name}: {e}") from e


def _check(target: Path, made: "dict[str, torch.Size]", where: str) -> None:
    """Compare with what transformers will look for: it draws what is missing at random, and says so in a log only."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(target, local_files_only=True)
        )
    wanted = {name: parameter.shape for name, parameter in network.named_parameters()}
    for name in sorted(wanted.keys() | made.keys()):
        if wanted.get(name) != made.get(name):
            raise errors.ModelError(
                f"model.base: {where} is not what its config.json says: the weight {name} would be "
                f"{_shape(wanted.get(name))}, and is {_shape(made.get(name))}"
            )


def _shape(shape: "torch.Size | None") -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
