"""Several short examples in one sequence, so that no computation goes into padding.

Best fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024), as TRL does it, on
`_TOGETHER` examples at a time. Examples are never cut; ``seq_lengths`` says where one ends, and training keeps them
apart: positions begin anew and attention does not reach across.
"""

from pathlib import Path

from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

_TOGETHER = 10_000


def pack(path: Path, max_length: int) -> int:
    """Rewrite the rows of the arrow file at `path` as sequences of up to `max_length` tokens; returns their number."""
    disable_progress_bars()
    packed = path.with_name(f"packed-{path.name}")
    options = {"cache_file_name": str(packed), "batch_size": _TOGETHER, "writer_batch_size": _TOGETHER}
    count = len(pack_dataset(Dataset.from_file(str(path)), max_length, "bfd", options))
    packed.rename(path)
    return count
