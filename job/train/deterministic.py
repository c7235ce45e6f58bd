"""Kernels that give the same bits each time, so that a resumed run ends with the same weights."""

import contextlib
import re
from collections.abc import Iterator

import torch

from job import errors

_WITHOUT = re.compile(r"^(?P<operation>.+?) does not have a deterministic implementation")


def use_deterministic_kernels() -> None:
    """Make torch choose deterministic kernels in this process, or fail where an operation has none.

    `warn_only` would not do: with it torch's attention keeps its backward pass that adds up in any order
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu, torch 2.13).
    """
    torch.use_deterministic_algorithms(mode=True)
    # Filling new memory finds bugs in torch; it costs a pass over every tensor and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def named_operation() -> Iterator[None]:
    """Raise `errors.ConfigError` in place of torch's error for an operation without such a kernel."""
    try:
        yield
    except RuntimeError as e:
        match = _WITHOUT.match(str(e))
        if match is None:
            raise
        raise errors.ConfigError(
            f"train.deterministic: this model uses {match['operation']}, for which torch {torch.__version__} has no "
            "deterministic kernel on this device. Set train.deterministic to false: data order, schedule and "
            "checkpoints stay exact, but a resumed run then ends with weights that differ by rounding"
        ) from e
