"""The base model, its tokenizer and the shape of the adapter."""

from job.model.base import compute_dtype, for_merging, for_training
from job.model.lora import adapted, in_float32
from job.model.tokenizer import IGNORED, input_heading, tokenizer

__all__ = [
    "IGNORED",
    "adapted",
    "compute_dtype",
    "for_merging",
    "for_training",
    "in_float32",
    "input_heading",
    "tokenizer",
]
