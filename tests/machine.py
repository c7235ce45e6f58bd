"""A machine that boots by a real systemd, as a container, with the files of spot/ as cloud-init would leave them."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

UNIT = "finetune.service"
ROOTFS = ROOT / ".cache" / "systemd-rootfs"
# Seconds that anything here may take. In a container systemd is not always told that the last process of a unit is gone
# (seen: an empty control group for a minute, on a busy machine), and goes on when its TimeoutStopSec, 120, is over.
BOUND = 150.0
# As user-data.yaml has them, but for these: a test must not wait a minute for each start.
SOONER = "[Service]\nRestartSec=100ms\nStandardOutput=journal+console\nStandardError=journal+console\n"
PODMAN = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
# Does what the next line of /told/next says: ends with that status, or is at `work` until SIGTERM, after which it takes
# so many seconds to save and ends with 75, or the status that follows.
DOCKER = r"""#!/bin/sh
echo "$1" >>/told/calls
[ "$1" = run ] || exit 1
read -r what seconds status </told/next
sed -i 1d /told/next
[ "$what" = work ] || exit "$what"
trap 'sleep "$seconds"; echo saved >>/told/calls; exit "${status:-75}"' TERM
echo "$*"
echo working >>/told/calls
while :; do sleep 0.1; done
"""


class Machine:
    """A machine that boots with cloud-init's work done, and whose docker is told how its starts end."""

    def __init__(self, folder: Path, told: tuple[object, ...], env: dict[str, str]) -> None:
        self.name = f"unit-{os.getpid()}-{folder.name}"
        self._told = folder / "told"
        self._told.mkdir()
        (self._told / "next").write_text("".join(f"{line}\n" for line in told))
        (self._told / "calls").touch()
        (folder / "containers.conf").write_text(PODMAN)
        self._environ = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        self._podman(
            "create", f"--name={self.name}", "--network=none", "--systemd=always", "--tty",
            f"--volume={self._told}:/told", "--rootfs", f"{ROOTFS}:O", "/sbin/init",
        )  # fmt: skip
        self._env = "".join(f"{k}={v}\n" for k, v in env.items())

    def begin(self) -> None:
        """Boot for the first time, and do what cloud-init does then."""
        self.boot()
        data: dict[str, Any] = yaml.safe_load((ROOT / "spot" / "user-data.yaml").read_text())
        for file in data["write_files"]:
            self._write(file["path"], file["content"], file["permissions"])
        self._write("/etc/systemd/system/finetune.service.d/sooner.conf", SOONER, "0644")
        self._write("/usr/local/bin/docker", DOCKER, "0755")
        self.run("tee", "--append", "/etc/finetune/env", told=self._env)
        for command in data["runcmd"]:
            self.run(*command, check=False)  # it may be off again before the answer is here

    def boot(self) -> None:
        self._podman("start", self.name)
        up = ("running", "degraded")  # degraded: some unit failed, as ours may have already
        self.until(lambda: self.run("systemctl", "is-system-running", check=False) in up)

    def run(self, *command: str, told: str = "", check: bool = True) -> str:
        return self._podman("exec", "--interactive", self.name, *command, told=told, check=check)

    def until(self, so: Callable[[], bool]) -> None:
        end = time.monotonic() + BOUND
        while not so():
            assert time.monotonic() < end, self._state()
            time.sleep(0.1)

    def _state(self) -> str:
        """What may tell why it takes so long."""
        asked = (("systemctl", "status", "--no-pager", UNIT), ("systemctl", "list-jobs", "--no-pager"))
        told = [self.run(*each, check=False) for each in asked]
        return "\n".join([self.said()[-3000:], (self._told / "calls").read_text(), *told])

    def calls(self, what: str) -> int:
        """How often docker was called to `run` or `rm`; or the job was `working`, or `saved` when asked to stop."""
        return (self._told / "calls").read_text().split().count(what)

    def off(self) -> bool:
        return self._podman("inspect", "--format={{.State.Running}}", self.name) == "false"

    def said(self) -> str:
        """What reached the console, of all boots."""
        return self._podman("logs", self.name)

    def state(self) -> str:
        return self.run("systemctl", "show", "--property=ActiveState", "--value", UNIT)

    def remove(self) -> None:
        self._podman("rm", "--force", "--time=0", self.name)

    def _write(self, path: str, content: str, permissions: str) -> None:
        self.run("install", "-D", "--mode", permissions, "/dev/stdin", path, told=content)

    def _podman(self, *command: str, told: str = "", check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *command], env=self._environ, input=told, capture_output=True, text=True, check=False,
            timeout=BOUND,
        )  # fmt: skip
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return (done.stdout + done.stderr).strip()


def possible() -> bool:
    """Whether such machines can be made here."""
    return os.geteuid() == 0 and all(map(shutil.which, ("podman", "debootstrap", "runc")))


def make_root() -> None:
    """A Debian with systemd, made once: two minutes."""
    ROOTFS.parent.mkdir(exist_ok=True)
    with Path(__file__).open() as turn:  # of the workers that run tests side by side
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not ROOTFS.exists():
            half = ROOTFS.with_name("systemd-rootfs.half")
            shutil.rmtree(half, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", "--include=systemd-sysv,dbus", "bookworm", str(half)]
            subprocess.run(command, check=True)
            half.rename(ROOTFS)
