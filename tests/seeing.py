"""Tiny random bases that see images, of the families that people bring, and images for them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

WORDS, SIZE = 420, 64
TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": SIZE, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8}  # fmt: skip
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": SIZE, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
SIGHT = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPLIT = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"]
# Of each: what is special among its words, and how its chat template writes an image.
SPECIAL = {
    "qwen2_5_vl": SIGHT, "qwen3_vl": SIGHT, "smolvlm": SPLIT, "idefics3": SPLIT, "llava": ["<image>"],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
}  # fmt: skip
IMAGE = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>\n",
}  # fmt: skip
NAMED = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
}  # fmt: skip
# Those of SmolVLM and Idefics 3 want every content in parts.
_IN_PARTS = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% elif p['type'] == 'image' %}IMAGE{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_EITHER = _IN_PARTS.replace(
    "{% for p in", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in"
).replace("{% endif %}{% endfor %}<|im_end|>", "{% endif %}{% endfor %}{% endif %}<|im_end|>")


def words(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special words of `family`, and a template like its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL[family]]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["What colour is it? It is red, or blue."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED.get(family, {}),
    )
    template = _IN_PARTS if family in ("smolvlm", "idefics3") else _EITHER
    tokenizer.chat_template = template.replace("IMAGE", IMAGE.get(family, "<image>"))
    return tokenizer


def base(family: str, folder: Path) -> Path:
    """A random tiny model of `family` with its tokenizer and its image processor, as a folder."""
    tokenizer = words(family)
    number = tokenizer.convert_tokens_to_ids
    square = {"height": 32, "width": 32}
    qwen = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16**2, "longest_edge": 64**2}
    )
    split = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    shapes: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
        "qwen2_5_vl": (
            {"text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                         "rope_theta": 1e4}},
             "vision_config": {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}, **_places(number)}, qwen, {}),
        "qwen3_vl": (
            {"text_config": {**TEXT, "head_dim": 16, "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "mrope_interleaved": True}},
             "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
             **_places(number)}, qwen, {}),
        "smolvlm": (
            {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP, "image_token_id": number("<image>"),
             "scale_factor": 2}, transformers.SmolVLMImageProcessorPil(**split), {"image_seq_len": 4}),
        "idefics3": (
            {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP, "image_token_id": number("<image>"),
             "scale_factor": 2}, transformers.Idefics3ImageProcessorPil(**split), {"image_seq_len": 4}),
        "llava": (
            {"text_config": {**TEXT, "model_type": "llama"},
             "vision_config": {**CLIP, "model_type": "clip_vision_model"}, "vision_feature_layer": -2,
             "image_token_id": number("<image>")},
            transformers.CLIPImageProcessorPil(size=square, crop_size=square),
            {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
        "gemma3": (
            {"text_config": {**TEXT, "head_dim": 16}, "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
             "mm_tokens_per_image": 4, "image_token_id": number("<image_soft_token>"),
             "boi_token_id": number("<start_of_image>"), "eoi_token_id": number("<end_of_image>")},
            transformers.Gemma3ImageProcessorPil(size=square), {"image_seq_length": 4}),
        "internvl": (
            {"text_config": {**TEXT, "model_type": "qwen2"},
             "vision_config": {**CLIP, "image_size": [32, 32], "patch_size": [8, 8]}, "downsample_ratio": 0.5,
             "image_token_id": number("<IMG_CONTEXT>"), "image_seq_length": 4},
            transformers.GotOcr2ImageProcessorPil(size=square), {"image_seq_length": 4}),
    }  # fmt: skip
    shape, images, further = shapes[family]
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **shape))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    network.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    if further:
        (folder / "processor_config.json").write_text(json.dumps(further), encoding="utf-8")
    return folder


def picture(number: int) -> bytes:
    """A PNG file: no two numbers give the same, and their sizes differ."""
    file = io.BytesIO()
    colour = (255, 0, number) if number % 2 else (number, 0, 255)
    Image.new("RGB", (24 + number % 9, 40 - number % 5), colour).save(file, "PNG")
    return file.getvalue()


def records(folder: Path) -> None:
    """Questions about images, and one without, as the training and the evaluation data in `folder`."""
    (folder / "img").mkdir()
    for split, numbers in {"train": range(36), "eval": range(36, 44)}.items():
        rows = []
        for number in numbers:
            (folder / "img" / f"{number}.png").write_bytes(picture(number))
            parts = [{"type": "image", "image": f"img/{number}.png"}, {"type": "text", "text": "What colour is it?"}]
            asked = {"role": "user", "content": parts if number % 9 else f"What colour is rose {number}?"}
            rows.append({"messages": [asked, {"role": "assistant", "content": "red" if number % 2 else "blue"}]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _places(number: Callable[[str], Any]) -> dict[str, int]:
    names = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 0, "vision_end_token_id": 1}
    return {name: number(SIGHT[at]) for name, at in names.items()}
