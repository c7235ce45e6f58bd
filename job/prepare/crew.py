"""Rendering in several processes: the same rows in the same order as in one, sooner.

Each process gets a batch, and the next one when its rows were taken, so that memory stays bounded whatever the size of
the files. They are started when there is work enough for them, and end with this process, however it ends.
"""

import contextlib
import logging
import math
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from job import cluster, errors
from job.model import tokenizer
from job.model.vision import Vision
from job.prepare.formats import Example
from job.prepare.tokens import Renderer, Row
from job.prepare.turns import BadRecordError

Batch = Sequence[tuple[str, Example]]
Rows = list[Row | BadRecordError]

_ALONE = 8  # batches, which take less time than starting others
_CORES = 4  # from which on text gains: tokenizers keep some busy by themselves, what sees images only one
_MOST = 16  # processes
_MEMORY = 500_000_000  # bytes that each takes
_ROOT = Path(__file__).parents[2]
# One thread each; libraries read these variables when they are loaded.
_WORK = f"""
import os, sys
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.putenv(name, "1")
from {__name__} import work
work(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class Recipe:
    """What a renderer is made from, wherever it is made."""

    base: Path
    template: str
    trust_remote_code: bool
    max_length: int
    loss_on: str
    max_pixels: int | None
    blind: str
    """Why no images can be seen; empty if they can."""

    def renderer(self) -> Renderer:
        """Raises `errors.ModelError` if the base has no tokenizer or image processor that can be used."""
        words = tokenizer.load(self.base, self.template, trust_remote_code=self.trust_remote_code)
        vision = Vision(self.base, words, self.max_pixels) if not self.blind else None
        return Renderer(words, self.max_length, self.loss_on, vision)


class Crew:
    """A renderer, and others that are made by the same recipe in processes of their own. Is to be closed."""

    def __init__(self, own: Renderer, recipe: Recipe) -> None:
        self._own, self._recipe = own, recipe
        enough = _CORES if recipe.blind else 2
        self._alone: float = _ALONE if cluster.cpus() >= enough else math.inf
        self._many = max(1, min(cluster.cpus(), _MOST, cluster.free_memory() // 2 // _MEMORY))
        self._hands: list[_Hand] = []

    def rows(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Rows]]:
        """Each of the `batches`, in order, with a row for each of its examples or why there is none.

        Raises what a renderer raises, and `errors.JobError` when a process is lost.
        """
        under_way: deque[tuple[_Hand, Batch]] = deque()
        for batch in batches:
            if self._alone > 0:
                self._alone -= 1
                yield batch, list(self._own.rows([example for _, example in batch]))
                continue
            while len(self._hands) < self._many:
                self._hands.append(_Hand(self._recipe))
            if len(under_way) == len(self._hands):
                yield self._taken(*under_way.popleft())
            hand = next(hand for hand in self._hands if not any(hand is busy for busy, _ in under_way))
            hand.give([example for _, example in batch])
            under_way.append((hand, batch))
        while under_way:
            yield self._taken(*under_way.popleft())

    def close(self) -> None:
        """End the processes, whatever they do."""
        for hand in self._hands:
            hand.end()
        self._hands = []

    def _taken(self, hand: "_Hand", batch: Batch) -> tuple[Batch, Rows]:
        rows, ended = hand.take()
        self._own.eos_added += ended
        return batch, rows


class _Hand:
    """A process that renders one batch at a time."""

    def __init__(self, recipe: Recipe) -> None:
        mine, its = socket.socketpair()
        self._line = Connection(mine.detach())
        # A request to stop is ours to hear: it ends with us, when its line does.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-c", _WORK, str(its.fileno())], cwd=_ROOT, pass_fds=[its.fileno()]
            )
        finally:
            its.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.give(recipe)

    def give(self, work: Recipe | list[Example]) -> None:
        with contextlib.suppress(OSError):  # of one that is gone; why is told by what it left, if it is to be told
            self._line.send(work)

    def take(self) -> tuple[Rows, int]:
        """Its rows of what it was given last, and in how many it had to add the end of the last turn."""
        try:
            made: tuple[Rows, int] | errors.JobError = self._line.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            oom = "; the kernel does this when host memory runs out"
            why = oom if status == -signal.SIGKILL else ""
            raise errors.JobError(f"a process that prepared the data ended with status {status}{why}") from None
        if isinstance(made, errors.JobError):
            raise made
        return made

    def end(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()


def work(opened: int) -> None:
    """Render what comes over the socket `opened`, by the recipe that comes first, until its other end is closed."""
    line = Connection(opened)
    logging.disable(logging.WARNING)  # what there is to warn of, the one that was there first has said
    try:
        renderer = line.recv().renderer()
        while True:
            examples = line.recv()
            renderer.eos_added = 0
            line.send((list(renderer.rows(examples)), renderer.eos_added))
    except (EOFError, ConnectionError):
        return
    except errors.JobError as e:
        failure = e
    except Exception as e:  # noqa: BLE001 - which nobody else would hear of
        failure = errors.JobError(f"a process that prepared the data met {type(e).__name__}: {e}")
    with contextlib.suppress(ConnectionError):
        line.send(failure)
