"""The merged tensors as files: several at once, a block of rows at a time, and those that are whole already kept."""

import contextlib
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Self

import torch

from job import cluster, errors, log, manifest
from job.merge.plan import Tensor
from job.model import shard

INDEX = "model.safetensors.index.json"
_UNITS = {"MB": 10**6, "GB": 10**9}
_BYTES = 20  # in memory for each number that is computed: stored, in float32, the sum, what is written, and room
_LEAST = 32 * 2**20  # bytes for a thread that computes, whatever the numbers are
_PART = ".part"

Shards = dict[str, list[Tensor]]


def layout(tensors: Iterable[Tensor], limit: str) -> Shards:
    """Which tensors go into which file, none larger than `limit` (such as 5GB) unless a single tensor is."""
    most, parts, size = int(limit[:-2]) * _UNITS[limit[-2:]], list[list[Tensor]](), 0
    for tensor in tensors:
        if not parts or size + tensor.outline.size > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.outline.size
    for part in parts:
        part.sort(key=lambda tensor: -tensor.dtype.itemsize)  # so that each lies where processors like it
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def write(shards: Shards, target: Path, journal: Path) -> dict[str, str]:
    """Write `shards` and their index into the folder `target`; returns the SHA-256 of each shard, by its name.

    Those that `journal` names, from a start that was killed, are kept if they are still what they were. Raises
    `errors.ModelError` if a number is not finite.
    """
    whole = _kept(journal, target, shards)
    if whole:
        log.event("merge.kept", f"{len(whole)} of {len(shards)} shards are here already, verified", shards=len(whole))
    total = sum(tensor.outline.size for part in shards.values() for tensor in part)
    with log.progress("merge", total, sys.stderr) as show, _Hands(shards, total, show) as hands:
        for name in whole:
            hands.advance(sum(tensor.outline.size for tensor in shards[name]))
        for name, digest in hands.work({name: part for name, part in shards.items() if name not in whole}, target):
            whole[name] = digest
            with journal.open("a", encoding="ascii") as file:
                file.write(f"\n{json.dumps({'name': name, 'sha256': digest})}")  # behind a line that may be torn
    if len(shards) > 1:
        placed = {tensor.name: name for name, part in shards.items() for tensor in part}
        counted = sum(tensor.outline.size // tensor.dtype.itemsize for part in shards.values() for tensor in part)
        index = {"metadata": {"total_parameters": counted, "total_size": total}, "weight_map": placed}
        (target / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    return whole


class _Hands:
    """Threads that compute, and those that write, as many as there are cores and memory for."""

    def __init__(self, shards: Shards, total: int, show: Callable[[float, str], None]) -> None:
        self._show, self._total, self._done = show, total, 0
        self._stop, self._lock = threading.Event(), threading.Lock()
        largest = max(_numbers(tensor) for part in shards.values() for tensor in part)
        affordable = cluster.free_memory() // 2 // max(_LEAST, largest * _BYTES)
        many = max(1, min(cluster.cpus(), affordable))
        self._writing = max(1, min(many, len(shards)))
        self._ahead = -(-many // self._writing)  # blocks of each shard that are computed while one is written
        self._computers = ThreadPoolExecutor(many, "compute")
        self._writers = ThreadPoolExecutor(self._writing, "write")
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Self:
        torch.set_num_threads(1)  # there are as many of ours as cores
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for pool in (self._writers, self._computers):
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def work(self, shards: Shards, target: Path) -> Iterator[tuple[str, str]]:
        """Write all of them, and tell of each when it is whole: its name, and its SHA-256."""
        names = {self._writers.submit(self._write, part, target / name): name for name, part in shards.items()}
        for future in as_completed(names):
            yield names[future], future.result()

    def advance(self, size: int) -> None:
        """Tell that so many bytes more are there."""
        with self._lock:
            self._done += size
            self._show(self._done, log.size(self._done))

    def _write(self, tensors: Sequence[Tensor], path: Path) -> str:
        partial = path.with_name(path.name + _PART)
        digest = shard.write(partial, {each.name: each.outline for each in tensors}, self._blocks(tensors))
        partial.rename(path)
        return digest

    def _blocks(self, tensors: Sequence[Tensor]) -> Iterator[torch.Tensor]:
        """The rows of all of them in order, computed ahead of those who write them."""
        coming: deque[Future[torch.Tensor]] = deque()
        for tensor in tensors:
            rows, step = tensor.outline.rows, max(1, tensor.source.step)
            for first in range(0, rows, step):
                coming.append(self._computers.submit(self._compute, tensor, first, min(rows, first + step)))
                if len(coming) > self._ahead:
                    yield self._arrived(coming.popleft())
        while coming:
            yield self._arrived(coming.popleft())

    def _arrived(self, block: "Future[torch.Tensor]") -> torch.Tensor:
        made = block.result()
        self.advance(made.nbytes)
        return made

    def _compute(self, tensor: Tensor, first: int, last: int) -> torch.Tensor:
        if self._stop.is_set():
            raise _StoppedError
        made = tensor.source.rows(first, last)
        if made.dtype == tensor.dtype and tensor.before is None:
            return made
        rounded = made.to(tensor.dtype)
        if _finite(rounded):
            return rounded.cpu()
        if _finite(made):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise errors.ModelError(
                f"{tensor.name} of the merged model has numbers of up to {float(made.abs().max()):.3g}, which {kind} "
                "does not hold: set merge.dtype bfloat16"
            )
        raise errors.ModelError(
            f"{tensor.name} of the merged model would hold NaN or Inf: the base or the adapter is damaged"
        )


class _StoppedError(Exception):
    """Another thread failed, or the job was asked to stop."""


def _finite(numbers: torch.Tensor) -> bool:
    """Whether all of them are; ten times as fast as to look at each."""
    return not numbers.is_floating_point() or not numbers.numel() or all(map(torch.isfinite, torch.aminmax(numbers)))


def _numbers(tensor: Tensor) -> int:
    outline = tensor.source.outline
    return min(outline.rows, tensor.source.step) * outline.row


def _kept(journal: Path, target: Path, shards: Shards) -> dict[str, str]:
    """The shards that an earlier start has written whole, and that are what it wrote."""
    if not journal.is_file():
        return {}
    whole = {}
    for line in journal.read_text(encoding="ascii").splitlines():
        with contextlib.suppress(ValueError, KeyError, FileNotFoundError):  # the last line may be torn
            told = json.loads(line)
            if told["name"] in shards and manifest.sha256(target / told["name"]) == told["sha256"]:
                whole[told["name"]] = told["sha256"]
    return whole
