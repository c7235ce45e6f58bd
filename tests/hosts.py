"""Machines with addresses of their own, as far as a test needs them: network namespaces on one bridge."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

_MADE = itertools.count()


class Hosts:
    """`count` machines h0, h1, … that reach each other; a shared disk is the only store they need."""

    def __init__(self, count: int, after: ExitStack) -> None:
        self.count = count
        own = os.getpid() * 10 + next(_MADE) % 10  # tests run side by side, and one may make several
        self._net = f"10.{100 + own % 100}.{own // 100 % 250}"
        self._mark = f"f{own % 10**6}"
        _ip("link", "add", self._bridge, "type", "bridge")
        after.callback(_ip, "link", "del", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for rank in range(count):
            name = self._name(rank)
            _ip("netns", "add", name)
            after.callback(_ip, "netns", "del", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", self._bridge, "up")
            for command in (["addr", "add", f"{self.address(rank)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                _ip("-n", name, *command)
            _ip("-n", name, "link", "set", "lo", "up")

    def address(self, rank: int) -> str:
        return f"{self._net}.{rank + 1}"

    def start(self, rank: int, command: Sequence[str | Path], **how: object) -> "subprocess.Popen[str]":
        """Run a command on host `rank`, which knows its place as Kubernetes would tell it."""
        environ = {
            **os.environ,
            "PET_NNODES": str(self.count),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": self.address(0),
            "OMP_NUM_THREADS": "1",
        }
        named = ["unshare", "--uts", "sh", "-c", f'hostname h{rank}; exec "$@"', "sh"]
        line = ["ip", "netns", "exec", self._name(rank), *named, *map(str, command)]
        return subprocess.Popen(line, env=environ, start_new_session=True, text=True, **how)  # type: ignore[call-overload,no-any-return]

    def cut_off(self, rank: int) -> None:
        """From now on nothing arrives there, and nothing leaves."""
        _ip("link", "set", self._name(rank), "down")

    def bring_back(self, rank: int) -> None:
        _ip("link", "set", self._name(rank), "up")

    def _name(self, rank: int) -> str:
        return f"{self._mark}h{rank}"

    @property
    def _bridge(self) -> str:
        return f"{self._mark}b"


def possible() -> bool:
    """Whether this machine can make some: it takes root and iproute2."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, check=False)
    if made.returncode == 0:
        _ip("netns", "del", f"try{os.getpid()}")
    return made.returncode == 0


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """So many machines, until the block ends."""
    with ExitStack() as after:
        yield Hosts(count, after)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
