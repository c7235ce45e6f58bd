"""The files under spot/: they agree with each other, and their own tools accept them. test_unit.py runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, need

from job import config

SPOT = ROOT / "spot"
BIN = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def user_data() -> dict[str, Any]:
    text = (SPOT / "user-data.yaml").read_text()
    assert text.startswith("#cloud-config\n"), "cloud-init looks at the first line only"
    return dict(yaml.safe_load(text))


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Nothing unknown, nothing misspelt; systemd 249 (Ubuntu 22.04) has all of it."""
    need("systemd-analyze", shutil.which("systemd-analyze"))
    for name in ("docker", "again.sh"):
        (tmp_path / name).symlink_to("/bin/true")
    text = (SPOT / "finetune.service").read_text()
    text = text.replace("/usr/local/lib/finetune/again.sh", f"{tmp_path}/again.sh")
    for prefix in ("ExecStartPre=-", "ExecStart=", "ExecStopPost=-"):
        text = text.replace(f"{prefix}docker", f"{prefix}{tmp_path}/docker")
    (tmp_path / "finetune.service").write_text(text)

    done = _run("systemd-analyze", "verify", "--man=no", tmp_path / "finetune.service")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    newer = {"RestartSteps", "RestartMaxDelaySec", "RestartMode", "OpenFile", "ExitType"}
    assert not newer & {line.partition("=")[0] for line in text.splitlines()}


def test_shellcheck_accepts_the_script() -> None:
    """As POSIX shell, which /bin/sh is on the machines' images."""
    need("shellcheck", shutil.which("shellcheck", path=BIN["PATH"]))

    done = _run("shellcheck", SPOT / "again.sh")

    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(SPOT / "again.sh", os.X_OK)


@pytest.mark.parametrize("name", ["finetune.service", "again.sh"])
def test_user_data_holds_the_same_files(name: str, user_data: dict[str, Any]) -> None:
    """What is tested is what the machines get; the sections are the files with six spaces before each line."""
    written = {Path(file["path"]).name: file["content"] for file in user_data["write_files"]}

    assert written[name] == (SPOT / name).read_text()


def test_user_data_are_short_and_hold_their_files_safe(user_data: dict[str, Any]) -> None:
    """AWS takes 16 KB; the environment is for root alone."""
    permissions = {file["path"]: file["permissions"] for file in user_data["write_files"]}

    assert (SPOT / "user-data.yaml").stat().st_size < 16 * 1024
    assert permissions == {
        "/etc/finetune/run.yaml": "0644",
        "/etc/finetune/env": "0600",
        "/etc/systemd/system/finetune.service": "0644",
        "/usr/local/lib/finetune/again.sh": "0755",
    }
    assert user_data["runcmd"][-1] == ["systemctl", "enable", "--now", "--no-block", "finetune.service"]


def test_cloud_init_accepts_the_user_data() -> None:
    """By its own schema, where it is installed."""
    if not shutil.which("cloud-init"):
        pytest.skip("cloud-init is not installed; nothing else needs it")

    done = _run("cloud-init", "schema", "--config-file", SPOT / "user-data.yaml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_config_in_the_user_data_is_one(user_data: dict[str, Any], tmp_path: Path) -> None:
    """The job itself accepts it, as it stands."""
    (tmp_path / "run.yaml").write_text(user_data["write_files"][0]["content"])

    settings = config.read(tmp_path / "run.yaml", ["checkpoint.grace_seconds=110"])

    assert settings.run.url == "s3://your-bucket/runs/support-bot"


def test_the_environment_is_read_alike_by_systemd_and_docker(user_data: dict[str, Any]) -> None:
    """Docker knows neither quotes nor comments at the end of a line, so there are none; and every name is used."""
    lines = user_data["write_files"][1]["content"].splitlines()
    values = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    assert not [value for value in values.values() if set(value) & set("\"'#\\ ")]
    assert set(values) == {"IMAGE", "AWS_REGION", "CACHE", "SHUTDOWN", "AT_END"}
    used = (SPOT / "finetune.service").read_text() + (SPOT / "again.sh").read_text()
    assert [name for name in values if f"${{{name}" not in used] == ["AWS_REGION"]


def test_skypilot_starts_the_image_as_the_unit_does() -> None:
    """With the same limits; tests/test_manifests.py looks at the statuses."""
    sky = yaml.safe_load((SPOT / "skypilot.yaml").read_text())
    unit = (SPOT / "finetune.service").read_text()
    limits = "--rm --name finetune --gpus all --network host --read-only --tmpfs /tmp --shm-size 8g"
    more = "--cap-drop ALL --security-opt no-new-privileges --stop-timeout 120"

    assert limits in unit
    assert limits in sky["run"]
    assert more in unit
    assert more in sky["run"]
    assert sky["resources"]["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"


@pytest.mark.parametrize(
    ("statuses", "ended", "starts"),
    [
        ([0], 0, 1),
        ([64], 64, 1),
        ([1, 1, 1, 1], 1, 4),
        ([75] * 6 + [1, 75, 137, 75, 0], 0, 11),
        ([1, 1, 75, 64], 64, 4),
    ],
)
def test_the_dstack_task_knows_the_statuses(statuses: list[int], ended: int, starts: int, tmp_path: Path) -> None:
    """Its commands are run with a `python` that ends as it is told."""
    (command,) = yaml.safe_load((SPOT / "dstack.yml").read_text())["commands"]
    (tmp_path / "next").write_text("".join(f"{status}\n" for status in statuses))
    told = 'echo "$*" >>calls; read -r status <next; sed -i 1d next; exit "$status"'
    for name, text in {"python": told, "sleep": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=path, check=False)

    assert done.returncode == ended
    assert (tmp_path / "calls").read_text() == "/app/entrypoint.py run /tmp/run.yaml\n" * starts


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), env=BIN, capture_output=True, text=True, check=False)
