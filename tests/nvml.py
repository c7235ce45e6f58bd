"""An NVIDIA driver for machines without one: what NVML answers of cards that a test makes up."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pynvml
import pytest


@dataclass(frozen=True)
class Card:
    """A GPU; one of which nothing is told answers no question but for its existence."""

    name: str = "NVIDIA A10G"
    capability: tuple[int, int] | None = (8, 6)
    gigabytes: int = 24
    mig: str | None = None
    """UUID of its slice, if it is cut."""


def install(
    monkeypatch: pytest.MonkeyPatch, cards: Sequence[Card], driver: str = "580.95.05", cuda: int = 13000
) -> None:
    """Let `pynvml` answer as the driver of a machine with these cards would."""

    def capability(card: Card) -> tuple[int, int]:
        if card.capability is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.capability

    def by_uuid(uuid: str) -> Card:
        found = [card for card in cards if card.mig == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return Card(name="MIG slice", capability=None, mig=uuid)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda card: card.mig or f"GPU-{card.name}",
        "nvmlDeviceGetMaxMigDeviceCount": lambda card: int(card.mig is not None),
        "nvmlDeviceGetMigDeviceHandleByIndex": lambda card, _: by_uuid(card.mig),
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda slice_: next(c for c in cards if c.mig == slice_.mig),
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=card.gigabytes * 2**30),
        "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
