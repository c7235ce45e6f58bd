"""Linear layers whose weights stay packed, and are unpacked when they are used: in plain torch, on any device.

The libraries that do this bring kernels that give no gradient, change their scales when they are used, or compile at
start (docs/decisions.md), which a job that is to resume exactly cannot use.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from job import errors
from job.model.pieces import Pieces
from job.model.prequantized import PACKED, Scheme, check

_PACKED, _ZEROS, _SCALES, _GROUPS = PACKED
_BIAS = "bias"
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in each packed number


class QuantizedLinear(nn.Linear):
    """A frozen layer: what it computes is what a plain one does with the unpacked weights in `dtype`."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    def __init__(self, plain: nn.Linear, scheme: Scheme, held: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.scheme, self.dtype = scheme, dtype
        for name in (_PACKED, _ZEROS, _SCALES, _GROUPS, _BIAS):
            self.register_buffer(name, held.get(name))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter of a plain layer
        """The unpacked weights, [out_features, in_features], in `dtype`.

        Scale times (number less zero point), in the scales' own number format, as the authors of the formats do it.
        """
        scales = self.scales
        zeros = _zeros(self.qzeros, self.scheme).to(scales.dtype)
        made = _unpacked(self.qweight, self.scheme).to(scales.dtype)
        if self.g_idx is None:
            grouped = made.view(len(scales), -1, self.out_features)
            made = grouped.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1)).view_as(made)
        else:
            made.sub_(zeros[self.g_idx]).mul_(scales[self.g_idx])
        return made.T.to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """What the layer makes of `input`, [..., in_features], in its number format."""
        made: torch.Tensor = _Product.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            made = made + self.bias.to(made.dtype)
        return made.to(input.dtype)

    def settle(self, name: str) -> None:
        """Look at what was loaded for the layer called `name`; raises `errors.ModelError` if it makes no sense.

        To which group each row belongs is forgotten where that is in order, which is faster.
        """
        if not self.scales.isfinite().all():
            raise errors.ModelError(f"model.base: {name}.{_SCALES} holds NaN or infinity: the model is damaged")
        if self.g_idx is not None and not (int(self.g_idx.min()) >= 0 and int(self.g_idx.max()) < len(self.scales)):
            raise errors.ModelError(
                f"model.base: {name}.{_GROUPS} names a group that there is not: the model is damaged"
            )
        if self.g_idx is not None and self.in_features % len(self.scales) == 0:
            size = self.in_features // len(self.scales)
            ordered = torch.arange(self.in_features, device=self.g_idx.device) // size
            if torch.equal(self.g_idx, ordered.to(self.g_idx.dtype)):
                self.g_idx = None


class _Product(torch.autograd.Function):
    """Input times weights, which are unpacked again for the gradient instead of being kept until then."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:  # noqa: ANN401 - torch's
        ctx.layer = layer
        return given @ layer.weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401 - torch's
        return gradient @ ctx.layer.weight, None


def replace(network: PreTrainedModel, scheme: Scheme, files: Pieces, dtype: torch.dtype) -> None:
    """Put a quantized layer, still without weights, wherever the `files` have one for a linear layer of `network`.

    Raises `errors.ModelError` if they have one for something else, or one of another size.
    """
    check(files.names, scheme, str(files.base))
    found = sorted(key.removesuffix(f".{_PACKED}") for key in files.names if key.endswith(f".{_PACKED}"))
    shared: dict[str, str] = network.all_tied_weights_keys
    tied = {key.removesuffix(".weight") for key in shared}
    for name in found:
        if name in tied:
            raise errors.ModelError(
                f"model.base: {name} is quantized in its files, and shared with the embeddings by its config.json: set "
                "tie_word_embeddings to false there"
            )
        try:
            plain = network.get_submodule(name)
        except AttributeError:
            plain = None
        if not isinstance(plain, nn.Linear):
            raise errors.ModelError(
                f"model.base: {name} is quantized in its files, and no linear layer of the model: use the original "
                "weights"
            )
        leaves = (_PACKED, _ZEROS, _SCALES, _GROUPS, *([_BIAS] if plain.bias is not None else []))
        held = {leaf: files.blank(f"{name}.{leaf}") for leaf in leaves if f"{name}.{leaf}" in files.names}
        _check(name, plain, scheme, held)
        _check_kinds(name, held)
        if plain.bias is None and f"{name}.{_BIAS}" in files.names and files.read(f"{name}.{_BIAS}").any():
            raise errors.ModelError(f"model.base: {name} has a bias in its files, and none in the model")
        network.set_submodule(name, QuantizedLinear(plain, scheme, held, dtype))


def settle(network: nn.Module) -> None:
    """Look at what was loaded, once; raises `errors.ModelError` if it makes no sense."""
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            module.settle(name)


def _check(name: str, plain: nn.Linear, scheme: Scheme, held: dict[str, torch.Tensor]) -> None:
    rows, columns = plain.in_features, plain.out_features
    uneven = scheme.group > 0 and rows % scheme.group > 0
    groups = 1 if scheme.group == -1 else -(-rows // scheme.group)
    wanted = {
        _PACKED: scheme.packed(rows, columns),
        _ZEROS: (groups, columns * scheme.bits // 32),
        _SCALES: (groups, columns),
        **({_GROUPS: (rows,)} if _GROUPS in held or uneven else {}),  # else rows follow each other
        **({_BIAS: (columns,)} if plain.bias is not None else {}),
    }
    seen = {leaf: tuple(tensor.shape) for leaf, tensor in held.items()}
    if seen != wanted:
        raise errors.ModelError(
            f"model.base: {name} is {seen} in its files, and should be {wanted} ({scheme}): the model is not whole, or "
            "was quantized in another way than its config.json says"
        )


def _check_kinds(name: str, held: dict[str, torch.Tensor]) -> None:
    """Raise `errors.ModelError` if numbers are of a kind that no format has there."""
    for leaf, tensor in held.items():
        right = tensor.is_floating_point() if leaf in (_SCALES, _BIAS) else not tensor.is_floating_point()
        if not right or (leaf in (_PACKED, _ZEROS) and tensor.dtype != torch.int32):
            raise errors.ModelError(
                f"model.base: {name}.{leaf} is of {tensor.dtype} in its files, which no known format has there"
            )


def _unpacked(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The numbers of a layer, [in_features, out_features]: GPTQ packs neighbours in a column, AWQ those in a row."""
    if scheme.method == "awq":
        return _numbers(packed, scheme)
    each = _numbers(packed, scheme).view(*packed.shape, -1)
    return each.transpose(1, 2).reshape(-1, packed.shape[1])


def _zeros(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The zero points, [groups, out_features]."""
    return _numbers(packed + _ONES[scheme.bits] * scheme.offset, scheme)  # a carry goes where a borrow came from


def _numbers(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What 32-bit integers hold, as bytes: [..., n] becomes [..., n x 32 / bits]."""
    shifts = torch.arange(0, 8, scheme.bits, dtype=torch.uint8, device=packed.device)
    octets = packed.contiguous().view(torch.uint8).unsqueeze(-1)
    each: torch.Tensor = ((octets >> shifts) & (2**scheme.bits - 1)).view(*packed.shape, -1)
    if scheme.method == "awq":  # eight neighbours lie at 0, 4, 1, 5, 2, 6, 3, 7 (awq/utils/packing_utils.py of AutoAWQ)
        each = each.view(*packed.shape, 2, 4).transpose(-1, -2)
    return each.reshape(*packed.shape[:-1], -1)
