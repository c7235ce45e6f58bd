"""Who owns this run now: one attempt at a time, by conditional writes alone.

The owner rewrites ``lease.json`` every few seconds. Who finds it there watches whether it changes: if it does, its
owner lives; if it does not for as long as the lease says, its owner is taken for dead, and one of those who watch
replaces exactly the version that it watched. So no clock is compared with another: the watcher's own clock decides
how long it waits, and a clock that runs wrong costs time, not safety. An owner that was taken for dead, because its
machine was paused or cut off, finds another name in the lease when it renews it; and it renews it before everything
that it seals (`Lease.confirm`), so it ends without having written. After a long outage of the store an owner that
nobody replaced goes on (Gray and Cheriton, "Leases", SOSP 1989, bound the owner by its clock instead).
"""

import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job import errors, log, paths
from job.storage import Blob, Store

_RENEWALS = 4  # in the time of a lease
_LOOKS = 20  # of a watcher, in the same time
_LAST_SECONDS = 5.0  # for giving it back
_PROC = Path("/proc")
_BEGAN = 19  # the field of /proc/<pid>/stat after the command, proc(5): clock ticks from the machine's start


@dataclass(frozen=True)
class Process:
    """One process of all that there ever were on all machines; where it ran it can be seen that it is gone."""

    host: str
    boot: str  # this start of the machine
    space: str  # in which the number counts: containers have their own
    number: int
    began: int

    @classmethod
    def this(cls) -> "Process":
        """The one that asks."""
        number = os.getpid()
        boot = _PROC / "sys/kernel/random/boot_id"
        space = str((_PROC / "self/ns/pid").readlink()) if boot.exists() else ""
        return cls(
            platform.node(), boot.read_text().strip() if boot.exists() else "", space, number, _began(number) or 0
        )

    def is_gone(self) -> bool:
        """True if it ran beside this one and does not any more; False also if that cannot be seen from here."""
        here = Process.this()
        beside = bool(self.boot) and (self.host, self.boot, self.space) == (here.host, here.boot, here.space)
        return beside and _began(self.number) != self.began


class Lease:
    """The right of one attempt to write under the run URL. `seconds` after its last renewal others may take it."""

    def __init__(self, store: Store, token: str, seconds: float) -> None:
        self.token, self.seconds = token, seconds
        self._store, self._ended = store, threading.Event()

    def confirm(self) -> None:
        """Renew the lease: what is sealed next is the owner's.

        Raises `errors.FencedError` if another attempt owns the run now, `errors.StoreError` if nobody can tell.
        """
        self._write({})

    def keep(self, lost: Callable[[errors.JobError], None], renewed: Callable[[], None] = lambda: None) -> None:
        """Renew it from now on in a thread of its own; call `lost` if another attempt has it, and `renewed` if not."""
        threading.Thread(target=self._keep, args=(lost, renewed), daemon=True, name="lease").start()

    def release(self) -> None:
        """If it is ours, tell the next start that it need not wait. A failure costs that some seconds, and is said."""
        self._ended.set()

        def write() -> None:
            try:
                self._write({"released": True})
            except errors.FencedError:
                return  # it never was ours, or is not any more
            except (errors.JobError, OSError) as e:
                log.event("lease.release", f"the lease was not given back: {e}")

        # In a thread, because a silent store must not use up the time of grace.
        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(_LAST_SECONDS)

    def _keep(self, lost: Callable[[errors.JobError], None], renewed: Callable[[], None]) -> None:
        while not self._ended.wait(self.seconds / _RENEWALS):
            try:
                self.confirm()
                renewed()
            except errors.FencedError as e:
                lost(e)
                return
            except (errors.JobError, OSError) as e:
                log.warn("lease.renew", f"the lease could not be renewed: {e}; trying again")

    def _write(self, change: Mapping[str, Any]) -> None:
        while True:
            there = self._store.read(paths.LEASE)
            content = _parsed(there)
            if there is None:
                raise errors.FencedError(
                    f"{self._store.url}/{paths.LEASE} was removed: nobody can tell whose the run is; start again"
                )
            if content.get("token") != self.token:
                raise errors.FencedError(
                    f"{self._store.url} belongs to another start now ({_described(content)}): this one was taken for "
                    "dead and writes nothing more"
                )
            try:
                self._store.replace(
                    paths.LEASE, _text({**content, **change, "renewed": content["renewed"] + 1}), there.version
                )
            except errors.ConflictError:
                continue  # another process of this attempt renewed it, or another start took it: look again
            return


def take(store: Store, seconds: float, after: ExitStack) -> tuple[Lease, int]:
    """Become the owner of the run until `after` is closed; also returns this attempt's number, which no other has.

    Waits until it is certain whether an owner that did not give the lease back still lives, at most as long as its
    lease says. Raises `errors.OwnedError` if it does.
    """
    owner = Lease(store, uuid.uuid4().hex, seconds)
    after.callback(owner.release)  # first: a request to stop may come right after the write
    while True:
        there = store.read(paths.LEASE)
        old = _parsed(there)
        if there and not _is_over(old):
            _watch(store, there, old, seconds)
        number = _next(store, old)
        mine = {
            "token": owner.token,
            "attempt": number,
            "seconds": seconds,
            "renewed": 0,
            "released": False,
            "process": asdict(Process.this()),
        }
        try:
            if there:
                store.replace(paths.LEASE, _text(mine), there.version)
            else:
                store.create(paths.LEASE, _text(mine))
        except errors.ConflictError:
            continue  # somebody was faster, or the owner lives
        if there and not old.get("released"):
            log.event("lease.taken", f"took the run over from {_described(old)}, which is gone", attempt=number)
        return owner, number


def _watch(store: Store, seen: Blob, old: Mapping[str, Any], seconds: float) -> None:
    """Return when the owner must be dead or gave the lease back; raise `errors.OwnedError` when it renews it."""
    patience = float(old.get("seconds", seconds))
    log.event("lease.watch", f"{store.url} is owned by {_described(old)}; watching {patience:.0f} s whether it lives")
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(patience / _LOOKS)
        there = store.read(paths.LEASE)
        now = _parsed(there)
        if there is None or now.get("released"):
            return
        if there.version != seen.version:
            raise errors.OwnedError(
                f"{store.url} is owned by {_described(now)}, which is alive: two starts of a run do not work side by "
                "side. Start this one again when that one has ended"
            )


def _is_over(old: Mapping[str, Any]) -> bool:
    """Whether it needs no watching: given back, or its process is gone from this very machine."""
    try:
        return bool(old.get("released")) or Process(**old["process"]).is_gone()
    except (KeyError, TypeError):
        return False


def _next(store: Store, old: Mapping[str, Any]) -> int:
    """One more than every attempt of which a trace is left."""
    logged = (re.fullmatch(rf"{paths.ATTEMPTS}(\d+)\.jsonl", entry.key) for entry in store.list(paths.ATTEMPTS))
    return 1 + max([int(old.get("attempt", 0)), *(int(found[1]) for found in logged if found)])


def _parsed(there: Blob | None) -> dict[str, Any]:
    """The lease; empty if there is none, or one that nobody can read: it is watched like any other."""
    try:
        content = json.loads(there.data) if there else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _described(old: Mapping[str, Any]) -> str:
    process = old.get("process") or {}
    return f"attempt {old.get('attempt', '?')} (process {process.get('number', '?')} on {process.get('host', '?')})"


def _began(number: int) -> int | None:
    """When the process with this number was started; None if there is none."""
    try:
        fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[_BEGAN])  # a zombie is gone
