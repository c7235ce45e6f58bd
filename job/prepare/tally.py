"""What happened to the records of one split, used, left out, cut and why, and what the examples of it are like."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from job.model.tokenizer import IGNORED

SHOWN = 20  # bad records that are listed one by one
_BARS = 10  # of the histogram


@dataclass
class Tally:
    """Counts, in records and in tokens."""

    records: int = 0
    examples: int = 0
    bad: int = 0
    complaints: list[str] = field(default_factory=list)
    truncated: int = 0
    repeated: int = 0  # examples that are equal to an earlier one
    leaked: int = 0  # of the eval split: examples that are trained on too
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    lengths: dict[str, Any] = field(default_factory=dict)
    sequences: int = 0  # into which the examples were packed, if they were
    formats: dict[str, str] = field(default_factory=dict)
    ignored_keys: Counter[str] = field(default_factory=Counter)

    def reject(self, where: str, reason: str) -> None:
        self.bad += 1
        if len(self.complaints) < SHOWN:
            self.complaints.append(f"{where}: {reason}")

    def measure(self, path: Path) -> None:
        """Count the examples in the arrow file at `path`, and their tokens; of pairs those of both answers."""
        lengths, trained, rows = [np.zeros(0, dtype=np.int64)], 0, 0
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                rows += len(batch)
                for name in [name for name in batch.schema.names if name.endswith("labels")]:
                    lengths.append(np.diff(batch[name].offsets.to_numpy()))
                    trained += int((batch[name].flatten().to_numpy() != IGNORED).sum())
        every = np.concatenate(lengths)
        self.examples, self.tokens, self.trained_tokens = rows, int(every.sum()), trained
        self.longest = int(every.max(initial=0))
        self.lengths = _described(every) if len(every) else {}


def _described(lengths: np.ndarray) -> dict[str, Any]:
    """Percentiles of the lengths, and how many there are up to each tenth of the longest, in tokens."""
    edges = np.linspace(0, max(_BARS, int(lengths.max())), _BARS + 1).astype(int)
    counts = np.bincount(np.searchsorted(edges[1:], lengths), minlength=_BARS)
    named = {f"p{share}": int(np.percentile(lengths, share, method="higher")) for share in (50, 90, 99)}
    bars = [[int(upto), int(count)] for upto, count in zip(edges[1:], counts, strict=True)]
    return {"mean": float(lengths.mean()), **named, "histogram": bars}
