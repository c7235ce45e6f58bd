"""Which examples are trained on, and how often: equal ones, those that are evaluated too, and the sources' weights.

Examples are compared by 64 bits of a hash of their tokens and labels: 8 bytes for each are kept in memory. Of ten
million examples two different ones are taken for equal with a probability of 3 in a million.
"""

import hashlib
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa

from job.prepare.tokens import Row

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: spreads neighbouring numbers (Knuth)


class Marks:
    """What is remembered of the examples of one split, in their order."""

    def __init__(self) -> None:
        self._hashes, self._sources = array("Q"), array("I")

    def add(self, row: Row, source: int) -> None:
        """Remember an example of the file with the number `source`."""
        both = [row, row.rejected] if row.rejected else [row]
        content = b"|".join(array("i", ids).tobytes() for each in both for ids in (each.input_ids, each.labels))
        content += b"".join(hashlib.blake2b(image).digest() for image in row.images)
        self._hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        self._sources.append(source)

    @property
    def hashes(self) -> np.ndarray:
        """uint64, one for each example."""
        return np.frombuffer(self._hashes, dtype=np.uint64)

    @property
    def sources(self) -> np.ndarray:
        """The numbers of their files."""
        return np.frombuffer(self._sources, dtype=np.uint32)

    def repeated(self) -> np.ndarray:
        """True for each example that is equal to an earlier one."""
        _, first = np.unique(self.hashes, return_index=True)
        repeated = np.ones(len(self.hashes), dtype=bool)
        repeated[first] = False
        return repeated

    def among(self, others: "Marks") -> np.ndarray:
        """True for each example that is one of the `others` too."""
        found: np.ndarray = np.isin(self.hashes, others.hashes)
        return found


def times(marks: Marks, weights: list[float], seed: int) -> np.ndarray:
    """How often each example is trained on in an epoch, by the weight of its file.

    What the fraction of a weight stands for is drawn: a function of the example and `seed` alone.
    """
    wanted = np.asarray(weights, dtype=np.float64)[marks.sources]
    mixed = (marks.hashes ^ np.uint64(seed)) * _ODD  # modulo 2**64
    whole: np.ndarray = np.floor(wanted).astype(np.int64) + (mixed / 2.0**64 < wanted % 1)
    return whole


def keep(path: Path, counts: np.ndarray) -> None:
    """Write the rows of the arrow file at `path` anew, each as often as `counts` says, in constant memory."""
    partial = path.with_name(f"kept-{path.name}")
    start = 0
    with (
        pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader,
        pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, reader.schema) as writer,
    ):  # fmt: skip
        for batch in reader:
            part = counts[start : start + len(batch)]
            writer.write_batch(batch.take(pa.array(np.repeat(np.arange(len(batch)), part))))
            start += len(batch)
    partial.rename(path)


def columns(path: Path, names: list[str]) -> None:
    """Write the arrow file at `path` anew with the columns `names` alone, in constant memory."""
    partial = path.with_name(f"kept-{path.name}")
    with (
        pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([reader.schema.field(name) for name in names])) as writer,
    ):  # fmt: skip
        for batch in reader:
            writer.write_batch(batch.select(names))
    partial.rename(path)


def rows(path: Path, which: np.ndarray, most: int) -> list[Row]:
    """The first `most` rows of the arrow file at `path` for which `which` is true."""
    wanted, found, start = set(np.flatnonzero(which)[:most].tolist()), [], 0
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            for place in sorted(wanted & set(range(start, start + len(batch)))):
                row = batch.slice(place - start, 1).to_pylist()[0]
                seen = row.get("text", ""), tuple(row.get("pictures", ()))
                found.append(Row(row["input_ids"], row["labels"], False, None, *seen))  # noqa: FBT003 - not truncated
            start += len(batch)
    return found
