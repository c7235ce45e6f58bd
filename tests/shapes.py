"""The config.json of models that people train, without their weights, and what training them was simulated to take."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from job import config


def _dense(kind: str, hidden: int, layers: int, keys: int, wide: int, words: int, **more: int) -> dict[str, Any]:
    """Heads have 128 numbers each, as in all of these models."""
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": wide,
        "num_attention_heads": hidden // 128, "num_key_value_heads": keys, "vocab_size": words, "head_dim": 128,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


# As published with each model; Qwen and ChatGLM3 of 2023 as what the job converts them to.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7b-chat-hf": _dense("llama", 4096, 32, 32, 11008, 32000),
    "Llama-2-13b-chat-hf": _dense("llama", 5120, 40, 40, 13824, 32000),
    "Llama-3.1-8B-Instruct": _dense("llama", 4096, 32, 8, 14336, 128256),
    "Llama-3.1-70B-Instruct": _dense("llama", 8192, 80, 8, 28672, 128256),
    "Qwen-7B-Chat": _dense("qwen2", 4096, 32, 32, 11008, 151936),
    "Qwen-14B-Chat": _dense("qwen2", 5120, 40, 40, 13696, 152064),
    "Qwen2.5-7B-Instruct": _dense("qwen2", 3584, 28, 4, 18944, 152064),
    "Qwen2.5-14B-Instruct": _dense("qwen2", 5120, 48, 8, 13824, 152064),
    "Qwen2.5-32B-Instruct": _dense("qwen2", 5120, 64, 8, 27648, 152064),
    "Qwen3-8B": _dense("qwen3", 4096, 36, 8, 12288, 151936),
    "chatglm3-6b": _dense("glm", 4096, 28, 2, 13696, 65024, pad_token_id=0),
    "Qwen3-30B-A3B": {
        **_dense("qwen3_moe", 2048, 48, 4, 6144, 151936), "num_attention_heads": 32, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        **_dense("mixtral", 4096, 32, 8, 14336, 32000), "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "Qwen2-57B-A14B-Instruct": {
        **_dense("qwen2_moe", 3584, 28, 4, 18944, 151936), "moe_intermediate_size": 2560, "num_experts": 64,
        "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480,
    },
    "gpt-oss-20b": {
        **_dense("gpt_oss", 2880, 24, 8, 2880, 201088), "num_attention_heads": 64, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4,
    },
    "Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": False,
        "text_config": {**_dense("qwen2_5_vl_text", 3584, 28, 4, 18944, 152064), "max_position_embeddings": 128000},
        "vision_config": {"model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "out_hidden_size": 3584},
    },
}  # fmt: skip


class Row(NamedTuple):
    """A micro batch, and its simulated memory in GB, but for the last figure."""

    model: str
    micro: int
    length: int
    r: int
    how: str
    weights: float
    """Base and adapter."""
    gradients: float
    activations: float
    """At the peak, beyond the weights and all gradients."""
    optimizer: float
    """8-bit Adam."""
    total: float
    """GiB: all of it and 1 GB for CUDA, cuBLAS and what lies between tensors."""


# Simulated, never measured: transformers', PEFT's and TRL's own code (the versions in constraints.txt) on torch's
# FakeTensorMode, with bitsandbytes' products as dequantize and F.linear, attention that keeps q, k, v and its output,
# keys and values repeated for all heads, TRL's chunked loss, non-reentrant checkpointing, dropout 0.05 (0 for dpo),
# every token predicted; the peak of live storages, from models of 3 and 5 layers, extrapolated to all.
TABLE_B = [
    Row("chatglm3-6b", 2, 512, 8, "nf4", 4.08, 0.07, 0.63, 0.03, 5.41),
    Row("Llama-3.1-8B-Instruct", 2, 1024, 16, "nf4", 5.87, 0.17, 1.16, 0.08, 7.71),
    Row("Qwen2.5-7B-Instruct", 2, 1024, 16, "nf4", 5.71, 0.16, 1.10, 0.08, 7.50),
    Row("Llama-2-7b-chat-hf", 1, 512, 16, "nf4", 4.03, 0.16, 0.25, 0.08, 5.13),
    Row("Llama-2-7b-chat-hf", 2, 512, 16, "nf4", 4.03, 0.16, 0.51, 0.08, 5.38),
    Row("Llama-2-13b-chat-hf", 1, 512, 16, "nf4", 7.45, 0.25, 0.34, 0.13, 8.53),
    Row("Llama-2-13b-chat-hf", 4, 512, 16, "nf4", 7.45, 0.25, 1.49, 0.13, 9.61),
    Row("Qwen-7B-Chat", 1, 256, 16, "nf4", 5.99, 0.16, 0.17, 0.08, 6.89),
    Row("Qwen-7B-Chat", 2, 512, 16, "nf4", 5.99, 0.16, 0.51, 0.08, 7.21),
    Row("Qwen-14B-Chat", 1, 512, 16, "nf4", 9.87, 0.25, 0.33, 0.12, 10.78),
    Row("Qwen2.5-7B-Instruct", 1, 512, 16, "nf4", 5.71, 0.16, 0.32, 0.08, 6.77),
    Row("Qwen2.5-7B-Instruct", 1, 1024, 16, "dpo", 5.71, 0.16, 0.95, 0.08, 7.36),
    Row("Qwen-14B-Chat", 4, 512, 16, "nf4", 9.87, 0.25, 1.49, 0.12, 11.86),
    Row("Qwen3-8B", 2, 1024, 16, "nf4", 6.25, 0.17, 1.21, 0.09, 8.12),
    Row("Qwen2.5-7B-Instruct", 8, 1024, 16, "none", 15.39, 0.16, 6.76, 0.08, 21.79),
    Row("Qwen2.5-32B-Instruct", 2, 1024, 16, "nf4", 19.75, 0.54, 2.12, 0.27, 22.05),
    Row("Llama-3.1-70B-Instruct", 4, 1024, 16, "nf4", 40.35, 0.83, 7.67, 0.41, 46.80),
    Row("Qwen2.5-7B-Instruct", 2, 4096, 16, "nf4", 5.71, 0.16, 4.96, 0.08, 11.09),
    Row("Qwen2.5-7B-Instruct", 4, 4096, 16, "nf4", 5.71, 0.16, 10.07, 0.08, 15.85),
    Row("Llama-3.1-8B-Instruct", 1, 4096, 64, "nf4", 6.37, 0.67, 2.03, 0.34, 9.70),
]


def outline(model: str, folder: Path) -> Path:
    """Write the config.json of the `model` into a folder of its own, which is returned."""
    place = folder / model
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
    return place


def settings(**sections: dict[str, Any]) -> config.Config:
    """A config that names no file that is there."""
    tree: dict[str, Any] = {
        "run": {"name": "shapes", "url": "file:///run"}, "model": {"base": "file:///base"},
        "data": {"train": ["file:///train.jsonl"]},
    }  # fmt: skip
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    return config.check(tree, config.Places("the test", {}))
