"""The other machines of an attempt, as the first one sees them: who is there, who is ready, who is lost."""

import contextlib
import socket
import threading
import time
from typing import Self

from job import errors, log
from job.cluster.line import LAST, RETRY, Asked, End, Line, Lost, Message, listen, never, until_the_end
from job.cluster.node import Node
from job.cluster.peers import PATIENCE, Alone, verdict

_DIFFERENT = {"run": "run.url", "config": "config (digest)", "gpus": "number of GPUs"}
_FOR_GOOD = 60.0  # seconds that a failure for good waits for who has not appeared yet, and would not hear of it


class First(Alone):
    """The other nodes, as the first one sees them."""

    def __init__(self, here: Node, run: str, config: str, gpus: int, asked: Asked, lost: Lost) -> None:
        self._here, self._asked, self._lost = here, asked, lost
        self._ours = {"run": run, "config": config, "gpus": gpus}
        self._changed = threading.Condition()
        self._lines: dict[int, Line] = {}
        self._came: set[int] = set()
        self._ready: set[int] = set()
        self._said: list[Message] = []
        self._needed, self._released, self._over = False, False, False
        self._server = _listening(here.port)
        threading.Thread(target=self._accept, daemon=True, name="peers").start()

    def __enter__(self) -> Self:
        return self

    def gather(self, patience: float = PATIENCE) -> None:
        """Wait until every node is there; from then on each is needed, and the loss of one ends the attempt."""
        until = time.monotonic() + patience
        with self._changed:
            while len(self._lines) < self._here.count - 1:
                if time.monotonic() > until:
                    missing = sorted(set(range(1, self._here.count)) - self._lines.keys())
                    raise never(
                        self._here,
                        f"node {', '.join(map(str, missing))} of {self._here.count} did not reach "
                        f"{self._here.first}:{self._here.port} within {patience:.0f} s: look there, and at firewalls",
                    )
                self._changed.wait(RETRY)
            self._needed = True

    def await_ready(self) -> None:
        """Wait until every node has all that it needs, however long it takes."""
        with self._changed:
            missing = sorted(set(range(1, self._here.count)) - self._ready)
            if missing:
                log.event("peers.wait", f"waiting until node {', '.join(map(str, missing))} has the model and the data")
            while len(self._ready) < self._here.count - 1:
                self._changed.wait(RETRY)

    @property
    def address(self) -> str | None:
        with self._changed:
            return next((line.address for line in self._lines.values()), None)

    def tell(self, **message: object) -> None:
        """Send it to every node, also to those that come later."""
        with self._changed:
            self._said.append(message)
            for line in self._lines.values():
                line.say(message)

    def release(self) -> None:
        """From now on the others are not needed: they wait for the end, and may go and come back."""
        with self._changed:
            self._released, self._said = True, []

    def __exit__(self, _kind: object, error: BaseException | None, _at: object) -> None:
        self._over = True
        end = verdict(error)
        self.tell(end=end)
        # what comes meanwhile must not hide the error that is on its way out
        with contextlib.suppress(errors.JobError, errors.Preempted) if error else contextlib.nullcontext():
            self._stay(end)
        self._server.close()
        for line in list(self._lines.values()):
            line.finish()

    def _stay(self, end: Message) -> None:
        """Wait for those that are just coming: they would take a closed door for a machine that is lost."""
        for_good = end["status"] == errors.PERMANENT
        until = time.monotonic() + (_FOR_GOOD if for_good else LAST)
        with self._changed:
            missing = sorted(set(range(1, self._here.count)) - self._came)
            if missing and for_good:
                log.event(
                    "peers.stay",
                    f"{end['why']} (staying {_FOR_GOOD:.0f} s at most, to tell node {', '.join(map(str, missing))})",
                )
            while len(self._came) < self._here.count - 1 and time.monotonic() < until:
                self._changed.wait(RETRY)

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._server.accept()
            except OSError:  # of one that was gone again, or because it is closed
                if self._server.fileno() < 0:
                    return
                time.sleep(RETRY)
                continue
            threading.Thread(target=self._greet, args=(connection, str(address[0])), daemon=True).start()

    def _greet(self, connection: socket.socket, address: str) -> None:
        """Let a node in that proves to be one of ours; anything else that connects is sent away."""
        line = Line(connection)
        try:
            hello = line.hear()
        except (OSError, ValueError):
            line.close()
            return  # a scanner of ports, or a node that died
        rank = hello.get("rank")
        if refusal := self._refusal(hello, address):
            self._refuse(line, str(refusal), refusal.status)
            with self._changed:
                if isinstance(rank, int) and 0 < rank < self._here.count:
                    self._came.add(rank)
                idle = not (self._needed or self._released or self._over)
            if idle and isinstance(rank, int) and hello.get("run") == self._ours["run"]:
                self._lost(refusal)  # it would come again: nobody waits for what cannot be
            return
        assert isinstance(rank, int)
        with self._changed:
            there = self._lines.get(rank)
            taken = there is not None and self._needed and not self._released
            if not taken:
                for message in self._said:
                    line.say(message)
                self._lines[rank] = line
                self._came.add(rank)
                self._changed.notify_all()
        if taken:
            self._refuse(line, f"node {rank} of this run is there already, and works", errors.AGAIN)
            return
        if there:
            self._refuse(there, f"another start of node {rank} has taken its place", errors.AGAIN)
        log.event("peers.joined", f"node {rank} of {self._here.count} is here ({hello['host']})")
        self._gone(hello, line, until_the_end(line, lambda message: self._note(rank, message)))

    def _note(self, rank: int, message: Message) -> None:
        with self._changed:
            if message.get("ready"):
                self._ready.add(rank)
            self._changed.notify_all()

    def _refuse(self, line: Line, why: str, status: int) -> None:
        log.warn("peers.refused", why)
        line.say({"end": {"status": status, "why": why, "asked": False}})
        line.finish()

    def _refusal(self, hello: Message, address: str) -> errors.JobError | None:
        different = [name for name, value in self._ours.items() if hello.get(name) != value]
        who = f"node {hello.get('rank')} ({hello.get('host')}, {address})"
        if different:
            name = different[0]
            told = (
                f"{who} has another {_DIFFERENT[name]} than this one ({hello.get(name)} instead of "
                f"{self._ours[name]}): start all nodes with the same"
            )
            # one of its GPUs may be broken, and the next start on another machine
            return errors.JobError(told) if name == "gpus" else errors.ConfigError(told)
        if hello.get("rank") not in range(1, self._here.count):
            return errors.ConfigError(f"{who} is not one of this run's {self._here.count} nodes")
        return None

    def _gone(self, hello: Message, line: Line, end: End) -> None:
        with self._changed:
            current = self._lines.get(hello["rank"]) is line
            if current:
                del self._lines[hello["rank"]]
                self._ready.discard(hello["rank"])
            over, needed = self._over or self._released or not current, self._needed
        line.close()
        who = f"node {hello['rank']} ({hello['host']})"
        if not over and (needed or end.status not in (None, errors.DONE, errors.AGAIN)):
            end.tell(who, self._asked, self._lost)
            self.tell(gone={"who": who, "why": end.why, "status": end.status, "asked": end.asked})
        elif not over:
            log.warn("peers.left", f"{who} {end.why}; it may come back")


def _listening(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as e:
        raise errors.PeerError(
            f"the other nodes cannot be listened for at port {port}: {e}. If another job has it, start again; "
            "where the port is yours to choose, set another one on all nodes (PET_MASTER_PORT)"
        ) from e
