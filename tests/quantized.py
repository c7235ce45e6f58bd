"""Tiny bases that come quantized: the weights of a plain model rounded, and packed as the formats' authors do it."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the neighbours that lie in an integer of AWQ, from its lowest bits on


def gptq(plain: Path, folder: Path, *, bits: int = 4, version: str = "gptq", ordered: bool = True) -> Weights:
    """Write the model in `plain` as GPTQ does it into `folder`; returns the weights that it stands for.

    If it is not `ordered`, any input belongs to any group, as with desc_act.
    """
    told = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}

    def packed(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> Weights:
        stored = (zeros - int(version == "gptq")) % 2**bits
        return {
            "qweight": torch.stack([_words(column, bits) for column in numbers.T], dim=1),
            "qzeros": torch.stack([_words(row, bits) for row in stored]),
            "scales": scales.half(),
            "g_idx": groups.to(torch.int32),
        }

    return _write(plain, folder, {**told, "desc_act": not ordered}, bits, packed, ordered=ordered)


def awq(plain: Path, folder: Path) -> Weights:
    """The same as AWQ does it."""

    def packed(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, _: torch.Tensor) -> Weights:
        def rows(values: torch.Tensor) -> torch.Tensor:
            return torch.stack([_words(row.view(-1, 8)[:, AWQ_ORDER].flatten(), 4) for row in values])

        return {"qweight": rows(numbers), "qzeros": rows(zeros), "scales": scales.half()}

    told = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _write(plain, folder, told, 4, packed, ordered=True)


def _write(
    plain: Path, folder: Path, told: dict[str, object], bits: int, packed: Callable[..., Weights], *, ordered: bool
) -> Weights:
    shutil.copytree(plain, folder)
    kept, meant = Weights(), Weights()
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight") or "vision" in name or "visual" in name:
            kept[name] = meant[name] = tensor
            continue
        inputs = tensor.shape[1]
        groups = torch.arange(inputs) // GROUP
        if not ordered:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(len(name)))]
        numbers, zeros, scales = _rounded(tensor.float().T, groups, bits)
        stem = name.removesuffix(".weight")
        kept |= {f"{stem}.{leaf}": part.contiguous() for leaf, part in packed(numbers, zeros, scales, groups).items()}
        kept[f"{stem}.bias"] = torch.zeros(tensor.shape[0])  # which AutoGPTQ gives every layer
        meant[name] = ((numbers - zeros[groups]) * scales[groups]).half().float().T.contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": told}), encoding="utf-8")
    return meant


def _rounded(weights: torch.Tensor, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [inputs, outputs], and zero points and scales [groups, outputs]."""
    most = 2**bits - 1
    parts = [weights[groups == group] for group in range(int(groups.max()) + 1)]
    low, high = torch.stack([part.amin(0) for part in parts]), torch.stack([part.amax(0) for part in parts])
    scales = ((high - low) / most).half().float()
    zeros = (-low / scales).round().clamp(1, most)
    numbers = (weights / scales[groups] + zeros[groups]).round().clamp(0, most)
    return numbers.long(), zeros.long(), scales


def _words(values: Iterable[torch.Tensor], bits: int) -> torch.Tensor:
    """Numbers of `bits` bits each in 32-bit integers, the first in the lowest bits."""
    each = [int(value) for value in values]
    size = 32 // bits
    words = [sum(n << bits * place for place, n in enumerate(each[at : at + size])) for at in range(0, len(each), size)]
    return torch.tensor([word - 2**32 * (word >= 2**31) for word in words], dtype=torch.int32)
