"""A real Slurm of two nodes, as far as a test needs one: all of its daemons, in namespaces of their own."""

import itertools
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
WHAT = "Slurm with root (apt: slurmctld, slurmd, slurm-client, munge, iproute2)"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where some distributions put daemons
FREEZER = Path("/sys/fs/cgroup/freezer")
STARTED = 60.0  # seconds that the daemons may take on a busy machine
_MADE = itertools.count()
# A requeued job waits for as long as credentials live: 121 s with Slurm's default, 6 s here. KillWait is 30 s there.
# RequeueExit is left out, as at most sites: what the script does not requeue is not requeued.
CONFIG = """
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{tracked}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=5
BatchStartTimeout=60
SlurmdTimeout=10
MinJobAge=3600
NodeName=DEFAULT Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=128000 Gres=gpu:4 State=UNKNOWN
NodeName={nodes}
PartitionName=low   Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=0
PartitionName=grace Nodes={nodes}             MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=20
PartitionName=high  Nodes={nodes}             MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
{more}
"""


class Slurm:
    """Two nodes with four GPUs each, as Slurm believes, and the partitions low, grace (20 s) and high."""

    def __init__(self, folder: Path, init: int, nodes: list[str]) -> None:
        self.nodes = nodes
        self._folder, self._init = folder, init

    def run(self, *command: object, cwd: Path | None = None, **environ: str) -> str:
        """What a command says on the machine where users log in."""
        inside = ["nsenter", "-t", str(self._init), "--mount", "--net", "--uts", "--ipc", "--pid"]
        line = [*inside, "env", "-C", str(cwd or self._folder), *map(str, command)]
        done = subprocess.run(
            line, env=_environ(self._folder) | environ, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: object, cwd: Path, **environ: str) -> str:
        """Submit a job and return its number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environ)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, or of a task of an array (as 7_1)."""
        told = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def until(self, number: str, *states: str, seconds: float = 120.0, why: Callable[[], str] = str) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        end = time.monotonic() + seconds
        while (told := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"{told}\n{why()}\n{self.said()}"
            time.sleep(0.2)
        return told

    def said(self) -> str:
        """The last words of the daemons."""
        logs = [self._folder / "slurmctld.log", *(self._folder / f"{node}.log" for node in self.nodes)]
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs if log.exists())

    def crash(self, node: str) -> None:
        """Kill all that runs on a node, Slurm's own daemon too, without a word."""
        own = (self._folder / f"{node}.net").read_text()
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str((place / "ns" / "net").readlink()) == own:
                    os.kill(int(place.name), signal.SIGKILL)

    def restore(self, node: str) -> None:
        """Start a node again that crashed."""
        self.run(*_slurmd(self._folder, node))

    def stop_controller(self) -> None:
        """Slurm's controller is restarted for a new configuration, for example."""
        number = (self._folder / "slurmctld.pid").read_text().strip()
        self.run("kill", number)
        self.run("sh", "-c", f"while kill -0 {number} 2>/dev/null; do sleep 0.1; done")

    def start_controller(self) -> None:
        self.run("slurmctld")


def possible() -> bool:
    """Whether this machine can run one: it takes root and the packages."""
    return os.geteuid() == 0 and all(shutil.which(part, path=PATH) for part in PARTS)


@contextmanager
def slurm(more: str = "") -> Iterator[Slurm]:
    """A Slurm with `more` lines of configuration, until the block ends or this process does."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: Unix sockets lie in it
    mark = f"{os.getpid()}{next(_MADE)}"  # control groups go by the nodes' names, and tests run side by side
    nodes = [f"n{mark}a", f"n{mark}b"]
    _configure(folder, nodes, more)
    apart = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    with (folder / "init.log").open("w") as log:
        init = subprocess.Popen(
            [*apart, sys.executable, __file__, str(folder), *nodes], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, env=_environ(folder), start_new_session=True,
        )  # fmt: skip
    assert init.stdin
    assert init.stdout
    try:
        ready = init.stdout.readline()
        assert ready, (folder / "init.log").read_text()
        yield Slurm(folder, int(Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text()), nodes)
    finally:
        init.stdin.close()
        init.stdout.close()
        init.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, nodes: list[str], more: str) -> None:
    tracked = "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"  # what sites use, where this machine can
    (folder / "munge").mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    for node in (*nodes, "state"):
        (folder / node).mkdir()
    for number in range(4):
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR, os.makedev(4, number))  # any device: nobody opens it
    folder.chmod(0o755)
    text = CONFIG.format(folder=folder, nodes=",".join(nodes), tracked=tracked, more=more)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
    (folder / "gres.conf").write_text(f"NodeName={','.join(nodes)} Name=gpu File={folder}/gpu[0-3]\n")
    named = [f"10.77.0.{rank} {name}" for rank, name in enumerate(("ctl", *nodes), start=1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *named, ""]))


def _environ(folder: Path) -> dict[str, str]:
    """Of users and daemons alike: sbatch passes all of it on, and pytest's own is none of a job's business."""
    return {
        "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf", "HOME": os.environ.get("HOME", "/root"), "USER": "root",
        "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _main(folder: Path, nodes: list[str]) -> None:
    """Be the first process of the namespaces: start the daemons, and end all when nobody listens any more."""
    _do("mount", "--bind", folder / "hosts", "/etc/hosts")
    _do("mount", "-t", "tmpfs", "run", "/run")  # for names of networks that end with this process
    _do("hostname", "ctl")
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", "br0", "type", "bridge")
    _do("ip", "addr", "add", "10.77.0.1/24", "dev", "br0")
    _do("ip", "link", "set", "br0", "up")
    munge = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    _do("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
    _do("slurmctld", "-c")
    for rank, node in enumerate(nodes, start=2):
        _do("ip", "netns", "add", node)
        _do("ip", "link", "add", f"veth{rank}", "type", "veth", "peer", "name", "eth0", "netns", node)
        _do("ip", "link", "set", f"veth{rank}", "master", "br0", "up")
        _do("ip", "-n", node, "link", "set", "lo", "up")
        _do("ip", "-n", node, "addr", "add", f"10.77.0.{rank}/24", "dev", "eth0")
        _do("ip", "-n", node, "link", "set", "eth0", "up")
        _do(*_slurmd(folder, node))
    end = time.monotonic() + STARTED
    while set(_do("sinfo", "-h", "-N", "-o", "%T").split()) != {"idle"}:
        assert time.monotonic() < end, "the nodes did not come up"
        time.sleep(0.1)
    os.write(1, b"ready\n")
    while not (select.select([0], [], [], 0.2)[0] and not os.read(0, 1)):
        _reap()


def _slurmd(folder: Path, node: str) -> list[str]:
    """The command of a node's daemon, in the network and with the name of the node."""
    note = f"readlink -n /proc/self/ns/net >{folder}/{node}.net"
    inside = f"hostname {node}; {note}; exec slurmd -N {node}"
    return ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "sh", "-c", inside]


def _end(folder: Path, nodes: list[str]) -> None:
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    for node in nodes:
        for group in sorted(FREEZER.glob(f"slurm_{node}/**/"), reverse=True):  # the innermost first
            with suppress(OSError):
                group.rmdir()
    shutil.rmtree(folder, ignore_errors=True)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _do(*command: object) -> str:
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    where, names = Path(sys.argv[1]), sys.argv[2:]
    try:
        _main(where, names)
    finally:
        _end(where, names)
