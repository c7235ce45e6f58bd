"""Tiny bases in the layouts of Qwen v1 and ChatGLM3, and what the original models compute, written down once more.

The formulas are those of the code that was published with the models (modeling_qwen.py, modeling_chatglm.py).
"""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tiktoken
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

Weights = dict[str, torch.Tensor]
LAYERS, HEADS, GROUPS, WIDTH, HALF = 2, 4, 2, 16, 40  # of attention: heads, groups of keys, their width; of the MLP
SIZE = HEADS * WIDTH
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's philosophy for people.",
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "你好，世界！请用中文回答这个问题。北京是中国的首都。",
    "こんにちは世界。日本語のテキストです。",
    "Привет, мир! Как дела? Ça va très bien, merci. Grüße aus Köln.",
    "नमस्ते दुनिया مرحبا بالعالم שלום עולם",
]
HARD = [
    *CORPUS,
    "",
    " ",
    "   three  spaces   ",
    "\n\n\n",
    "\t\ttabs\r\nand\rreturns\n",
    "3.14159265358979 1234567890123456789",
    "👩‍👩‍👧 🇨🇳 naïve café",
    "I'LL you'RE don'T ſ'S",
    "\u3000full-width\xa0and\u200bzero",
    "sop eop [MASK] philosophy people",
    "x" * 300,
    "~!@#$%^&*()_+{}|:\"<>?`-=[]\\;',./",
]


def qwen(folder: Path, *, pickled: bool = False, chat_format: str = "chatml") -> Callable[[torch.Tensor], torch.Tensor]:
    """Write a random tiny Qwen v1 into `folder`; returns what computes its logits from token ids of one text."""
    folder.mkdir(parents=True)
    ranks = byte_level_ranks()
    (folder / "qwen.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()), encoding="ascii"
    )
    vocabulary = len(ranks) + len(QWEN_SPECIAL) + 5
    told = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": SIZE, "intermediate_size": 2 * HALF,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": vocabulary, "seq_length": 256,
        "layer_norm_epsilon": 1e-6, "kv_channels": WIDTH, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "use_dynamic_ntk": True,
        "use_logn_attn": True, "bf16": False, "fp16": False, "tie_word_embeddings": False,
    }  # fmt: skip
    chat = {"chat_format": chat_format, "eos_token_id": 151643, "top_p": 0.8, "do_sample": True, "max_window_size": 24}
    for name, content in {"config.json": told, "generation_config.json": chat}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    shapes = {"transformer.wte.weight": (vocabulary, SIZE), "transformer.ln_f.weight": (SIZE,)}
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        shapes |= {
            f"{at}.ln_1.weight": (SIZE,), f"{at}.ln_2.weight": (SIZE,), f"{at}.attn.c_attn.weight": (3 * SIZE, SIZE),
            f"{at}.attn.c_attn.bias": (3 * SIZE,), f"{at}.attn.c_proj.weight": (SIZE, SIZE),
            f"{at}.mlp.w1.weight": (HALF, SIZE), f"{at}.mlp.w2.weight": (HALF, SIZE),
            f"{at}.mlp.c_proj.weight": (SIZE, HALF),
        }  # fmt: skip
    weights = _drawn({**shapes, "lm_head.weight": (vocabulary, SIZE)})
    _save(folder, weights | {"transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(WIDTH // 2)}, pickled=pickled)
    return lambda ids: _qwen_logits(weights, ids)


def chatglm(folder: Path, *, pickled: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same for ChatGLM3."""
    folder.mkdir(parents=True)
    _train_sentencepiece(folder / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    vocabulary = pieces + 20
    told = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": SIZE, "ffn_hidden_size": HALF,
        "num_layers": LAYERS, "num_attention_heads": HEADS, "multi_query_attention": True, "seq_length": 256,
        "multi_query_group_num": GROUPS, "kv_channels": WIDTH, "padded_vocab_size": vocabulary, "add_qkv_bias": True,
        "layernorm_epsilon": 1e-5, "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False, "original_rope": True, "eos_token_id": 2, "pad_token_id": 0,
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    shapes = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, SIZE),
        "transformer.encoder.final_layernorm.weight": (SIZE,),
        "transformer.output_layer.weight": (vocabulary, SIZE),
    }
    for layer in range(LAYERS):
        at = f"transformer.encoder.layers.{layer}"
        attention = SIZE + 2 * GROUPS * WIDTH
        shapes |= {
            f"{at}.input_layernorm.weight": (SIZE,), f"{at}.post_attention_layernorm.weight": (SIZE,),
            f"{at}.self_attention.query_key_value.weight": (attention, SIZE),
            f"{at}.self_attention.query_key_value.bias": (attention,),
            f"{at}.self_attention.dense.weight": (SIZE, SIZE), f"{at}.mlp.dense_h_to_4h.weight": (2 * HALF, SIZE),
            f"{at}.mlp.dense_4h_to_h.weight": (SIZE, HALF),
        }  # fmt: skip
    weights = _drawn(shapes)
    _save(folder, weights | {"transformer.rotary_pos_emb.inv_freq": torch.ones(WIDTH // 4)}, pickled=pickled)
    return lambda ids: _chatglm_logits(weights, ids)


def byte_level_ranks() -> dict[bytes, int]:
    """A small vocabulary of byte-level BPE as tiktoken has it: every byte, then what is merged from them."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    spelled: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads(words.to_str())["model"]["merges"]:
        ranks.setdefault(bytes(spelled[character] for character in left + right), len(ranks))
    return ranks


def qwen_ids(folder: Path) -> Callable[[str], list[int]]:
    """How the original Qwen tokenizer encodes text."""
    ranks = {}
    for line in (folder / "qwen.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {token: number for number, token in enumerate(QWEN_SPECIAL, start=len(ranks))}
    made = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: made.encode(text, allowed_special="all", disallowed_special=())


def _train_sentencepiece(path: Path) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 3), model_writer=file, model_type="bpe", vocab_size=560, byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
        )  # fmt: skip


def _drawn(shapes: dict[str, tuple[int, ...]]) -> Weights:
    drawn = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=drawn) * (0.3 if len(shape) > 1 else 1.0) for name, shape in shapes.items()
    }


def _save(folder: Path, weights: Weights, *, pickled: bool) -> None:
    names = sorted(weights)
    for number, part in enumerate([names[::2], names[1::2]], start=1):
        shard = {name: weights[name].clone() for name in part}
        if pickled:
            torch.save(shard, folder / f"pytorch_model-{number:05d}-of-00002.bin")
        else:
            save_file(shard, folder / f"model-{number:05d}-of-00002.safetensors")


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of (tokens, heads, width) each; returns (tokens, heads x width)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH)
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def _angles(tokens: int, width: int) -> torch.Tensor:
    return torch.outer(torch.arange(tokens).float(), 10000 ** (-torch.arange(0, width, 2) / width))


def _qwen_logits(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    angles = _angles(len(ids), WIDTH)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = weights["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        w = {name.removeprefix(f"transformer.h.{layer}."): value for name, value in weights.items()}
        mixed = _norm(x, w["ln_1.weight"], 1e-6) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)) for part in mixed.split(SIZE, -1))
        x = x + _attend(turned(q), turned(k), v) @ w["attn.c_proj.weight"].T
        inner = _norm(x, w["ln_2.weight"], 1e-6)
        gated = (inner @ w["mlp.w1.weight"].T) * torch.nn.functional.silu(inner @ w["mlp.w2.weight"].T)
        x = x + gated @ w["mlp.c_proj.weight"].T
    return _norm(x, weights["transformer.ln_f.weight"], 1e-6) @ weights["lm_head.weight"].T


def _chatglm_logits(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    angles = _angles(len(ids), WIDTH // 2)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        """Turn the first half of each head, whose even and odd places are the two parts of a number."""
        half, rest = x.chunk(2, -1)
        even, odd = half[..., ::2], half[..., 1::2]
        both = [even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()]
        return torch.cat([torch.stack(both, -1).flatten(-2), rest], -1)

    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(LAYERS):
        w = {name.removeprefix(f"transformer.encoder.layers.{layer}."): value for name, value in weights.items()}
        mixed = _norm(x, w["input_layernorm.weight"], 1e-5) @ w["self_attention.query_key_value.weight"].T
        q, k, v = (
            part.unflatten(-1, (-1, WIDTH))
            for part in (mixed + w["self_attention.query_key_value.bias"]).split(
                [SIZE, GROUPS * WIDTH, GROUPS * WIDTH], -1
            )
        )
        k, v = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (turned(k), v))
        x = x + _attend(turned(q), k, v) @ w["self_attention.dense.weight"].T
        inner = _norm(x, w["post_attention_layernorm.weight"], 1e-5) @ w["mlp.dense_h_to_4h.weight"].T
        gate, up = inner.chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w["mlp.dense_4h_to_h.weight"].T
    x = _norm(x, weights["transformer.encoder.final_layernorm.weight"], 1e-5)
    return x @ weights["transformer.output_layer.weight"].T
