"""The whole job, as its users start it: processes, a real S3 server, real models."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, S3, command, files

from job import manifest

Job = Callable[..., subprocess.CompletedProcess[str]]


def events(log: bytes) -> list[str]:
    return [json.loads(line)["event"] for line in log.decode().splitlines()]


def attempt_log(s3: S3, bucket: str, number: int) -> bytes:
    return s3.client().get_object(Bucket=bucket, Key=f"run/attempts/{number}.jsonl")["Body"].read()


def test_a_run_in_s3_goes_from_nothing_to_done_and_again_in_no_time(
    s3: S3, bucket: str, tiny_model: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Base model, data and results in S3; then with no cache, without done.json and merged/, and as a finished run."""
    s3.upload(tiny_model, bucket, "models/tiny")
    local = tiny_run()
    s3.client().upload_file(str(tmp_path / "train.jsonl"), bucket, "data/train.jsonl")
    s3.client().upload_file(str(tmp_path / "eval.jsonl"), bucket, "data/eval.jsonl")
    config = tiny_run(
        run={"url": f"s3://{bucket}/run"},
        model={"base": f"s3://{bucket}/models/tiny"},
        data={"train": [f"s3://{bucket}/data/train.jsonl"], "eval": [f"s3://{bucket}/data/eval.jsonl"]},
    )
    assert local == config

    first = job("run", config)

    assert first.returncode == 0, first.stderr
    made = s3.keys(bucket, "run/")
    assert {"run/config.json", "run/done.json", "run/attempts/1.jsonl"} < made
    assert {"run/adapter/manifest.json", "run/merged/manifest.json", "run/report/manifest.json"} < made
    assert {"pull.done", "prepare.done", "train.done", "merge.done"} < set(events(attempt_log(s3, bucket, 1)))

    shutil.rmtree(tmp_path / "cache")
    again = job("run", config)

    assert again.returncode == 0
    assert "done already" in again.stderr
    assert s3.keys(bucket, "run/") == made
    assert not (tmp_path / "cache").exists()

    weights = s3.client().get_object(Bucket=bucket, Key="run/merged/model.safetensors")["Body"].read()
    for key in ["run/done.json", *s3.keys(bucket, "run/merged/")]:
        s3.client().delete_object(Bucket=bucket, Key=key)
    third = job("run", config)

    assert third.returncode == 0, third.stderr
    assert s3.keys(bucket, "run/") == made | {"run/attempts/2.jsonl"}
    assert s3.client().get_object(Bucket=bucket, Key="run/merged/model.safetensors")["Body"].read() == weights
    done = set(events(attempt_log(s3, bucket, 2)))
    assert "merge.done" in done
    assert not done & {"prepare.done", "train.load", "train.done"}


LONG = {"max_steps": 20, "optimizer": "adamw_8bit", "eval_every": 1}  # more than one epoch of 14 steps


def test_a_run_that_was_asked_to_stop_in_every_phase_goes_on_to_the_same_weights(
    tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """SIGTERM while loading, training, saving and merging ends with status 75; each start is on a fresh machine.

    One that comes when all is done changes nothing.
    """
    whole = tiny_run("whole.yaml", train=LONG, run={"url": f"{tmp_path}/whole"})
    assert job("run", whole).returncode == 0
    broken = tiny_run("broken.yaml", train=LONG, run={"url": f"{tmp_path}/broken"})

    for phase in ("train.load", "train.metrics", "checkpoint.saved", "merge.start"):
        status, seen = stop_at(phase, broken, signal.SIGTERM)
        assert status == 75, (phase, seen)
        shutil.rmtree(tmp_path / "cache")
    status, seen = stop_at("run.done", broken, signal.SIGTERM)

    assert status == 0, seen
    assert same_results(tmp_path / "broken", tmp_path / "whole")


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """SIGKILL leaves the last sealed checkpoint, no training process, and no debris; here with packed data."""
    whole = tiny_run("whole.yaml", train=LONG, data={"packing": True}, run={"url": f"{tmp_path}/whole"})
    assert job("run", whole).returncode == 0
    broken = tiny_run("broken.yaml", train=LONG, data={"packing": True}, run={"url": f"{tmp_path}/broken"})

    for _ in range(2):
        stop_at("checkpoint.saved", broken, signal.SIGKILL)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "cache").encode() in p.read_bytes()]
    end = job("run", broken)

    assert not left
    assert "going on after step" in end.stderr
    assert end.returncode == 0, end.stderr
    assert same_results(tmp_path / "broken", tmp_path / "whole")
    assert not [p for p in files(tmp_path / "broken") if ".part" in p]


def test_a_restart_replaces_what_was_published_when_there_is_something_new(
    tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Stopped in the middle, the old results are whole; the next start goes on with the new run without being asked."""
    old = tiny_run("old.yaml", train={"max_steps": 2})
    assert job("run", old).returncode == 0
    run, adapter = tmp_path / "run", (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    new = tiny_run(train={"max_steps": 4})
    assert job("run", new).returncode == 64

    status, seen = stop_at("checkpoint.saved", new, signal.SIGKILL, "--restart")

    assert status == -signal.SIGKILL, seen
    assert manifest.sealed(run / "adapter") == manifest.of(run / "adapter")
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    end = job("run", new)
    assert end.returncode == 0, end.stderr
    assert "going on after step" in end.stderr
    assert json.loads((run / "done.json").read_text())["training"]["steps"] == 4
    assert job("run", old).returncode == 64


def test_of_two_starts_at_once_one_does_the_run(tiny_run: Callable[..., Path], tmp_path: Path) -> None:
    """The other says who does, asks to be started again, and leaves no trace."""
    config = tiny_run(run={"lease_seconds": 4.0})
    starts = [
        subprocess.Popen(
            command("run", config, "--set", f"run.cache={tmp_path}/cache{n}"), stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]

    told = {start.communicate()[1]: start.returncode for start in starts}

    assert sorted(told.values()) == [0, 75], told
    second = next(said for said, status in told.items() if status == 75)
    assert "is owned by attempt 1 (process " in second
    assert "Start this one again when that one has ended" in second
    assert {name for name in files(tmp_path / "run") if name.startswith("attempts/")} == {"attempts/1.jsonl"}


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """Ten starts that end after some seconds by SIGKILL or SIGTERM, wherever that is, then one that ends by itself."""
    whole = tiny_run("whole.yaml", train=LONG, run={"url": f"{tmp_path}/whole"})
    assert job("run", whole).returncode == 0
    broken = tiny_run("broken.yaml", train=LONG, run={"url": f"{tmp_path}/broken"})
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    draw = random.Random(seed)

    for _ in range(10):
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        with subprocess.Popen(command("run", broken), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
            time.sleep(draw.uniform(0.5, 20))
            process.send_signal(number)
        assert process.returncode in (0, 75, -signal.SIGKILL)
    end = job("run", broken)

    assert end.returncode == 0, end.stderr
    assert same_results(tmp_path / "broken", tmp_path / "whole")
    assert not [p for p in files(tmp_path / "broken") if ".part" in p and not p.startswith(".store/")]


def same_results(one: Path, other: Path) -> bool:
    """Whether two runs published the same weights, bit for bit."""
    names = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    same = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return same and evaluations(one) == evaluations(other)


def evaluations(run: Path) -> dict[int, float]:
    """The eval loss at every step, each measured once although a request to stop cuts evaluations off."""
    lines = [json.loads(line) for line in (run / "report" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def stop_at(event: str, config: Path, number: signal.Signals, *more: str) -> tuple[int, list[str]]:
    """Start the job, send it the signal when `event` is seen in its output, and return its status."""
    with subprocess.Popen(
        command("run", config, "--json", *more),
        cwd=config.parent,
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        seen = []
        assert process.stderr
        for line in process.stderr:
            if line.startswith("{"):
                seen.append(json.loads(line)["event"])
            if seen and seen[-1] == event:
                process.send_signal(number)
                event = "sent already"
        status = process.wait()
    assert event == "sent already", seen
    return status, seen


def test_the_published_model_answers_with_plain_libraries(
    smol_model: Path, s3: S3, bucket: str, job: Job, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """The real 135M model through S3: transformers loads merged/ and answers; adapter on base gives the same logits."""
    s3.upload(smol_model, bucket, "models/smol")
    config = tiny_run(
        run={"url": f"s3://{bucket}/run"},
        model={"base": f"s3://{bucket}/models/smol"},
        train={"max_steps": 4, "eval_every": 4, "learning_rate": 2e-3},
        checkpoint={"every_steps": 4},
    )

    outcome = job("run", config)

    assert outcome.returncode == 0, outcome.stderr
    for place in ("adapter", "merged"):
        for key in s3.keys(bucket, f"run/{place}/"):
            target = tmp_path / key
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.client().download_file(bucket, key, str(target))
    report = subprocess.run(
        [*command()[:1], str(ROOT / "tests" / "plain_check.py"), str(smol_model), str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    seen = json.loads(report.stdout.splitlines()[-1])
    assert "Paris" in seen["answer"]
    assert seen["difference"] < 0.02 * seen["scale"]
    assert seen["changed"] > 10 * seen["difference"]
