"""From files to records: JSONL, JSON, CSV, Parquet, plain or compressed, with the line of everything that is broken."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from job import errors

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One record and its place in its file (a line, or a row from 1), or the reason why it cannot be read."""

    place: int
    value: dict[str, Any] | None
    reason: str = ""


def read(path: Path, name: str) -> Iterator[Record]:
    """Every record of the file at `path`, which came from a file called `name`, in constant memory but for JSON.

    Raises `errors.DataError` when the file as a whole cannot be read.
    """
    plain = name.removesuffix(".gz").removesuffix(".zst")
    reader = {"jsonl": _jsonl, "json": _json, "csv": _csv}.get(plain.rpartition(".")[2])
    try:
        if reader is None:
            yield from _parquet(path)
        else:
            with _open(path, name) as stream:
                yield from reader(stream)
    except (pa.ArrowException, OSError, csv.Error) as e:
        raise errors.DataError(f"{name}: cannot be read: {e}. Is it complete, and what its name says?") from e
    except (ValueError, OverflowError, RecursionError) as e:
        raise errors.DataError(f"{name}: {_located(e)}") from e


def _open(path: Path, name: str) -> BinaryIO:
    codec = next((codec for end, codec in _COMPRESSED.items() if name.endswith(end)), None)
    return cast("BinaryIO", pa.input_stream(str(path), compression=codec))


def _jsonl(stream: BinaryIO) -> Iterator[Record]:
    for number, line in enumerate(io.BufferedReader(cast("io.RawIOBase", stream)), start=1):
        line = line.removeprefix(_BOM) if number == 1 else line  # noqa: PLW2901 - the same line
        if not line.strip():
            continue
        try:
            yield _record(number, json.loads(line.decode("utf-8"), object_pairs_hook=_unique))
        except json.JSONDecodeError as e:
            yield Record(number, None, f"broken JSON: {e.msg} at column {e.colno}")
        except UnicodeDecodeError as e:
            yield Record(number, None, f"not UTF-8: byte {e.object[e.start]:#04x} at column {e.start + 1}")
        except (ValueError, RecursionError) as e:
            yield Record(number, None, f"unusable JSON: {e}")


def _json(stream: BinaryIO) -> Iterator[Record]:
    text = stream.read().removeprefix(_BOM)
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":  # behind a whole record: JSON lines under another name, as many hub data sets have
            raise
        yield from _jsonl(io.BytesIO(text))
        return
    rows = tree.get("data") if isinstance(tree, dict) else tree
    if not isinstance(rows, list):
        raise ValueError('must be a list of records, or an object with a list under "data"')  # noqa: TRY004 - about the file, not a type
    for number, row in enumerate(rows, start=1):
        yield _record(number, row)


def _csv(stream: BinaryIO) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    names = list(rows.fieldnames or ())
    if len(set(names)) < len(names):
        raise ValueError(f"the header names a column twice: {', '.join(names)}")
    for row in rows:
        if None in row or None in row.values():
            yield Record(rows.line_num, None, f"has not the {len(names)} columns of the header")
        else:
            yield _record(rows.line_num, row)


def _parquet(path: Path) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield _record(number, {key: _present(value) for key, value in row.items()})


def _present(value: object) -> object:
    """Without the keys that a row lacks and others have, for which Parquet has no other sign than None."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"a key is given twice: {', '.join(key for key, _ in pairs)}")
    return made


def _record(place: int, value: object) -> Record:
    if isinstance(value, dict):
        return Record(place, value)
    return Record(place, None, f"is of type {type(value).__name__}, not an object with keys")


def _located(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
    return str(error)
