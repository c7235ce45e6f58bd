"""The container image as the tests have it: built by `make image` on a base of Debian's packages, run by podman."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT
from drivers import TRITON

NAME = "localhost/finetune-job:tested"
BASE = "localhost/finetune-tests/debian:bookworm"
TOOLS = ("buildah", "podman", "debootstrap")
HARDENED = (
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges",
)  # fmt: skip
CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]  # a container among containers may not raise its own
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def possible() -> bool:
    """Whether this machine can build and run images: it takes root and Debian's tools."""
    return os.geteuid() == 0 and all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in TOOLS)


@dataclass(frozen=True)
class Image:
    """The image under test, the commit that it was built from, its name, and where podman's settings are."""

    conf: Path
    revision: str
    name: str = NAME

    def command(self, *options: object, hardened: bool = True) -> list[str]:
        """The command line that runs a container; what the image is told comes after it."""
        safe = HARDENED if hardened else ()
        return ["podman", "run", "--rm", "--network=host", *safe, *map(str, options), self.name]

    def run(self, *options: object, told: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
        """Run a container to its end."""
        line = [*self.command("--no-healthcheck", *options), *told]
        return subprocess.run(line, env=self.environ, capture_output=True, text=True, check=False)

    def start(self, log: Path, *options: object, told: tuple[str, ...]) -> "Running":
        """Start a container; its name is that of the log."""
        with log.open("w") as file:
            line = [*self.command(f"--name={log.stem}", *options), *told]
            return Running(self, log, subprocess.Popen(line, env=self.environ, stdout=file, stderr=file))

    def inspect(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.podman("image", "inspect", self.name).stdout)
        return found[0]

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Its files, as a folder."""
        yield Path(self.podman("image", "mount", self.name).stdout.strip())
        self.podman("image", "unmount", self.name)

    def podman(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["podman", *arguments], env=self.environ, capture_output=True, text=True, check=check)

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self.conf)}


@dataclass(frozen=True)
class Running:
    """A container that runs."""

    image: Image
    log: Path
    process: "subprocess.Popen[bytes]"

    def until(self, text: str) -> None:
        """Wait until it says that."""
        end = time.monotonic() + 120
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def healthy(self) -> bool:
        """What the health check of the image says now."""
        return self.image.podman("healthcheck", "run", self.log.stem, check=False).returncode == 0

    def stop(self) -> int:
        """Ask it to stop, as a scheduler does, and return the status with which it did."""
        self.image.podman("stop", "--time=60", self.log.stem)
        return self.process.wait(90)


def build(folder: Path, name: str = NAME, revision: str | None = None) -> Image:
    """Build the image, or find it built; the layers stay in the machine's store and are used again.

    `revision` is what git would say of another commit with the same files.
    """
    conf = folder / "containers.conf"
    conf.write_text(CONF)
    options = "--layers --isolation=chroot --network=host --pull=false " + " ".join(_site(folder))
    options += f" --build-arg=ADDITIONAL_PACKAGES={TRITON}"  # as with the GPU's torch
    with Path(__file__).open() as turn:  # of the workers that run tests side by side
        fcntl.flock(turn, fcntl.LOCK_EX)
        _base()
        head = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
        line = ["make", "image", "BUILDER=buildah", f"IMAGE={name}", f"BASE_IMAGE={BASE}", f"BUILD_OPTIONS={options}"]
        line += [f"REVISION={revision}"] if revision else []
        made = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return Image(conf, revision or head, name)


def _base() -> None:
    """A Debian without Python, as NVIDIA's base is an Ubuntu without it; two minutes, once on a machine."""
    if subprocess.run(["buildah", "inspect", BASE], capture_output=True, check=False).returncode == 0:
        return
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        root = Path(folder) / "root"
        boot = [shutil.which("debootstrap", path="/usr/sbin"), "--variant=minbase", "--include=ca-certificates"]
        subprocess.run([*boot, "bookworm", root], capture_output=True, check=True)
        for left in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / left)
        container = _said("buildah", "from", "scratch")
        _said("buildah", "add", "--quiet", container, str(root), "/")
        _said("buildah", "commit", "--quiet", "--rm", container, BASE)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _site(folder: Path) -> list[str]:
    """How this machine comes by packages, for the builder: its pip's settings as a secret, and the files they name."""
    listed = _said(sys.executable, "-m", "pip", "config", "list")
    wanted = "index-url|extra-index-url|find-links|trusted-host|cert"
    told = dict(re.findall(rf"^(?:global|:env:)\.({wanted})='(.*)'$", listed, re.MULTILINE))
    conf = folder / "pip.conf"
    conf.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in told.items())]) + "\n")
    places = [Path(word.removeprefix("file://")) for value in told.values() for word in value.split()]
    local = {place.parent if place.name == "simple" else place for place in places if place.is_absolute()}
    return [f"--secret=id=pip,src={conf}", *(f"--volume={place}:{place}:ro" for place in sorted(local))]
