"""Bring a base model, or an adapter, in an old layout into the one that transformers and PEFT load, once.

Old are Qwen v1 and ChatGLM3, which no longer load without running their code, and weights in pickled files. What is
made of them lies beside them in the cache.
"""

from job.convert.base import native

__all__ = ["native"]
