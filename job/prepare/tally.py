"""What happened to the records of one split: used, left out, cut, and why."""

from collections import Counter
from dataclasses import dataclass, field

from job.model.tokenizer import IGNORED
from job.prepare.tokens import Row

SHOWN = 20  # bad records that are listed one by one


@dataclass
class Tally:
    """Counts, in records and in tokens."""

    records: int = 0
    examples: int = 0
    bad: int = 0
    complaints: list[str] = field(default_factory=list)
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    sequences: int = 0  # into which the examples were packed, if they were
    formats: dict[str, str] = field(default_factory=dict)
    ignored_keys: Counter[str] = field(default_factory=Counter)

    def reject(self, where: str, reason: str) -> None:
        self.bad += 1
        if len(self.complaints) < SHOWN:
            self.complaints.append(f"{where}: {reason}")

    def accept(self, row: Row) -> None:
        self.examples += 1
        self.truncated += row.truncated
        self.tokens += len(row.input_ids)
        self.trained_tokens += sum(label != IGNORED for label in row.labels)
        self.longest = max(self.longest, len(row.input_ids))
