"""Counts what the verified models take in memory, and chooses where each of them may be."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from job import config, log
from job.examine import devices
from job.examine.devices import FORMATS, Machine, Outlined, Placement, Work
from job.model import load_size, weights

# What transformers and `load_size` raise for a model of a kind that they do not know.
_UNCOUNTABLE = (
    AttributeError, ImportError, IndexError, KeyError, OSError, TypeError, ValueError,
)  # fmt: skip


class Sizes:
    """Counts what the base takes in memory in each format, without its weights, and remembers it."""

    def __init__(self, base: Path, model: config.Model) -> None:
        self._base, self._model = base, model
        self.unknown = ""
        """Why sizes cannot be counted, once `choose` has found that out."""
        self._outlines: dict[tuple[bool, str], Outlined] = {}

    def outline(self, name: str | None, dtype: str) -> Outlined:
        """Return the base without weights, quantized as for the model `name`, and its size."""
        key = (name == "trained", dtype)
        if key not in self._outlines:
            self._outlines[key] = self._measure(name, dtype)
        return self._outlines[key]

    def _measure(self, name: str | None, dtype: str) -> Outlined:
        arguments = self.describe_quantization(name, dtype)
        how = BitsAndBytesConfig(**arguments) if arguments else None  # type: ignore[no-untyped-call]
        number_format: torch.dtype = getattr(torch, dtype)
        model_config, _ = weights.describe(self._base, self._model)
        model = load_size.outline(model_config, how, number_format, trust_remote_code=self._model.trust_remote_code)
        return model, load_size.measure(model, how, number_format)

    def describe_quantization(self, name: str | None, dtype: str) -> dict[str, Any] | None:
        """Return bitsandbytes' settings for the model of that name, as JSON can hold them."""
        if name != "trained":
            return None
        model_config, _ = weights.describe(self._base, self._model)
        settings = weights.describe_quantization(self._model, model_config, getattr(torch, dtype))
        return {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in settings.items()
        }

    def choose(self, names: Sequence[str], machine: Machine, work: Work) -> dict[str, list[Placement]]:
        """Return for each model where it may be, the best first; whole ones go to the same place.

        A model whose size cannot be counted may be nowhere; `unknown` says why then.
        """
        try:
            return self._choose(names, machine, work)
        except _UNCOUNTABLE as e:
            self.unknown = f"the memory that it needs cannot be counted ({type(e).__name__}: {e})"
            return {name: [] for name in names}

    def _choose(self, names: Sequence[str], machine: Machine, work: Work) -> dict[str, list[Placement]]:
        whole = devices.find_placements(functools.partial(self.outline, None), machine, work)
        if not whole:
            need = devices.least_memory(self.outline(None, FORMATS[-1])[1], work)
            log.warn(
                "examine.memory",
                f"the result is not opened as a whole: it takes {log.size(need)} of memory, and "
                f"{log.size(machine.host)} of the host's and {log.size(sum(machine.gpus))} of the "
                "GPUs' are free",
            )
        found = {name: list(whole) for name in names}
        if "trained" in found:
            # In the format of the others, unless they are on a CPU beside GPUs: then as in training.
            fast = whole and (whole[0].fast or not machine.gpus)
            wanted = whole[0].dtype if fast else FORMATS[-1]
            formats = [wanted, *(each for each in FORMATS[::-1] if each != wanted)]
            packed = functools.partial(self.outline, "trained")
            found["trained"] = devices.find_placements(packed, machine, work, formats, quantized=True)
        return found
