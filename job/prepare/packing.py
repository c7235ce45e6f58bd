"""Several short examples in one sequence, so that no computation goes into padding.

Best fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024), as TRL does it, on
`_TOGETHER` examples at a time. Examples are never cut; ``seq_lengths`` says where one ends, and training keeps them
apart: positions begin anew and attention does not reach across.
"""

from pathlib import Path

import pyarrow as pa
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

_TOGETHER = 10_000


def pack(path: Path, max_length: int) -> int:
    """Rewrite the rows of the arrow file at `path` as sequences of up to `max_length` tokens; returns their number."""
    disable_progress_bars()
    packed = path.with_name(f"packed-{path.name}")
    options = {"cache_file_name": str(packed), "batch_size": _TOGETHER, "writer_batch_size": _TOGETHER}
    count = len(pack_dataset(Dataset.from_file(str(path)), max_length, "bfd", options))
    _rewrite(packed, path)
    packed.unlink()
    return count


def _rewrite(packed: Path, path: Path) -> None:
    """Write the rows of `packed` to `path` without what datasets notes beside them: it depends on names and times."""
    with pa.memory_map(str(packed)) as source, pa.ipc.open_stream(source) as reader:
        schema = reader.schema.remove_metadata()
        partial = path.with_name(f"plain-{path.name}")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in reader:
                writer.write_batch(batch.replace_schema_metadata(None))
    partial.rename(path)
