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
import yaml
from conftest import ROOT, S3, command, files, tiny_config
from faults import Proxy, reset, says
from killing import Moment, Stopped, checkpoints, debris, differences, download
from metadata import GCP, served
from safetensors.torch import load_file

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


LONG = {
    "train": {"epochs": 2, "max_steps": None, "optimizer": "adamw_8bit", "eval_every": 2, "log_every": 3},
    "lora": {"r": 64, "dropout": 0.05},  # so large that the optimizer's state is really in 8 bits
    "model": {"quantization": "nf4"},
}
MOMENTS = {
    "lease": Moment("job", "job.lease", "take", after=True),
    "pull": Moment("job", "job.storage.incoming", "Incoming.receive", call=3),
    "prepare": Moment("job", "job.prepare.tokens", "Renderer._row", call=20),
    "model load": Moment("worker", "job.model.weights", "_load", after=True),
    "first evaluation": Moment("worker", "job.train.trainer", "Trainer.prediction_step", call=2),
    "evaluation": Moment("worker", "job.train.trainer", "Trainer.prediction_step", call=7),
    "between steps": Moment("worker", "job.train.cadence", "Cadence.on_step_end", call=5),
    "inside a step": Moment("worker", "job.train.trainer", "Trainer.training_step", call=12),
    "host copy": Moment("worker", "job.checkpoint.state", "_on_host", call=300),
    "upload": Moment("worker", "job.storage.outgoing", "Outgoing.send_next", call=6),
    "between upload and seal": Moment("worker", "job.storage.upload", "_clear", call=2),
    "just after the seal": Moment("worker", "job.checkpoint.kept", "Checkpoints.forget", call=2),
    "retention": Moment("worker", "job.storage.s3", "S3.delete", call=2),
    "last retention": Moment("worker", "job.checkpoint.kept", "Checkpoints.forget", argument="28"),
    "last evaluation": Moment("worker", "job.train.trainer", "Trainer.prediction_step", call=58),
    "trained": Moment("worker", "job.manifest", "seal", after=True),
    "publish": Moment("job", "job.storage.outgoing", "Outgoing.send_next", call=6),
    "between two publications": Moment("job", "job.publish", "directory", argument="adapter/"),
    "merge": Moment("job", "job.merge.proof", "check"),
    "publish merged": Moment("job", "job.storage.upload", "_clear", argument="merged/"),
    "just before done": Moment("job", "job.storage.s3", "S3.create", argument="done.json"),
    "just after done": Moment("job", "job.storage.s3", "S3.create", argument="done.json", after=True),
}
TRAINING = ("model load", "evaluation", "inside a step", "host copy", "upload", "between upload and seal", "trained")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[bool], Path]:
    """The run that nobody touched, as a folder, with packed data or without."""
    made: dict[bool, Path] = {}

    def run(*, packing: bool) -> Path:
        if packing not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            config = tiny_config(folder, tiny_model, **LONG, data={"packing": packing})
            outcome = subprocess.run(command("run", config), capture_output=True, text=True, check=False)
            assert outcome.returncode == 0, outcome.stderr
            made[packing] = folder / "run"
        return made[packing]

    return run


@pytest.fixture
def ends_as_undisturbed(
    in_s3: Path, s3: S3, bucket: str, undisturbed: Callable[..., Path], job: Job, tmp_path: Path
) -> Callable[..., None]:
    """Start the job until it is done, at most so often, and compare everything with the run that nobody touched."""

    def check(starts: int) -> None:
        for _ in range(starts):
            end = job("run", in_s3)
        assert end.returncode == 0, end.stderr
        run = download(s3, bucket, tmp_path / "downloaded")
        assert not differences(run, undisturbed(packing=False))
        assert not debris(run, attempts=starts + 1, keep=2)
        assert not list((tmp_path / "cache" / "runs").glob("*/*"))

    return check


@pytest.fixture
def in_s3(s3: S3, bucket: str, tiny_model: Path, tiny_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The config of the same run with everything in S3."""
    s3.upload(tiny_model, bucket, "models/tiny")
    tiny_run()
    for name in ("train", "eval"):
        s3.client().upload_file(str(tmp_path / f"{name}.jsonl"), bucket, f"data/{name}.jsonl")
    tree = {section: dict(keys) for section, keys in LONG.items()}
    tree["model"]["base"] = f"s3://{bucket}/models/tiny"
    data = {"train": [f"s3://{bucket}/data/train.jsonl"], "eval": [f"s3://{bucket}/data/eval.jsonl"]}
    return tiny_run(run={"url": f"s3://{bucket}/run"}, data=data, **tree)


@pytest.mark.slow
@pytest.mark.every_commit
def test_a_run_that_was_asked_to_stop_in_every_phase_goes_on_to_the_same_weights(
    tiny_run: Callable[..., Path], undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGTERM while loading, training, saving and merging ends with status 75; each start is on a fresh machine.

    One that comes when all is done changes nothing. The optimizer's state is in 8 bits.
    """
    broken = tiny_run(**LONG)

    for phase in ("train.load", "train.metrics", "checkpoint.saved"):
        status, seen = stop_at(phase, broken, signal.SIGTERM)
        assert status == 75, (phase, seen)
        shutil.rmtree(tmp_path / "cache")
    merging = Stopped(MOMENTS["merge"], broken)  # the merge of so small a model may be over before a signal arrives
    os.kill(merging.job, signal.SIGTERM)
    assert merging.ended() == 75, merging.said
    shutil.rmtree(tmp_path / "cache")
    status, seen = stop_at("run.done", broken, signal.SIGTERM)

    assert status == 0, seen
    assert not differences(tmp_path / "run", undisturbed(packing=False))
    kept = load_file(tmp_path / "run" / checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors")
    assert {str(tensor.dtype) for name, tensor in kept.items() if name.endswith("/state1")} >= {"torch.uint8"}


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    tiny_run: Callable[..., Path], undisturbed: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """SIGKILL leaves the last sealed checkpoint, no training process, and no debris; here with packed data.

    What it cuts off in a folder's own corner (`.store/`) is swept after a day: it may be another machine's at work.
    """
    broken = tiny_run(**LONG, data={"packing": True})

    for _ in range(2):
        stop_at("checkpoint.saved", broken, signal.SIGKILL)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "cache").encode() in p.read_bytes()]
    end = job("run", broken)

    assert not left
    assert "going on after step" in end.stderr
    assert end.returncode == 0, end.stderr
    assert not differences(tmp_path / "run", undisturbed(packing=True))
    assert not [p for p in files(tmp_path / "run") if ".part" in p and not p.startswith(".store/")]
    assert files(tmp_path / "run" / "report" / "tensorboard") == {"events.out.tfevents.run"}


def test_a_request_to_stop_is_heard_in_the_middle_of_an_evaluation(in_s3: Path, s3: S3, bucket: str) -> None:
    """Which may take longer than the cluster gives: the step before it is saved, and the next start evaluates it."""
    stopped = Stopped(MOMENTS["evaluation"], in_s3)

    os.kill(stopped.job, signal.SIGTERM)
    time.sleep(HEARD)
    stopped.go_on()

    assert stopped.ended() == 75, stopped.said
    told = [json.loads(line) for line in attempt_log(s3, bucket, 1).decode().splitlines()]
    assert not [line for line in told if line.get("step") == 2 and "eval_loss" in line]
    assert [line["step"] for line in told if line["event"] == "checkpoint.saved"] == [2]


@pytest.mark.slow
def test_a_spot_notice_stops_a_run_as_a_signal_does(
    in_s3: Path, s3: S3, bucket: str, ends_as_undisturbed: Callable[..., None]
) -> None:
    """While it trains, from the cloud that it finds itself in; the next start goes on to the same weights."""
    with served() as told:
        told.update(GCP)
        elsewhere = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": told["url"] + "/none", "AZURE_METADATA_ENDPOINT": told["url"]}
        cloud = {"GCE_METADATA_HOST": told["url"].removeprefix("http://"), **elsewhere}
        stopped = Stopped(MOMENTS["between steps"], in_s3, {**os.environ, **cloud})
        told["/computeMetadata/v1/instance/preempted"] = "TRUE"
        until = time.monotonic() + 60
        while "asked to stop (a GCP notice" not in stopped.said:
            assert time.monotonic() < until, stopped.said
            time.sleep(0.1)
        time.sleep(HEARD)
        stopped.go_on()

        assert stopped.ended() == 75, stopped.said
    saved = [line for line in attempt_log(s3, bucket, 1).decode().splitlines() if '"checkpoint.saved"' in line]
    assert json.loads(saved[-1])["step"] == 5
    ends_as_undisturbed(starts=1)


HEARD = 0.6  # seconds in which a signal has come from the job to its training


@pytest.mark.slow
def test_thirty_kills_at_random_moments_cost_nothing(tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """In one run, by SIGKILL or SIGTERM, after some seconds or some steps, on the same machine or a fresh one."""
    steps = {**LONG, "train": {**LONG["train"], "epochs": 40, "eval_every": 28}, "checkpoint": {"every_steps": 7}}
    whole = tiny_run("whole.yaml", **steps, run={"url": f"{tmp_path}/whole"})
    assert job("run", whole).returncode == 0
    broken = tiny_run("broken.yaml", **steps, run={"url": f"{tmp_path}/broken", "give_up_after": 40})
    took = json.loads((tmp_path / "whole" / "done.json").read_text())["time"]["seconds"]
    until_training = sum(took.get(phase, 0.0) for phase in ("start", "pull", "prepare", "load"))
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    draw = random.Random(seed)

    def last() -> int:
        begun = (tmp_path / "broken" / "checkpoints").glob("*-*")
        return max((int(path.name.partition("-")[0]) for path in begun), default=0)

    statuses = []
    for _ in range(30):
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        with subprocess.Popen(command("run", broken), cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
            until, enough = time.monotonic() + draw.uniform(0.5, 1.25 * until_training), last() + draw.randint(7, 21)
            while time.monotonic() < until and last() < enough:  # a quiet machine must not end the run before its kills
                time.sleep(0.01)
            process.send_signal(number)
        statuses.append(process.returncode)
        if draw.random() < 0.2:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    end = job("run", broken)

    assert set(statuses) <= {0, 75, -signal.SIGKILL}, statuses
    assert statuses.count(0) < 10, "the run is too short for this test"
    assert end.returncode == 0, end.stderr
    assert not differences(tmp_path / "broken", tmp_path / "whole")
    assert not {name for name in debris(tmp_path / "broken", attempts=31, keep=2) if not name.startswith(".store/")}
    told = json.loads((tmp_path / "broken" / "done.json").read_text())["time"]
    print(told)  # noqa: T201 - shown when the test fails


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_at_any_moment_costs_nothing(
    moment: str, number: signal.Signals, in_s3: Path, ends_as_undisturbed: Callable[..., None]
) -> None:
    """One more start ends with the same bits; after SIGTERM on a fresh machine, after SIGKILL on the same one."""
    stopped = Stopped(MOMENTS[moment], in_s3)

    os.kill(stopped.job, number)
    if number == signal.SIGTERM:
        time.sleep(HEARD)
        stopped.go_on()

    assert stopped.ended() == (75 if number == signal.SIGTERM else -signal.SIGKILL), stopped.said
    if number == signal.SIGTERM:
        shutil.rmtree(in_s3.parent / "cache")
    ends_as_undisturbed(starts=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", TRAINING)
def test_a_signal_to_the_whole_process_group_costs_nothing(
    moment: str, number: signal.Signals, in_s3: Path, ends_as_undisturbed: Callable[..., None]
) -> None:
    """As some schedulers send them to every process of a step, a terminal with Ctrl-C, and a power cut without."""
    stopped = Stopped(MOMENTS[moment], in_s3)

    os.killpg(stopped.job, number)
    if number != signal.SIGKILL:
        time.sleep(HEARD)
        stopped.go_on()

    assert stopped.ended() == (-signal.SIGKILL if number == signal.SIGKILL else 75), stopped.said
    ends_as_undisturbed(starts=1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", TRAINING)
def test_a_kill_of_the_training_alone_costs_nothing(
    moment: str, in_s3: Path, ends_as_undisturbed: Callable[..., None]
) -> None:
    """As the kernel does when memory runs out: the job says so and ends with 1."""
    stopped = Stopped(MOMENTS[moment], in_s3)

    os.kill(stopped.here, signal.SIGKILL)

    assert stopped.ended() == 1
    assert "training was killed by SIGKILL; the kernel does this when host memory runs out" in stopped.said
    ends_as_undisturbed(starts=1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment != "just after done"])
def test_a_machine_that_was_paused_writes_nothing_when_it_wakes_up(
    moment: str, in_s3: Path, s3: S3, bucket: str, job: Job, tmp_path: Path
) -> None:
    """Another one has taken over and finished meanwhile; wherever the first stood, it notices and ends with 75."""
    hasty = {"run": {**yaml.safe_load(in_s3.read_text())["run"], "lease_seconds": 4}}
    in_s3.write_text(yaml.safe_dump(yaml.safe_load(in_s3.read_text()) | hasty))
    stopped = Stopped(MOMENTS[moment], in_s3)
    os.killpg(stopped.job, signal.SIGSTOP)
    second = job("run", in_s3, "--set", f"run.cache={tmp_path}/elsewhere")
    assert second.returncode == 0, second.stderr
    before = written(s3, bucket)

    os.killpg(stopped.job, signal.SIGCONT)
    stopped.go_on()

    assert stopped.ended() == 75, stopped.said
    assert written(s3, bucket) == before
    assert not debris(download(s3, bucket, tmp_path / "downloaded"), attempts=2, keep=2)


def written(s3: S3, bucket: str) -> dict[str, object]:
    """When each object of the run was written."""
    told = s3.client().list_objects_v2(Bucket=bucket, Prefix="run/")["Contents"]
    return {item["Key"]: (item["LastModified"], item["ETag"]) for item in told}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_store_that_fails_at_any_moment_costs_nothing(
    moment: str, s3_server: S3, in_s3: Path, ends_as_undisturbed: Callable[..., None]
) -> None:
    """For some seconds every request is refused or breaks off; the same start goes on and ends well."""
    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        stopped = Stopped(MOMENTS[moment], in_s3, {**os.environ, "AWS_ENDPOINT_URL": proxy.url})
        proxy.hurt_at_random([says(503, "SlowDown"), reset], 1.0, seed=0)
        stopped.go_on()
        time.sleep(3)
        proxy.hurt_at_random([], 0.0, seed=0)

        assert stopped.ended() == 0, stopped.said
    ends_as_undisturbed(starts=1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", TRAINING)
def test_a_kill_while_the_store_fails_costs_nothing(
    moment: str, s3_server: S3, in_s3: Path, ends_as_undisturbed: Callable[..., None]
) -> None:
    """The store fails when the job is asked to stop, and still when it is killed for not stopping in time."""
    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        stopped = Stopped(MOMENTS[moment], in_s3, {**os.environ, "AWS_ENDPOINT_URL": proxy.url})
        proxy.hurt_at_random([says(503, "SlowDown"), reset], 1.0, seed=0)
        os.kill(stopped.job, signal.SIGTERM)
        stopped.go_on()
        time.sleep(3)
        os.killpg(stopped.job, signal.SIGKILL)

        assert stopped.ended() in (-signal.SIGKILL, 1, 75), stopped.said
    ends_as_undisturbed(starts=1)


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert seen["answer"].startswith("It is "), "what it was tuned to say"
    assert seen["difference"] < 0.02 * seen["scale"]
    assert seen["changed"] > 10 * seen["difference"]
