"""Whether an adapter belongs to a base: each part of it has its place there, and each place its part."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from job import errors
from job.merge.adapter import BIAS, WEIGHT, Adapter, LowRank
from job.merge.settings import some
from job.model import saved
from job.model.pieces import Pieces

_HEADS = ("score", "classifier", "classification_head")
_LAYERS = (nn.Linear, nn.Embedding, Conv1D)


def check(adapter: Adapter, network: PreTrainedModel, files: Pieces) -> None:
    """Call what `adapter` changes as `network` does; raises `errors.ModelError` if the two do not belong together."""
    adapter.shift(_aliases(network, files))
    there = network.state_dict().keys()
    if biased := sorted(name for name, each in adapter.layers.items() if each.bias and name + BIAS not in there):
        raise errors.ModelError(
            f"the adapter has a bias for layers that have none in the base ({some(biased)}), so that has no place "
            "for it: train without lora_bias"
        )
    if lost := sorted(adapter.changed - there):
        raise errors.ModelError(
            f"the adapter does not fit the base: {'none' if len(lost) == len(adapter.changed) else 'not all'} of its "
            f"weights have a counterpart there; {len(lost)} have none, such as "
            f"{some([name.removesuffix(WEIGHT) for name in lost])}: {_why(lost)}"
        )
    modules = dict(network.named_modules())
    for name, update in adapter.layers.items():
        _fits(name, modules[name], update, enlarged=name + WEIGHT in adapter.whole)
    tied = {
        one.removesuffix(WEIGHT): other.removesuffix(WEIGHT)
        for pair in network.all_tied_weights_keys.items()
        for one, other in (pair, pair[::-1])
    }
    if lacking := [*_untouched(adapter, modules), *_unkept(adapter, modules, tied), *_unbiased(adapter, there)]:
        raise errors.ModelError(
            f"the adapter is not whole: by its settings it was trained on {some(lacking)}, of which it holds no "
            f"weights ({len(lacking)} such): save or bring it again"
        )


def untie(adapter: Adapter, network: PreTrainedModel, files: Pieces) -> Mapping[str, str | None]:
    """Which weights that are one in the base are two from now on.

    By the name of the one that the files lack, or of one of them, where that comes from. Where the adapter changes
    both alike they stay one, and a change is kept for each that is in the files.
    """
    apart: dict[str, str | None] = {}
    for one, two in dict(network.all_tied_weights_keys).items():
        _share(adapter, one, two)
        changes = {one, two} & adapter.changed
        rows = [adapter.tokens.get(name.removesuffix(WEIGHT)) for name in (one, two)]
        if rows[1] and not rows[0] and one.removesuffix(WEIGHT) in adapter.layers:
            raise errors.ModelError(
                f"the adapter has trained tokens of {two} and a LoRA on {one}, which is the same matrix in the base: "
                "what PEFT computes with both is not what it merges; train with one of them"
            )
        if changes and rows[1] and one not in changes:  # PEFT ties those itself
            if one in files.names:
                adapter.tokens[one.removesuffix(WEIGHT)] = adapter.tokens[two.removesuffix(WEIGHT)]
        elif len(changes) == 2 and _alike(adapter, one, two):  # noqa: PLR2004 - both
            adapter.forget({one, two} - files.names)
        elif changes:
            lacking = [name for name in (one, two) if name not in files.names]
            apart[lacking[0] if lacking else one] = ({one, two} - {*lacking}).pop() if lacking else None
    return apart


def _aliases(network: PreTrainedModel, files: Pieces) -> dict[str, str]:
    """Names that weights have in the files, where the model has others: adapters of old versions use those."""
    there = network.state_dict().keys()
    named = {files.place(name)[1]: name for name in files.names - files.changed.keys()}
    return {called: name for called, name in named.items() if called != name and called not in there}


def _why(lost: Iterable[str]) -> str:
    """Why weights may have no counterpart."""
    if any(".experts." in name for name in lost):
        return (
            "transformers holds all experts of a layer in one tensor now: merge it with PEFT, which makes such of these"
        )
    if any(name.startswith(("module.", "_orig_mod.")) or ".default." in name for name in lost):
        return "they are called as in a network that trains: save it with PEFT's save_pretrained"
    if all(name.rpartition(".")[0].endswith(_HEADS) for name in lost):
        return "they are a head for another task, which a language model has no place for: merge it with PEFT"
    return "it was trained on another base"


def _fits(name: str, module: nn.Module, update: LowRank, *, enlarged: bool) -> None:
    if isinstance(module, nn.Linear) and not update.embedding:
        wanted = (module.in_features, module.out_features)
    elif isinstance(module, Conv1D) and not update.embedding:
        wanted = (module.nx, module.nf)
    elif isinstance(module, nn.Embedding) and update.embedding:
        wanted = (module.num_embeddings, module.embedding_dim)
    else:
        raise errors.ModelError(
            f"the adapter changes {name}, which is a {type(module).__name__} in the base: linear layers and "
            "embeddings can be merged; merge it with PEFT"
        )
    if not enlarged and (update.inputs, update.outputs) != wanted:
        raise errors.ModelError(
            f"the adapter's matrices for {name} are for {update.inputs} inputs and {update.outputs} outputs, and the "
            f"base has {wanted[0]} and {wanted[1]} there: it was trained on another base"
        )


def _untouched(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Layers that the settings mean and the adapter does not hold."""
    meant = saved.meant(adapter.settings, (name for name, each in modules.items() if isinstance(each, _LAYERS)))
    return sorted(meant - adapter.layers.keys() - {name.removesuffix(WEIGHT) for name in adapter.whole})


def _unkept(adapter: Adapter, modules: Mapping[str, nn.Module], tied: Mapping[str, str]) -> Iterable[str]:
    """Parameters that were trained whole, and embeddings of which rows were, by the settings, and that lack."""
    called = {saved.parsed(key)[0].rpartition(".")[0] for key in adapter.file.tensors}  # as another transformers does
    for name in adapter.settings.get("modules_to_save") or []:
        meant = [each for each in modules if each.endswith(name)]  # PEFT compares just the ends
        for module in meant:
            for leaf, _ in modules[module].named_parameters():
                if f"{module}.{leaf}" not in adapter.whole:
                    yield f"{module}.{leaf}"
        if not meant and not any(each.endswith(name) for each in called):
            yield name
    told = adapter.settings.get("trainable_token_indices")
    held = [{name, tied.get(name, name)} for name in adapter.tokens]  # of two that are tied, PEFT saves one
    for name in told if isinstance(told, Mapping) else ():
        if not any(each.endswith(name) for names in held for each in names):
            yield name
    if told and not adapter.tokens:
        yield "trainable_token_indices"


def _share(adapter: Adapter, one: str, two: str) -> None:
    """What PEFT saved of the base below a LoRA on `one` is what is below `two` as well, and the other way round."""
    for name, other in ((one, two), (two, one)):
        if saved.WRAPPED in adapter.whole.get(name, "") and other not in adapter.whole:
            adapter.whole[other] = adapter.whole[name]


def _unbiased(adapter: Adapter, there: Iterable[str]) -> Iterable[str]:
    """Biases that were trained, by the settings, and that lack."""
    kind = adapter.settings.get("bias")
    for name in there if kind in ("all", "lora_only") else ():
        layer = name.removesuffix(BIAS)
        if name.endswith(BIAS) and (kind == "all" or layer in adapter.layers) and name not in adapter.whole:
            yield name


def _alike(adapter: Adapter, one: str, two: str) -> bool:
    """Whether both weights become the same."""
    tokens = [adapter.tokens.get(name.removesuffix(WEIGHT)) for name in (one, two)]
    if tokens[0] or tokens[1]:
        return tokens[0] == tokens[1] and one not in adapter.whole and two not in adapter.whole
    held = [adapter.whole.get(name) for name in (one, two)]
    layers = [adapter.layers.get(name.removesuffix(WEIGHT)) for name in (one, two)]
    if held[0] and held[1]:
        same = torch.equal(adapter.file.read(held[0]), adapter.file.read(held[1]))
    else:
        same = held[0] is held[1]
    if layers[0] and layers[1]:
        return same and layers[0].same(layers[1])
    return same and layers[0] is layers[1]
