"""The machines of one attempt in touch with each other: what the first tells the others, and how all of it ends.

Every other node keeps one connection to the first, over which both send lines of JSON, at least one every two seconds.
So a machine that died, hangs or is cut off is noticed within twenty seconds, however long the work between two
messages takes. What goes over it is no secret; who can reach the port can disturb the attempt, as with torch's own
rendezvous, but not the store.
"""

import contextlib
import platform
import queue
import threading
from typing import Self

from job import errors
from job.cluster.line import RETRY, Asked, End, Lost, Message, reach, until_the_end
from job.cluster.node import Node

PATIENCE = 600.0  # seconds for the others to appear: their images may be pulled first


class Alone:
    """The only node of a run, as far as it has to know."""

    @property
    def address(self) -> str | None:
        """This machine's own, in the network that the others are in; None if there are none."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _at: object) -> None:
        """Nobody hears it."""

    def gather(self) -> None:
        """Nobody is missing."""

    def await_ready(self) -> None:
        """Nobody has to become ready."""

    def ready(self) -> None:
        """Nobody waits for it."""

    def tell(self, **message: object) -> None:
        """Nobody hears it."""

    def release(self) -> None:
        """Nobody was needed."""

    def hear(self) -> Message:
        """Nobody says anything: there is nothing to wait for."""
        return {"done": True}


class Other(Alone):
    """The first node, as another one sees it."""

    def __init__(
        self, here: Node, run: str, config: str, gpus: int, asked: Asked, lost: Lost, patience: float = PATIENCE
    ) -> None:
        self._here, self._asked, self._lost, self._over = here, asked, lost, False
        self._heard: queue.Queue[Message] = queue.Queue()
        self._line = reach(here, patience)
        self._line.say({"run": run, "config": config, "gpus": gpus, "rank": here.rank, "host": platform.node()})
        threading.Thread(target=self._listen, daemon=True, name="peers").start()

    def __enter__(self) -> Self:
        return self

    @property
    def address(self) -> str | None:
        return self._line.address

    def ready(self) -> None:
        """Tell the first node that this one has all that it needs."""
        self._line.say({"ready": True})

    def hear(self) -> Message:
        """What the first node says next, however long it takes; `lost` is called if it is gone."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._heard.get(timeout=RETRY)

    def __exit__(self, _kind: object, error: BaseException | None, _at: object) -> None:
        self._over = True
        self._line.say({"end": verdict(error)})
        self._line.finish()

    def _note(self, message: Message) -> None:
        """Keep what the first node says for who asks; that another one is gone it hands on at once."""
        if gone := message.get("gone"):
            End(gone["why"], gone["status"], gone["asked"]).tell(gone["who"], self._asked, self._lost)
        else:
            self._heard.put(message)

    def _listen(self) -> None:
        end = until_the_end(self._line, self._note)
        self._line.close()
        if end.status == errors.DONE:
            self._heard.put({"done": True})
        elif not self._over:
            end.tell(f"node 0 ({self._here.first})", self._asked, self._lost)


def verdict(error: BaseException | None) -> Message:
    """How this node ends, as it is told to the others."""
    status, why = errors.explain(error) if error else (errors.DONE, "done")
    return {"status": status, "why": why, "asked": isinstance(error, errors.Preempted)}
