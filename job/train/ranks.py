"""The processes that train together: what they agree on, and who waits for whom."""

import contextlib
import datetime as dt
import itertools
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed

from job import errors, failures
from job.inputs import Team

Stuck = Callable[[str, bool], None]

_BEAT_SECONDS = 1.0
_ANSWER_SECONDS = 10.0  # that rank 0 has to tell where all of them are
_MARGIN_SECONDS = 30.0
_LOAD_SECONDS = 3600.0  # that one process may load the model for longer than another


class Ranks:
    """This process among the others of its team; alone, everything is agreed at once.

    Small things are agreed over the CPU, so that no GPU waits for them.
    """

    def __init__(self, team: Team, rank: int) -> None:
        self.size, self.rank = team.size, rank
        self._team = team
        self._marks, self._what, self._at = 0, "the start", math.inf
        self._watching: threading.Thread | None = None
        self._left = threading.Event()

    def meet(self, listening: int | None, timeout: float, stuck: Stuck) -> None:
        """Find the others at the address of rank 0, whose socket there is the open file `listening`.

        From now on `stuck` is called, in another thread, when this process stands still for more than `timeout`
        seconds. It is told who waits for whom, and whether this one only waits. GPUs talk by NCCL, and CPUs by gloo.
        Raises `errors.ConfigError` if this process has not the GPU that it should have.
        """
        team = self._team
        local = self.rank - team.rank(0)
        if team.gpus and torch.cuda.device_count() <= local:
            raise errors.ConfigError(
                f"rank {self.rank} is to have GPU {local} of its machine, but torch {torch.__version__} can use "
                f"{torch.cuda.device_count()}: look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough"
            )
        if torch.cuda.is_available() and not team.gpus:
            raise errors.ConfigError(
                f"torch can use {torch.cuda.device_count()} GPU(s) here, but the driver's own library (NVML) shows "
                "none: a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility. To train on the CPU all the same, "
                "set CUDA_VISIBLE_DEVICES to nothing"
            )
        if not team.grouped:
            return
        patience = dt.timedelta(seconds=max(timeout + _MARGIN_SECONDS, _LOAD_SECONDS))  # first we say why
        with self.together():
            store = distributed.TCPStore(  # type: ignore[attr-defined]  # torch's
                team.first, team.port, team.size, is_master=self.rank == 0, timeout=patience, master_listen_fd=listening
            )
            # a thread that waits for a key keeps all others from the same connection
            own = store.clone()  # type: ignore[attr-defined]  # torch's
            self._watching = threading.Thread(target=self._watch, args=(own, timeout, stuck), daemon=True, name="ranks")
            self._watching.start()
            self.mark("the first meeting")
            if team.gpus:
                torch.cuda.set_device(local)
            backend = "cuda:nccl,cpu:gloo" if team.gpus else "gloo"
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=team.size, timeout=patience)
            if team.gpus:  # that NCCL finds no way is better said before the model is loaded
                distributed.all_reduce(torch.zeros(1, device="cuda"))
            self.total(0.0)
        self.rest()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes: rank 0."""
        return self.rank == 0

    def most(self, *values: float) -> list[float]:
        """The largest of each of `values` over all processes; a barrier too."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """The sum of each of `values` over all processes, in float64."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def told(self, value: float) -> float:
        """The `value` of rank 0."""
        return self.total(value if self.first else 0.0)[0]

    def average(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of `parameters` by their mean over all processes, in one message.

        Those that a process has none of (an expert that no token went to) count as zero; that all have none of stay so.
        """
        if self.size == 1:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        there = gradients[0].new_tensor([each.grad is not None for each in parameters])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), there])
        distributed.all_reduce(flat)
        flat /= self.size
        *means, there = torch.split(flat, [*(each.numel() for each in parameters), len(parameters)])
        for parameter, mean, anywhere in zip(parameters, means, there.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter) if anywhere else None

    def mark(self, what: str) -> None:
        """This process goes on to `what`; all of them pass the same marks in the same order."""
        self._marks, self._what, self._at = self._marks + 1, what, time.monotonic()

    def rest(self) -> None:
        """Until the next mark nobody is stuck: a large model may be on a slow disk, the last upload take its time."""
        self._at = math.inf

    @property
    def at(self) -> str:
        """The last mark that this process passed, such as "step 9"."""
        return self._what

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise `errors.PeerError` for what torch raises here when another process is gone.

        NCCL reports a fault of this process's own GPU by the same class of error: that is left as
        it is.
        """
        try:
            yield
        except RuntimeError as e:
            if self.size == 1 or not (isinstance(e, distributed.DistError) or "gloo" in str(e)):
                raise
            failure = failures.find(str(e))
            if failure and failure.kind != "peer":
                raise
            told = " ".join(str(e).split())  # NCCL tells the cause in the last of several lines
            raise errors.PeerError(f"rank {self.rank} lost another process at {self._what}: {told}") from e

    def leave(self) -> None:
        """Wait for nobody any more. A thread in the midst of torch's store would abort the process when Python ends."""
        self._left.set()
        if self._watching:
            self._watching.join(_MARGIN_SECONDS)

    def _reduced(self, values: Sequence[float], how: "distributed.ReduceOp.RedOpType") -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, how)
        return [float(value) for value in tensor]

    def _watch(self, store: Any, timeout: float, stuck: Stuck) -> None:
        beating = threading.Thread(target=self._beat, args=(store,), daemon=True, name="ranks-beat")
        beating.start()
        while not self._left.wait(_BEAT_SECONDS):
            idle = time.monotonic() - self._at
            if idle > timeout:
                stuck(*self._explained(store, idle))
                return
        beating.join()

    def _beat(self, store: Any) -> None:
        """Renew the heartbeat, also while this process looks for whom it waits: all may look."""
        for beats in itertools.count(1):
            with contextlib.suppress(RuntimeError):  # the machine with the store may be gone
                store.set(_key(self.rank), json.dumps([self._marks, self._what, beats, _host()]))
            if self._left.wait(_BEAT_SECONDS):
                return

    def _explained(self, store: Any, idle: float) -> tuple[str, bool]:
        here = f"rank {self.rank} on {_host()}"
        looked: queue.SimpleQueue[tuple[list[_Sign], list[_Sign]]] = queue.SimpleQueue()

        def look() -> None:
            with contextlib.suppress(RuntimeError):
                own = store.clone()  # an answer that never comes must not stop the heartbeat
                before = _read(own, self.size)
                time.sleep(3 * _BEAT_SECONDS)
                looked.put((before, _read(own, self.size)))

        # apart, for a process that is stopped keeps its connections, and who asks it waits for as long as torch likes
        threading.Thread(target=look, daemon=True, name="ranks-look").start()
        try:
            before, now = looked.get(timeout=_ANSWER_SECONDS)
        except queue.Empty:
            return f"{here} waited {idle:.0f} s at {self._what} for rank 0, which does not answer", True
        silent = {rank for rank in range(self.size) if rank != self.rank and before[rank].beats == now[rank].beats}
        behind = {rank for rank in range(self.size) if now[rank].marks < self._marks}
        if waited_for := sorted(silent | behind):
            those = ", ".join(
                f"rank {rank} on {now[rank].host} (at {now[rank].what}{', no sign of life' if rank in silent else ''})"
                for rank in waited_for
            )
            return f"{here} waited {idle:.0f} s at {self._what} for {those}", True
        if all(each.marks == self._marks for each in now):
            return f"none of the {self.size} processes has moved for {idle:.0f} s at {self._what}", False
        return f"{here} stands still at {self._what} for {idle:.0f} s", False


class _Sign(NamedTuple):
    """The last sign of life of a process."""

    marks: int = 0
    what: str = "the start"
    beats: int = 0
    host: str = "an unknown host"


def _read(store: Any, size: int) -> list[_Sign]:
    keys = [_key(rank) for rank in range(size)]
    return [_Sign(*json.loads(store.get(key))) if store.check([key]) else _Sign() for key in keys]


def _key(rank: int) -> str:
    return f"at/{rank}"


def _host() -> str:
    return socket.gethostname()
