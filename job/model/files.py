"""A base model's weights as files: read one tensor after another, and written again in safetensors."""

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from job import errors
from job.model.shard import Shard

_PICKLED = "pytorch_model*.bin"
_SHARD_BYTES = 2 * 10**9
_INDEX = "model.safetensors.index.json"


def tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight in the folder `base`, by name, one in memory at a time but for what the page cache keeps.

    Pickled files are read only where there are no others, and as nothing but tensors. Raises `errors.ModelError` if a
    file is broken, or holds something else.
    """
    for path in _paths(base):
        yield from inside(path, "model.base")


def names(base: Path) -> set[str]:
    """What the weights in the folder `base` are called; raises as `tensors` does."""
    held: set[str] = set()
    for path in _paths(base):
        if path.suffix == ".safetensors":
            held.update(Shard(path).tensors)
        else:
            held.update(name for name, _ in inside(path, "model.base"))
    return held


def inside(path: Path, whose: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in one file, by name; `whose` it is, an error says. Raises as `tensors` does."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield name, file.get_tensor(name)
        else:
            mapped = zipfile.is_zipfile(path)  # as torch writes them since 2020
            for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=mapped).items():
                yield name, _tensor(tensor)
    except Exception as e:  # a broken pickle makes torch fail in many ways
        raise errors.ModelError(
            f"{whose}: {path} is broken, or holds something other than weights, which is not read because it could "
            f"run code: {e}"
        ) from e


def _paths(base: Path) -> list[Path]:
    safe = sorted(path for path in base.glob("*.safetensors") if not path.name.startswith("adapter_"))
    return safe or sorted(base.glob(_PICKLED))


def _tensor(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a value of type {type(value).__name__} is among them")
    return value


def write(named: Iterable[tuple[str, torch.Tensor]], target: Path, limit: int = _SHARD_BYTES) -> dict[str, torch.Size]:
    """Write weights as shards of up to `limit` bytes with their index into the folder `target`; returns their shapes.

    No more than a shard is in memory.
    """
    shapes: dict[str, torch.Size] = {}
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    count = size = total = 0

    def flush() -> None:
        nonlocal count, size
        count += 1
        save_file(shard, target / f"part-{count:05d}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, count))
        shard.clear()
        size = 0

    for name, tensor in named:
        if name in shapes:
            raise errors.ModelError(f"model.base: the weight {name} is in the files twice")
        if shard and size + tensor.nbytes > limit:
            flush()
        shard[name], shapes[name] = tensor.clone(memory_format=torch.contiguous_format), tensor.shape
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    final = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, file in final.items():
        (target / f"part-{number:05d}.safetensors").rename(target / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[at] for name, at in sorted(places.items())}}
    (target / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return shapes
