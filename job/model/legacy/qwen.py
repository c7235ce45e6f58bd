"""Qwen as first published (1.8B, 7B, 14B and 72B of 2023, ``model_type: qwen``): Qwen2 under other names.

Within the context that they were trained for, the two compute the same: beyond it Qwen v1 stretches its rotary
embedding and scales its attention (``use_dynamic_ntk``, ``use_logn_attn``), which Qwen2 does not.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from job.model.legacy.renaming import Renaming

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT, _BEGIN, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (_END_OF_TEXT, _BEGIN, _END, *(f"<|extra_{number}|>" for number in range(205)))
_CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{ raise_exception('Qwen of 2023 does not know the role ' + message['role']) }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_NAMES = Renaming(
    outside={
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layer=re.compile(r"^transformer\.h\.(\d+)\.(.+)$"),
    inside={
        "ln_1.weight": "input_layernorm.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "mlp.w1.weight": "mlp.up_proj.weight",
        "mlp.w2.weight": "mlp.gate_proj.weight",
        "mlp.c_proj.weight": "mlp.down_proj.weight",
    },
    mixed="attn.c_attn",
    computed=re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attn\.logn_tensor)$"),
)


class Qwen:
    """A base of this layout, by its config.json; raises `KeyError` and `ValueError` if it is none, or a relative."""

    NAMES: ClassVar = "Qwen (2023)"
    VOCABULARY: ClassVar = "qwen.tiktoken"

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._told = described
        self.context = int(described["seq_length"])
        """Tokens."""
        heads, size = int(described["num_attention_heads"]), int(described["hidden_size"])
        if "visual" in described:
            raise ValueError("Qwen-VL of 2023 has a vision part of its own; use Qwen2-VL or later")
        if described.get("rotary_pct", 1.0) != 1.0 or int(described.get("kv_channels", size // heads)) * heads != size:
            raise ValueError("its attention is not that of any Qwen model that was published (rotary_pct, kv_channels)")
        if not described.get("no_bias", True) or described.get("tie_word_embeddings"):
            raise ValueError("it has biases or tied embeddings, which no Qwen model that was published has")

    def config(self) -> dict[str, Any]:
        """The config.json of what it becomes."""
        told = self._told
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": told["hidden_size"],
            "intermediate_size": told["intermediate_size"] // 2,  # of both halves of the gated layer there
            "num_hidden_layers": told["num_hidden_layers"],
            "num_attention_heads": told["num_attention_heads"],
            "num_key_value_heads": told["num_attention_heads"],
            "vocab_size": told["vocab_size"],
            "max_position_embeddings": self.context,
            "rms_norm_eps": told["layer_norm_epsilon"],
            "rope_theta": told.get("rotary_emb_base", 10000),
            "hidden_act": "silu",
            "attention_dropout": told.get("attn_dropout_prob", 0.0),
            "initializer_range": told.get("initializer_range", 0.02),
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        }

    def weights(self, name: str, tensor: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What the weight `name` becomes; nothing if it is not needed. Raises `KeyError` and `RuntimeError`."""
        return _NAMES.of(name, tensor, [self._told["hidden_size"]] * 3)

    def called(self, name: str) -> list[str]:
        """How that which the weight `name` becomes is called; raises `KeyError` if there is none of that name."""
        return _NAMES.called(name)

    def tokenizer(self, folder: Path, generation: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
        """The tokenizer of the base in `folder` as a fast one; `generation` is its generation_config.json.

        Raises `ValueError` if the vocabulary cannot be read.
        """
        from transformers import PreTrainedTokenizerFast  # late: a look at the config needs neither

        from job.model.legacy import vocabulary

        ranks = vocabulary.tiktoken(folder / self.VOCABULARY)
        chats = self._chats(generation)
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=vocabulary.byte_level(ranks, _SPECIAL, _PATTERN),
            eos_token=_END if chats else _END_OF_TEXT,
            pad_token=_END_OF_TEXT,
            model_max_length=self.context,
            chat_template=_CHATML if chats else None,
        )

    def generation(self, told: Mapping[str, Any], words: "PreTrainedTokenizerFast") -> dict[str, Any]:
        """The generation_config.json of what it becomes, from the one that is `told`."""
        stops = [_END, _END_OF_TEXT] if self._chats(told) else [_END_OF_TEXT]
        kept = {key: told[key] for key in ("do_sample", "top_p", "repetition_penalty") if key in told}
        return kept | {
            "eos_token_id": words.convert_tokens_to_ids(stops),
            "pad_token_id": words.pad_token_id,
        }

    @staticmethod
    def _chats(generation: Mapping[str, Any]) -> bool:
        """Whether it was trained to chat; the base models, for which it says "raw", do not know ChatML's tokens."""
        return bool(generation.get("chat_format", "chatml") == "chatml")
