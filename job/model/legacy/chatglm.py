"""ChatGLM3-6B and ChatGLM2-6B as published (``model_type: chatglm``): GLM under other names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from job.model.legacy.renaming import Renaming

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_END, _UNKNOWN = "</s>", "<unk>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# The original calls two of them "sop" and "eop" and never looks for them in text; a fast tokenizer does, and would find
# them in "philosophy" and "people".
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
# Every message is tokenized by itself there, so that SentencePiece begins each with a space.
_CHAT = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- set role = {'tool': 'observation'}.get(message['role'], message['role']) -%}
{%- if role not in ('system', 'user', 'assistant', 'observation') -%}
{{ raise_exception('ChatGLM3 has no token for the role ' + role) }}
{%- endif -%}
{{ '<|' + role + '|>' + (message['metadata'] or '') + '\\n ' + message['content'] }}
{%- if loop.last and message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

_NAMES = Renaming(
    outside={
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
        "transformer.output_layer.weight": "lm_head.weight",
    },
    layer=re.compile(r"^transformer\.encoder\.layers\.(\d+)\.(.+)$"),
    inside={
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
    },
    mixed="self_attention.query_key_value",
    computed=re.compile(r"^transformer\.rotary_pos_emb\.inv_freq$"),
)
# What every ChatGLM2 and ChatGLM3 says of itself, and GLM is.
_EXPECTED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}


class ChatGLM:
    """A base of this layout, by its config.json; raises `KeyError` and `ValueError` if it is none, or a relative."""

    NAMES: ClassVar = "ChatGLM3"
    VOCABULARY: ClassVar = "tokenizer.model"

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._told = described
        if "position_encoding_2d" in described or "inner_hidden_size" in described:
            raise ValueError("ChatGLM-6B, the first one, is another architecture; use ChatGLM3-6B or GLM-4")
        if "vision_config" in described:
            raise ValueError("it has a vision part; use a model that transformers loads by itself")
        for key, value in _EXPECTED.items():
            if described[key] is not value:
                raise ValueError(f"{key} is {described[key]!r}, and {value!r} in every {self.NAMES} model")
        if described.get("prefix_projection") or described.get("pre_seq_len"):
            raise ValueError("it holds a prefix of P-tuning (pre_seq_len); use the model that the prefix was made for")
        self.context = int(described["seq_length"])
        """Tokens."""
        self._heads, self._groups = int(described["num_attention_heads"]), int(described["multi_query_group_num"])
        self._width = int(described["kv_channels"])

    def config(self) -> dict[str, Any]:
        """The config.json of what it becomes."""
        told = self._told
        return {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "hidden_size": told["hidden_size"],
            "intermediate_size": told["ffn_hidden_size"],
            "num_hidden_layers": told["num_layers"],
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._groups,
            "head_dim": self._width,
            "vocab_size": told["padded_vocab_size"],
            "max_position_embeddings": self.context,
            "rms_norm_eps": told["layernorm_epsilon"],
            "rope_theta": 10000.0 * told.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
            "attention_bias": bool(told.get("add_qkv_bias", False)),
            "attention_dropout": told.get("attention_dropout", 0.0),
            "hidden_act": "silu",
            "pad_token_id": 0,
            "eos_token_id": told.get("eos_token_id", 2),
            "tie_word_embeddings": False,
        }

    def weights(self, name: str, tensor: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """What the weight `name` becomes; nothing if it is not needed. Raises `KeyError` and `RuntimeError`."""
        return _NAMES.of(name, tensor, [heads * self._width for heads in (self._heads, self._groups, self._groups)])

    def called(self, name: str) -> list[str]:
        """How that which the weight `name` becomes is called; raises `KeyError` if there is none of that name."""
        return _NAMES.called(name)

    def tokenizer(self, folder: Path, _generation: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
        """The tokenizer of the base in `folder` as a fast one.

        Raises `ValueError` if the vocabulary cannot be read, as that of GLM-4, which is of another kind.
        """
        from transformers import PreTrainedTokenizerFast  # late: a look at the config needs neither

        from job.model.legacy import vocabulary

        chats = self._chats(folder)
        if not chats and self._told.get("rope_ratio", 1) != 1:
            raise ValueError("ChatGLM2 stretches its positions by rope_ratio in a way that GLM does not; use ChatGLM3")
        plain = vocabulary.sentencepiece(folder / self.VOCABULARY)
        special = (*_SPECIAL, *(_ROLES if chats else ()))
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=vocabulary.byte_fallback(plain, special, looked_for=("[gMASK]", "<sop>", *_ROLES)),
            eos_token=_END,
            unk_token=_UNKNOWN,
            pad_token=_UNKNOWN,
            model_max_length=self.context,
            padding_side="left",
            chat_template=_CHAT if chats else None,
        )

    def generation(self, _told: Mapping[str, Any], words: "PreTrainedTokenizerFast") -> dict[str, Any]:
        """The generation_config.json of what it becomes: an answer ends where somebody else's turn begins."""
        stops = [_END, *(["<|user|>", "<|observation|>"] if words.chat_template else [])]
        return {"eos_token_id": words.convert_tokens_to_ids(stops), "pad_token_id": words.pad_token_id}

    @staticmethod
    def _chats(folder: Path) -> bool:
        """Whether the tokenizer has tokens for roles; that of ChatGLM2 has none, and nothing but its code says so."""
        code = folder / "tokenization_chatglm.py"
        return not code.exists() or _ROLES[0] in code.read_text(encoding="utf-8", errors="replace")
