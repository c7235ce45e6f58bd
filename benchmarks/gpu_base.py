"""The random models and the data that the GPU checks train on; nothing is downloaded."""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from gpu_scale import Scale
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def make_base(scale: Scale, layers: int, folder: Path) -> Path:
    """Return the folder of a random bfloat16 model of that many layers, with a tokenizer."""
    path = folder / f"base-{layers}"
    if path.exists():  # made by a worker that is gone
        return path
    shutil.rmtree(folder / "part", ignore_errors=True)  # of a worker that was killed
    _make_tokenizer(scale.vocabulary).save_pretrained(folder / "part")
    config = Qwen2Config(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=32768,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)  # noqa: SLF001 - no public name takes a dtype
    model.save_pretrained(folder / "part")
    (folder / "part").rename(path)
    return path


def _make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with tokens that no text has up to the size of `vocabulary`.

    A random model answers with any token, and each must print as something.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a"], trainer)
    described = json.loads(tokenizer.to_str())
    tokens = described["model"]["vocab"]
    tokens |= {f"unused{number}": number for number in range(len(tokens), vocabulary)}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_SPECIAL[2], pad_token=_SPECIAL[0])
    fast.chat_template = _TEMPLATE
    return fast


def write_records(path: Path, count: int, longest: int) -> None:
    """Write instruction records of about `longest` tokens, half of them, and of a quarter of that.

    A token is a byte here.
    """
    draw = random.Random(0)
    lines = []
    for number in range(count):
        length = longest - 48 if number % 2 else longest // 4
        words = "".join(draw.choices("abcdefgh ", k=max(8, (length - 24) * 4 // 5)))
        record: dict[str, Any] = {"instruction": f"{number}: {words[: len(words) // 4]}", "output": words}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
