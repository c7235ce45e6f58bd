"""The systemd unit of spot machines under a real systemd, which is the first process of a container.

Real are systemd, the unit and again.sh as user-data.yaml installs them, and that the machine goes off; `docker` is a
script that ends as it is told.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, need
from machine import UNIT, Machine, make_root, possible

FAILURES = "/var/lib/finetune/failures"

pytestmark = pytest.mark.slow  # they need root, podman and debootstrap, which CI's machine may not give


@pytest.fixture(scope="session")
def _root() -> None:
    need("podman, runc and debootstrap as root", possible() or None)
    make_root()


@pytest.fixture
def machine(tmp_path: Path, _root: None) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(*told: object, **env: str) -> Machine:
        made.append(Machine(tmp_path, told, env))
        made[-1].begin()
        return made[-1]

    yield make
    for each in made:
        each.remove()


def test_a_run_that_is_done_turns_the_machine_off(machine: Callable[..., Machine]) -> None:
    """After one start, and the failures before it are forgotten."""
    made = machine(1, 0, "work 0")

    made.until(made.off)

    assert made.calls("run") == 2
    assert "failed (exited 1), number 1 of 3" in made.said()
    made.boot()
    made.until(lambda: made.calls("working") == 1)
    assert "No such file" in made.run("ls", FAILURES, check=False)


def test_what_fails_for_good_is_not_started_again(machine: Callable[..., Machine]) -> None:
    """64 turns the machine off at once."""
    made = machine(64)

    made.until(made.off)

    assert made.calls("run") == 1
    assert "failed for good" in made.said()


def test_a_machine_may_stay_on(machine: Callable[..., Machine]) -> None:
    """SHUTDOWN=no: a failed unit is left, for somebody to look at, and nothing is started any more."""
    made = machine(64, 0, SHUTDOWN="no")
    made.until(lambda: made.state() == "failed")

    time.sleep(2)

    assert made.calls("run") == 1
    assert not made.off()


@pytest.mark.parametrize("shutdown", ["yes", "no"])
def test_other_failures_are_forgiven_three_times(shutdown: str, machine: Callable[..., Machine]) -> None:
    """Four starts in all; requests to stop between them count nothing, in whatever number."""
    made = machine(1, 75, 75, 137, 75, 75, 1, 75, 75, 75, 1, 0, SHUTDOWN=shutdown)
    made.until(made.off if shutdown == "yes" else lambda: made.state() == "failed")

    time.sleep(2)

    assert made.calls("run") == 11
    assert "no more failures are forgiven" in made.said()
    assert made.off() == (shutdown == "yes")


def test_a_start_that_does_not_come_as_far_as_docker_is_a_failure(machine: Callable[..., Machine]) -> None:
    """Here the folder of the cache cannot be made."""
    made = machine(CACHE="/proc/none")

    made.until(made.off)

    assert made.calls("rm") == 8  # before and after each of four starts
    assert made.calls("run") == 0


def test_the_count_outlives_a_reboot(machine: Callable[..., Machine]) -> None:
    """A machine that somebody turns on again after it gave up tries once, not four times."""
    made = machine(1, 1, 1, 1, "work 0")
    made.until(made.off)
    made.boot()
    made.until(lambda: made.calls("working") == 1)

    made.run("sh", "-c", "systemctl kill --signal=KILL finetune.service")
    made.until(made.off)

    assert made.calls("run") == 5


@pytest.mark.parametrize(
    "spoilt", [f"mkdir {FAILURES}", f"ln -s /nowhere/at/all {FAILURES}", f"ln -s /dev/full {FAILURES}"]
)
def test_what_cannot_be_counted_is_not_repeated(spoilt: str, machine: Callable[..., Machine]) -> None:
    """A counter that is no file, or cannot be written, ends with the first failure."""
    made = machine("work 0")
    made.until(lambda: made.calls("working") == 1)
    made.run("sh", "-c", spoilt)
    made.run("sh", "-c", "echo 1 >/told/next")

    made.run("systemctl", "kill", UNIT)
    made.until(made.off)

    assert made.calls("run") == 2
    assert "no more failures are forgiven" in made.said()


def test_a_person_who_stops_the_job_is_obeyed(machine: Callable[..., Machine]) -> None:
    """The job has its time to save, is not started again, and the machine stays on."""
    made = machine("work 5", 0)
    made.until(lambda: made.calls("working") == 1)

    made.run("systemctl", "stop", UNIT)
    time.sleep(2)

    assert made.calls("saved") == 1
    assert made.calls("run") == 1
    assert made.state() == "inactive"
    assert not made.off()
    assert "TimeoutStopUSec=2min" in made.run("systemctl", "show", UNIT)


@pytest.mark.parametrize("ending", ["600", "0 0", "0 64", "0 1"])
def test_whatever_ends_a_job_that_a_person_stops_has_no_consequence(
    ending: str, machine: Callable[..., Machine]
) -> None:
    """Be it killed because its time is over, or done in the same moment."""
    made = machine(f"work {ending}", 0)
    made.until(lambda: made.calls("working") == 1)
    made.run("mkdir", "-p", "/run/systemd/system/finetune.service.d")
    made.run("tee", "/run/systemd/system/finetune.service.d/stop.conf", told="[Service]\nTimeoutStopSec=1\n")
    made.run("systemctl", "daemon-reload")

    made.run("systemctl", "stop", UNIT)
    time.sleep(2)

    assert made.calls("run") == 1
    assert made.calls("rm") == 2  # the second one of the container that docker's client, when killed, leaves behind
    assert not made.off()
    assert "No such file" in made.run("ls", FAILURES, check=False)


def test_a_machine_that_is_turned_off_goes_on_with_the_next_boot(machine: Callable[..., Machine]) -> None:
    """As when a spot machine is stopped and started: the job saves first, and is started by the boot."""
    made = machine("work 3", "work 0")
    made.until(lambda: made.calls("working") == 1)

    made.run("systemctl", "poweroff", check=False)
    made.until(made.off)

    assert (made.calls("saved"), made.calls("run")) == (1, 1)
    made.boot()
    made.until(lambda: made.calls("working") == 2)
    assert "No such file" in made.run("ls", FAILURES, check=False)


def test_a_command_runs_before_the_machine_goes_off(machine: Callable[..., Machine]) -> None:
    """AT_END, for what a shutdown does not end; that it fails keeps no machine on."""
    made = machine(0, AT_END="echo the end >>/told/calls; false")

    made.until(made.off)

    assert made.calls("end") == 1
    assert "AT_END failed" in made.said()


def test_a_command_that_hangs_keeps_no_machine_on(machine: Callable[..., Machine]) -> None:
    """It has a minute (here two seconds), which is less than systemd gives the script."""
    made = machine("work 0", AT_END="sleep 1000")
    made.until(lambda: made.calls("working") == 1)
    made.run("sed", "-i", "s/--kill-after=5 60/--kill-after=5 2/", "/usr/local/lib/finetune/again.sh")

    made.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT, check=False)
    made.until(made.off)

    assert "AT_END failed" in made.said()


def test_a_run_that_is_done_is_not_repeated_when_nobody_counts(machine: Callable[..., Machine]) -> None:
    """Without again.sh the machine stays on, but the job is not started for ever."""
    made = machine("work 0", 0, 0)
    made.until(lambda: made.calls("working") == 1)

    made.run("rm", "/usr/local/lib/finetune/again.sh")
    made.run("systemctl", "kill", UNIT)
    made.until(lambda: made.state() == "failed")
    time.sleep(2)

    assert made.calls("run") == 2


def test_the_job_writes_into_the_journal(machine: Callable[..., Machine]) -> None:
    """And its command line names the image and the config of /etc/finetune."""
    made = machine("work 0", IMAGE="another:1")
    made.until(lambda: made.calls("working") == 1)

    words = made.run("journalctl", "--unit", UNIT, "--output=cat")

    assert "another:1 run /etc/finetune/run.yaml --set checkpoint.grace_seconds=110" in words
    assert "10001 0 770" in made.run("stat", "--format=%u %g %a", "/var/cache/finetune")
    assert "600" in made.run("stat", "--format=%a", "/etc/finetune/env")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device of 64 MB; its bytes are in `tmp_path`/disk."""
    (tmp_path / "disk").write_bytes(bytes(64 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False
    )
    need("loop devices (root)", made.returncode == 0 or None)
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.parametrize("found", ["", "mkfs.ext4 -q", "sfdisk -q"])
def test_a_local_disk_becomes_the_cache_if_it_is_nobodys(found: str, disk: str, tmp_path: Path) -> None:
    """A blank one is formatted once and mounted at each boot; one with a file system or partitions is left alone."""
    (tmp_path / "google-local-nvme-ssd-0").symlink_to(disk)
    if found:
        need(found, shutil.which(found.partition(" ")[0]))
        subprocess.run([*found.split(), disk], input=b"label: gpt\n", check=True)
    before = (tmp_path / "disk").read_bytes()
    data = yaml.safe_load((ROOT / "spot" / "user-data.yaml").read_text())
    boot = data["bootcmd"][0].replace("/dev/disk/by-id", str(tmp_path))
    there = "findmnt --noheadings --output SOURCE /var/cache/finetune"
    twice = f"{boot}\n{there} && echo kept >/var/cache/finetune/file && umount /var/cache/finetune\n{boot}\n{there}"

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /var/cache\n{twice}; cat /var/cache/finetune/file"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    if found:
        assert (tmp_path / "disk").read_bytes() == before
        assert disk not in done.stdout
    else:
        assert done.stdout.endswith(f"{disk}\nkept\n"), done.stdout + done.stderr
