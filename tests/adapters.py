"""Adapters of every kind that PEFT makes, with random weights, on a tiny Llama whose head is its embedding or not."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

IDS = torch.arange(40)[None]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 3}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding and head, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole embedding, tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "norms by their ends": {"target_modules": ["q_proj"], "modules_to_save": ["layernorm"]},
    "tokens by the end": {"target_modules": ["q_proj"], "trainable_token_indices": {"tokens": [39, 3]}},
    "tokens of both": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 39], "lm_head": [3, 39]},
    },
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39]},
}  # fmt: skip
UNTIED = {"embedding", "embedding, dora", "head", "embedding and head", "whole embedding", "whole head",
          "whole embedding and head"}  # fmt: skip

ONE_SIDED = {"embedding", "embedding, dora", "head"}
"""A LoRA on one of the two, where PEFT saves nothing of the other."""


def base(folder: Path, *, tied: bool, **more: object) -> Path:
    """A tiny Llama with weights large enough to matter, in float32."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
        "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": tied,
    }  # fmt: skip
    described = LlamaConfig(**{**small, **more})
    LlamaForCausalLM(described).save_pretrained(folder)
    return folder


def plain(folder: Path, tokens: int | None = None) -> PreTrainedModel:
    """The model in the folder, as transformers alone loads it, its vocabulary made one of so many `tokens`."""
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    if tokens:
        network.resize_token_embeddings(tokens)
    network.config.name_or_path = str(folder)
    return network


def adapter(network: PreTrainedModel, folder: Path, **how: object) -> PeftModel:
    """An adapter of that kind for `network`, trained at random, and saved in the `folder`."""
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):  # of what a merge by PEFT itself could not do
        made = get_peft_model(network, LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **how}))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        made.save_pretrained(str(folder))
    return made.eval()  # type: ignore[no-any-return]


def logits(network: torch.nn.Module) -> torch.Tensor:
    """What it makes of every token."""
    with torch.no_grad():
        found: torch.Tensor = network.eval()(IDS).logits
    return found
