"""The command line: what it answers at once, what it refuses, and with which status."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, S3, command, files

from job import errors, paths, preemption

Job = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "boto3", "pydantic", "rich", "pyarrow")


def imported(*arguments: object, environ: dict[str, str] | None = None) -> set[str]:
    """The top-level packages that a command imported."""
    outcome = subprocess.run(
        [sys.executable, "-X", "importtime", *command(*arguments)[1:]],
        capture_output=True, text=True, check=False, env=environ or dict(os.environ),
    )  # fmt: skip
    return {m[1].split(".")[0] for m in re.finditer(r"import time:.*\| +([\w.]+)$", outcome.stderr, re.MULTILINE)}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """It answers in a fraction of a second because of what it leaves out."""
    assert not imported(*arguments) & set(HEAVY)


def test_help_names_the_commands_and_the_statuses(job: Job) -> None:
    """The first thing that anybody reads."""
    outcome = job("--help")

    assert outcome.returncode == 0
    shown = " ".join(outcome.stdout.split())
    assert all(word in shown for word in ("run", "validate", "64 permanent", "75 stopped on request"))


def test_validating_offline_imports_no_torch(tiny_run: Callable[..., Path]) -> None:
    """A typo is told before torch is loaded."""
    assert not imported("validate", tiny_run(), "--offline") & {"torch", "transformers", "datasets", "boto3"}


def test_a_valid_config_is_printed_resolved(tiny_run: Callable[..., Path], job: Job) -> None:
    """With every default and override, as JSON for programs."""
    outcome = job("validate", tiny_run(), "--json", "--set", "train.learning_rate=1e-3")

    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["train"]["learning_rate"] == 1e-3
    assert json.loads(outcome.stdout)["lora"]["r"] == 16


def test_validating_leaves_nothing_behind(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """It writes a probe and removes it."""
    assert job("validate", tiny_run()).returncode == 0

    assert not [name for name in files(tmp_path / "run") if not name.startswith(".store/")]


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "none.yaml"], ["train", "x"], ["run", "x.yaml", "--sett", "a=b"], ["worker", "x"]]
)
def test_a_wrong_command_line_is_permanent(arguments: list[str], job: Job) -> None:
    """Starting it again would not help."""
    outcome = job(*arguments)

    assert outcome.returncode == 64
    assert "Traceback" not in outcome.stderr


# Python imports it before anything else: a finder that takes its time with the first package that a command needs.
SLOW = """
import pathlib, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            pathlib.Path("importing").touch()
            time.sleep(1)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("number", [*preemption.SIGNALS, preemption.STOP], ids=lambda number: number.name)
def test_a_request_that_comes_while_python_imports_is_heard(
    number: signal.Signals, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """On a cluster's file system that takes seconds, and a scheduler does not wait for it."""
    (tmp_path / "sitecustomize.py").write_text(SLOW, encoding="utf-8")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}

    with subprocess.Popen(
        command("run", tiny_run()), cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (tmp_path / "importing").exists():
            time.sleep(0.01)
        process.send_signal(number)
        said = process.stderr.read() if process.stderr else ""

    assert process.returncode == 75, said
    assert f"stopped by {number.name}" in said
    assert not (tmp_path / "run").exists()


def edit(**changes: dict[str, object]) -> Callable[[Path, S3, str], dict[str, dict[str, object]]]:
    return lambda _path, _s3, bucket: {
        section: {key: value.format(bucket=bucket) if isinstance(value, str) else value for key, value in keys.items()}
        for section, keys in changes.items()
    }


def bad_data(content: bytes) -> Callable[[Path, S3, str], dict[str, dict[str, object]]]:
    def write(path: Path, _s3: S3, _bucket: str) -> dict[str, dict[str, object]]:
        (path / "bad.jsonl").write_bytes(content)
        return {"data": {"train": [str(path / "bad.jsonl")]}}

    return write


BAD = {
    "typo": (edit(train={"learning_rat": 1}), {}, 64, "Did you mean train.learning_rate?"),
    "bucket": (edit(run={"url": "s3://no-such-bucket/run"}), {}, 64, "create the bucket or correct the URL"),
    "secret": (edit(run={"url": "s3://{bucket}/run"}), {"AWS_SECRET_ACCESS_KEY": "x"}, 64, "check the credentials"),
    "anonymous": (edit(run={"url": "s3://{bucket}/run"}), {"AWS_ACCESS_KEY_ID": ""}, 64, "no AWS credentials found"),
    "endpoint": (edit(run={"url": "s3://{bucket}/run"}), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 1, "cannot reach"),
    "base": (edit(model={"base": "s3://{bucket}/nothing"}), {}, 64, "holds no files"),
    "data": (edit(data={"train": ["/no/such/train.jsonl"]}), {}, 64, "train.jsonl does not exist"),
    "empty": (bad_data(b""), {}, 64, "there is nothing to train on"),
    "broken": (bad_data(b'{"instruction": "x",\n'), {}, 64, "bad.jsonl:1: broken JSON"),
    "latin-1": (bad_data("café".encode("latin-1")), {}, 64, "bad.jsonl:1: not UTF-8"),
    "strategy": (edit(distributed={"strategy": "zero2"}), {}, 64, "spreads the optimizer's state over the GPUs"),
    "targets": (edit(lora={"targets": ["c_attn"]}), {}, 64, "lora.targets: c_attn matches no linear layer"),
    "rate": (edit(lora={"alpha": 10**38}), {}, 64, "Lower train.learning_rate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_message_and_the_right_status(
    name: str, tiny_run: Callable[..., Path], job: Job, s3: S3, bucket: str, tmp_path: Path
) -> None:
    """No traceback, a status that says whether to try again, and nothing half-written that a later run would trust."""
    change, environ, status, told = BAD[name]
    config = tiny_run(**change(tmp_path, s3, bucket))
    merged = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **environ}

    outcome = job("run", config, environ={k: v for k, v in merged.items() if v})

    assert outcome.returncode == status, outcome.stderr
    assert told in outcome.stderr
    assert "Traceback" not in outcome.stderr
    made = {key.removeprefix("run/") for key in s3.keys(bucket, "run/")} | files(tmp_path / "run")
    assert not {m for m in made if m.startswith(("adapter/", "merged/", "report/", "done.json", "checkpoints/"))}
    assert s3.environ["AWS_SECRET_ACCESS_KEY"] not in outcome.stderr + "".join(
        p.read_text() for p in (tmp_path / "cache").rglob("*.jsonl")
    )


def test_the_traceback_is_for_those_who_ask(tiny_run: Callable[..., Path], job: Job) -> None:
    """--debug shows where it happened."""
    outcome = job("run", tiny_run(data={"train": ["/no/such/train.jsonl"]}), "--debug")

    assert outcome.returncode == 64
    assert "Traceback" in outcome.stderr


def test_a_full_store_loses_nothing(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """Writing fails in the middle; the message says where the disk is full, and the same run goes on elsewhere."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        outcome = job("run", tiny_run(run={"url": f"{small}/run"}))
        left = files(small / "run")
    finally:
        subprocess.run(["umount", str(small)], check=True)

    assert outcome.returncode == 1, outcome.stderr
    assert "no space left" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not [name for name in left if name.endswith(("manifest.json", ".part", "done.json"))]


def test_json_output_is_json(tiny_run: Callable[..., Path], job: Job) -> None:
    """One object per line, with the status at the end, also from the training process."""
    outcome = job("run", tiny_run(lora={"targets": ["c_attn"]}), "--json")

    lines = [json.loads(line) for line in outcome.stderr.splitlines()]
    assert lines[-1]["event"] == "run.end"
    assert lines[-1]["status"] == 64
    assert "lora.targets" in lines[-2]["message"]


def test_the_attempt_is_kept_with_its_reason(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """What happened can be read in the store when the machine is gone."""
    job("run", tiny_run(lora={"targets": ["c_attn"]}))

    events = [json.loads(line) for line in (tmp_path / "run" / "attempts" / "1.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "run.end"
    assert "lora.targets" in json.dumps(events)


@pytest.mark.parametrize("verb", ["run", "validate"])
def test_another_users_cache_is_not_trusted(verb: str, tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """Who made it decides which weights are trained, even root's."""
    if os.geteuid():
        pytest.skip("needs root to make another user's folder")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, -1)

    outcome = job(verb, tiny_run())

    assert outcome.returncode == 64, outcome.stderr
    assert "belongs to user 12345, and this is user 0: set run.cache" in outcome.stderr
    assert not list((tmp_path / "cache").iterdir())
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_disk_that_gives_files_an_owner_of_its_own_is_none_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """As EFS does, and NFS with all_squash: what we make there belongs to the same stranger."""
    if os.geteuid():
        pytest.skip("needs root to be another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, 12345, -1)
        cache = paths.Cache.of(Path(folder), "file:///run")
        with pytest.raises(errors.ConfigError, match="belongs to user 12345"):
            cache.check()
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        os.seteuid(12345)  # who makes files there becomes this one
        try:
            cache.check()
            assert not list(Path(folder).iterdir())
        finally:
            os.seteuid(0)


def test_a_cache_that_everybody_may_write_is_said(tmp_path: Path, said: Callable[[], str]) -> None:
    """Some disks show every folder so: it is a warning."""
    tmp_path.chmod(0o777)

    paths.Cache.of(tmp_path, "file:///run").check()

    assert f"everybody on this machine may write into the cache {tmp_path}" in said()


def test_a_new_cache_is_its_users_alone(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """On a machine with other users nobody else puts weights there."""
    job("run", tiny_run(lora={"targets": ["c_attn"]}))

    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_finished_run_answers_without_torch(tiny_run: Callable[..., Path], tmp_path: Path, job: Job) -> None:
    """In less than two seconds, and it is not believed when a result was touched."""
    config = tiny_run(train={"max_steps": 2})
    assert job("run", config).returncode == 0

    started = time.monotonic()
    again = job("run", config)

    assert time.monotonic() - started < 2
    assert again.returncode == 0
    assert "done already" in again.stderr
    assert not imported("run", config) & {"torch", "transformers", "datasets"}
    (tmp_path / "run" / "merged" / "model.safetensors").unlink()
    third = job("run", config)
    assert "merged/ is no longer what done.json says" in third.stderr
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()


def test_a_result_is_not_made_under_another_config(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """The difference is told, and nothing that was there is touched."""
    config = tiny_run(train={"max_steps": 2})
    assert job("run", config).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}

    outcome = job("run", config, "--set", "train.max_steps=3")

    assert outcome.returncode == 64
    assert "train.max_steps: 2 there, 3 here" in outcome.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_the_job_starts_from_any_directory(tmp_path: Path) -> None:
    """It finds itself."""
    outcome = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "--version"], cwd=tmp_path, capture_output=True, check=False
    )

    assert outcome.returncode == 0
