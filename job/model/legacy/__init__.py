"""Bases in layouts that transformers no longer loads without running their own code, and what they become instead.

Qwen v1 and ChatGLM3 are Qwen2 and GLM under other names; the weights are renamed and split, never computed with.
"""

from collections.abc import Mapping
from typing import Any

from job import errors
from job.model.legacy.chatglm import ChatGLM
from job.model.legacy.qwen import Qwen

Layout = Qwen | ChatGLM

__all__ = ["ChatGLM", "Layout", "Qwen", "recognise"]


def recognise(described: Mapping[str, Any], where: str) -> Layout | None:
    """The layout of the base at `where` whose config.json is `described`; None if transformers knows it itself.

    Raises `errors.ModelError` for a relative of these models that is not exactly what they become.
    """
    known: dict[str, type[Layout]] = {"qwen": Qwen, "chatglm": ChatGLM}
    made = known.get(str(described.get("model_type")))
    if made is None:
        return None
    try:
        layout = made(described)
        layout.config()
    except KeyError as e:
        raise errors.ModelError(
            f"model.base: {where}/config.json lacks {e.args[0]}, which every {made.NAMES} model has"
        ) from e
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise errors.ModelError(f"model.base: {where} cannot be converted: {e}") from e
    return layout
