"""How many bytes the peak of a micro batch takes beyond the weights and their gradients."""

from dataclasses import dataclass

from job import config
from job.model.footprint import Footprint, count_dora_matrices

# Bytes for each token of a micro batch, where numbers have 2 bytes. Fitted to a simulation of one
# micro batch on fake tensors with TRL's, PEFT's and transformers' own code (table B in
# tests/shapes.py): 10 models, 256 to 16,384 tokens, with and without quantization, checkpointing
# and dropout. It was not measured on a GPU.
# While one layer is computed backward: for each hidden number, and for each inside the MLP.
_HIDDEN, _WIDE = 28.0, 9.6
_HIDDEN_KEPT, _WIDE_KEPT = 25.0, 7.0  # of a layer that is not recomputed, until its backward
_INPUT = 2.8  # for each input of a layer with an adapter: the copy that dropout makes, and its mask
# For each hidden number and expert: inputs gathered, outputs scattered and their gradients. This
# one was not fitted.
_ROUTED = 10.0
_TILE = (4096, 32768)  # tokens and words of which TRL 1.16 has logits at once (chunked_logprob.py)

# The same for each output of a layer with DoRA, fitted to the live bytes of layers on the CPU
# (tests/test_activations.py). Kept are two results in 16 bits, what the base and what the adapter
# computes, for the gradient of the magnitudes. PEFT returns float32 on 4-bit layers under autocast
# (peft/tuners/lora/bnb.py), which widens all that follows.
_DORA, _DORA_KEPT = 5.5, 4.0
_DORA_4BIT, _DORA_4BIT_KEPT = 10.5, 9.0


@dataclass(frozen=True)
class _Dora:
    """What DoRA adds to a layer of the decoder, in bytes."""

    peak: float = 0.0
    """For each token while the layer is computed backward."""
    kept: float = 0.0
    """For each token of a layer that is not recomputed, until its backward."""
    stream: float = 0.0
    """For each token of a layer's input."""
    matrices: float = 0.0
    """The temporary ones of one linear layer."""
    weights: float = 0.0
    """Weights that are dequantized or copied, until the layer's backward."""


def estimate_activations(settings: config.Config, footprint: Footprint, gradients: float) -> float:
    """Return what the peak of a micro batch takes beyond the weights and all gradients.

    With checkpointing each layer keeps its input, which is freed on the way back while gradients
    come: the peak is near the first layer or near the last. A pair of answers is two conversations;
    the reference is computed without gradients and adds nothing to the peak.
    """
    pairs = 2 if settings.train.method == "dpo" else 1
    tokens = pairs * settings.train.micro_batch_size * settings.data.max_length
    scale = footprint.width / 2
    dropout = settings.lora.dropout > 0 and pairs == 1  # `lora.without_dropout` for pairs
    copies = _INPUT * dropout
    if settings.model.quantization == "none" or footprint.scheme:
        copies += _INPUT * (1 + dropout)  # PEFT makes a float32 copy there
    dora = _estimate_dora(settings, footprint, dropout=dropout)
    hidden, wide, inputs = footprint.hidden, footprint.wide, footprint.inputs
    routed = _ROUTED * footprint.experts * hidden
    # the peak is at the way out of the MLP
    unpacked = min(footprint.unpacked, hidden * wide * footprint.width)
    layer = tokens * scale * (_HIDDEN * hidden + _WIDE * wide + copies * inputs + routed)
    layer += tokens * dora.peak + dora.weights + max(unpacked, dora.matrices)
    mask, bias = _estimate_mask(settings, tokens, footprint.width)
    layer += mask + bias
    kept = tokens * (hidden * footprint.width + dora.stream) * footprint.layers
    if not settings.train.gradient_checkpointing:
        each = scale * (_HIDDEN_KEPT * hidden + _WIDE_KEPT * wide + copies * inputs + routed)
        kept = (tokens * (each + dora.kept) + dora.weights + bias) * (footprint.layers - 1)
    tile = 2 * min(tokens, _TILE[0]) * min(footprint.vocabulary, _TILE[1])
    tile += 4 * tokens * hidden * footprint.width
    return max(layer + max(kept - gradients, 0.0), kept + tile - gradients)


def _estimate_mask(settings: config.Config, tokens: int, width: int) -> tuple[float, float]:
    """Return the bytes of the attention mask of packed sequences, and of its copy in each layer.

    TRL makes one row of a packed micro batch. transformers then has a mask [tokens, tokens] of
    booleans, which torch's attention kernels convert to the dtype of the activations
    (convert_boolean_attn_mask in aten/src/ATen/native/transformers/attention.cpp). This was neither
    fitted nor measured.
    """
    if not settings.data.packing or settings.model.attention == "flash_attention_2":
        return 0.0, 0.0
    return float(tokens * tokens), float(width * tokens * tokens)


def _estimate_dora(settings: config.Config, footprint: Footprint, *, dropout: bool) -> _Dora:
    """Return what PEFT 0.21 has in memory for DoRA, in peft/tuners/lora/dora.py and variants.py."""
    if not settings.lora.dora:
        return _Dora()
    width, scale = footprint.width, footprint.width / 2
    widens = settings.model.quantization != "none" and not footprint.scheme and scale == 1
    peak, kept = (_DORA_4BIT, _DORA_4BIT_KEPT) if widens else (_DORA, _DORA_KEPT)
    return _Dora(
        peak=peak * scale * footprint.outputs,
        kept=kept * scale * footprint.outputs,
        stream=2.0 * footprint.hidden if widens else 0.0,  # bytes that float32 has more
        matrices=count_dora_matrices(footprint.dora_inputs, footprint.dora_outputs, width),
        # with dropout the base's result is computed again, and its weight kept for the gradient
        weights=width * footprint.adapted if dropout else 0.0,
    )
