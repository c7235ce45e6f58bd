"""Adapters on the base that they were trained on, put there by PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel

from job import errors
from job.model import saved
from job.model.shard import Shard

Network: TypeAlias = Any  # each family has a class of its own


def load(network: Network, folders: Mapping[str, Path]) -> Network:
    """`network` with the adapters in `folders`; where those changed its vocabulary, its is changed too.

    PEFT calls them by other names (see `called`). Raises `errors.ModelError` if one of them cannot be loaded, or not
    beside the others.
    """
    _resize(network, folders)
    # One with trained tokens wraps the embedding, and PEFT cannot put one without them on that (KeyError in 0.21).
    for name in sorted(folders, key=lambda name: _has_tokens(folders[name])):
        try:
            if isinstance(network, PeftModel):
                network.load_adapter(str(folders[name]), adapter_name=called(name))
            else:
                network = PeftModel.from_pretrained(network, str(folders[name]), adapter_name=called(name))
            if len(folders) > 1:
                _try(network, name)
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as e:
            where = "on this base" if len(folders) == 1 else "beside the others (perhaps alone)"
            raise errors.ModelError(f"the adapter {name} in {folders[name]} cannot be used {where}: {e}") from e
    return network


def called(name: str) -> str:
    """What PEFT calls the adapter: the names of its modules must not be just anything."""
    return f"adapter-{name.encode().hex()}"


@torch.no_grad()
def _try(network: Network, name: str) -> None:
    """Have one token read: some that PEFT loads beside others do not work there."""
    network.set_adapter(called(name))
    network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=network.device))


def _resize(network: Network, folders: Mapping[str, Path]) -> None:
    """Give the vocabulary as many rows as the adapters have; to the base, new tokens are the mean of the others."""
    held = network.get_input_embeddings(), network.get_output_embeddings()
    called = {name.rpartition(".")[2] for name, module in network.named_modules() if module in held}
    endings = tuple(f".{name}.weight" for name in called)
    rows = {name: found for name, folder in folders.items() if (found := _rows(folder, endings))}
    old = int(held[0].weight.shape[0])
    if {*rows.values()} <= {old}:
        return
    if len({*rows.values()}) > 1:
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise errors.ModelError(f"the adapters have vocabularies of other sizes ({told} tokens): load them one by one")
    network.resize_token_embeddings(next(iter(rows.values())), mean_resizing=False)
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        if module is not None:
            with torch.no_grad():
                for part in module.parameters():  # a head may have a bias
                    part[old:] = part[:old].mean(0)


def _rows(folder: Path, endings: tuple[str, ...]) -> int | None:
    """How many tokens the embedding or the head in the adapter has, if there is one."""
    path = folder / saved.FILE
    if not path.is_file():  # PEFT says what it misses
        return None
    parts = ((saved.parsed(key), outline) for key, outline in Shard(path).tensors.items())
    return next((each.rows for (name, kind), each in parts if kind == "whole" and f".{name}".endswith(endings)), None)


def _has_tokens(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / saved.SETTINGS).read_text(encoding="utf-8")).get("trainable_token_indices"))
    except (OSError, ValueError):  # PEFT says what it misses
        return False
