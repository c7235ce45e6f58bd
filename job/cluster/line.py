"""One connection between two machines of an attempt: lines of JSON, and a sign of life every two seconds."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job import errors
from job.cluster.node import HERE, Node

SILENCE = 20.0  # seconds without a word, after which a node is taken for lost
BEAT = 2.0
RETRY = 1.0
LAST = 2.0  # for the last words
_LINE = 1 << 20  # bytes; nothing that we send is longer
_BEATING = {"beat": True}
_MAPPED = "::ffff:"  # how a socket for both kinds of addresses shows those of IPv4

Message = dict[str, Any]
Lost = Callable[[errors.JobError], None]
Asked = Callable[[str], None]


class Line:
    """One connection, and a thread that keeps it alive."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        self.address = str(connection.getsockname()[0]).removeprefix(_MAPPED)
        self._connection, self._reader = connection, connection.makefile("rb")
        self._sending, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, message: Message) -> None:
        """Send `message`; that the other side is gone is noticed by who listens to it."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> Message:
        """The next message that is not only a sign of life.

        Raises `OSError` if the other side is gone or silent, `ValueError` if it is none of us.
        """
        while True:
            text = self._reader.readline(_LINE)
            if not text:
                raise ConnectionResetError("the connection was closed")
            message = json.loads(text)
            if not isinstance(message, dict):
                raise ValueError("not a message")  # noqa: TRY004 - as JSON errors are
            if message != _BEATING:
                return message

    def finish(self) -> None:
        """Close it when the other side has read the last words; closing at once may take them from it."""
        until = time.monotonic() + LAST
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(LAST)
            while time.monotonic() < until and self._connection.recv(_LINE):
                pass
        self.close()

    def close(self) -> None:
        """Let the other side go."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self.say(_BEATING)


def listen(port: int = 0, *, here: bool = False) -> socket.socket:
    """Be reachable at `port`, by default a free one: from `here` only, or at every address, of IPv4 and of IPv6."""
    if here:
        return socket.create_server((HERE, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def reach(here: Node, patience: float) -> Line:
    """Connect to the first node, which may come up later; raises what `never` gives if it does not."""
    until = time.monotonic() + patience
    while True:
        try:
            return Line(socket.create_connection((here.first, here.port), timeout=SILENCE))
        except OSError as e:
            if time.monotonic() > until:
                raise never(
                    here,
                    f"node 0 cannot be reached at {here.first}:{here.port} since {patience:.0f} s ({e}): look there, "
                    "at the name, and at firewalls",
                ) from e
            time.sleep(RETRY)


def never(here: Node, why: str) -> errors.JobError:
    """The error for a node that did not appear.

    Slurm starts all of them at once: there it is a failure, and is counted. Elsewhere it may wait for its machine.
    """
    return errors.JobError(why) if here.told_by == "Slurm" else errors.PeerError(why)


@dataclass(frozen=True)
class End:
    """How another node ended; without a status if it did not say."""

    why: str
    status: int | None = None
    asked: bool = False

    def tell(self, who: str, asked: Asked, lost: Lost) -> None:
        if self.asked:
            asked(f"a request to stop {who}")
        elif self.status == errors.PERMANENT:
            lost(errors.PermanentError(f"{who} failed for good: {self.why}"))
        else:
            told = f"{who} {self.why}" if self.status is None else f"{who} ended: {self.why}"
            lost(errors.PeerError(f"{told}. Every node of the run is needed: start all of them again to go on"))


def until_the_end(line: Line, heard: Callable[[Message], None]) -> End:
    """Hand on what is heard, until the other side says how it ended, or is gone."""
    try:
        while True:
            message = line.hear()
            if end := message.get("end"):
                return End(str(end["why"]), int(end["status"]), bool(end["asked"]))
            heard(message)
    except TimeoutError:
        return End(f"has not said a word for {SILENCE:.0f} s")
    except (OSError, ValueError, KeyError, TypeError) as e:
        return End(f"is gone: {e}")
