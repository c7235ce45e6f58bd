"""The real things that the tests run against: an S3 server, a tiny model, the 135M model, and the job as a process."""

import fcntl
import functools
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import scheduler
import yaml
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError

from job.storage import patience

ROOT = Path(__file__).parent.parent
BEGUN_FIRST = ("test_readme", "test_story", "test_entrypoint", "test_hub")  # what takes longest
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [(f"What is {a} and {b}?", f"It is {a + b}.") for a in range(8) for b in range(8)]


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker is left alone with one in the end."""
    places = {name: place for place, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def need(what: str, present: object) -> None:
    """Skip on a laptop, fail in CI: there a missing component would hide what the tests are for."""
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is missing; requirements-dev.txt installs it")


@dataclass(frozen=True)
class S3:
    """A running S3 server with one set of credentials."""

    environ: dict[str, str]

    def client(self) -> BaseClient:
        return boto3.client(
            "s3",
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def keys(self, bucket: str, prefix: str = "") -> set[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {item["Key"] for page in pages for item in page.get("Contents", [])}

    def upload(self, directory: Path, bucket: str, prefix: str) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                self.client().upload_file(str(path), bucket, f"{prefix}/{path.relative_to(directory).as_posix()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need("the S3 server (weed)", weed)
    folder = tmp_path_factory.mktemp("s3")
    ports = {name: _free_port() for name in ("s3", "master", "volume", "filer", "admin")}
    secrets = {"AWS_ACCESS_KEY_ID": "TESTKEY", "AWS_SECRET_ACCESS_KEY": "planted-secret-1f7c"}
    command = [
        weed, f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **secrets}, stdout=log, stderr=log)
    server = S3({**secrets, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}", "AWS_REGION": "us-east-1"})
    try:
        _until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, with its credentials in this process's environment."""
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def cluster() -> Iterator[scheduler.Slurm]:
    """A Slurm of two nodes."""
    need(scheduler.WHAT, scheduler.possible() or None)
    with scheduler.slurm() as made:
        yield made


@pytest.fixture
def said() -> Iterator[Callable[[], str]]:
    """What the job's code says in this process, from now on."""
    stream, logger = io.StringIO(), logging.getLogger("job")
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream.getvalue
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience with a store in this process, so that a test of what it cannot survive ends soon."""
    for name in ("USUAL", "FIRST"):
        monkeypatch.setattr(patience, name, patience.Patience(tries=3, first=0.01))


@pytest.fixture
def bucket(s3: S3) -> Iterator[str]:
    """A new bucket of the test's own; the server keeps volumes for each, and not for hundreds."""
    name = f"t{time.time_ns()}-{os.getpid()}"
    s3.client().create_bucket(Bucket=name)
    yield name
    s3.client().delete_bucket(Bucket=name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a ChatML template, as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([f"{q} {a}" for q, a in QUESTIONS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smol_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once into .smoke as `make smoke` does."""
    with Path(__file__).open() as turn:  # of the workers that run tests side by side
        fcntl.flock(turn, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "smoke/fetch.py", ".smoke"], cwd=ROOT, check=True)
    return ROOT / ".smoke" / "SmolLM2-135M-Instruct"


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., Path]:
    """Write JSON lines to a file and return its path."""

    def write(name: str, rows: list[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Prepare files with the tiny model's tokenizer, or that of another `model`; returns the folder of the result."""
    from job import config, inputs, manifest, paths, prepare

    def run(
        *train: Path, evaluation: tuple[Path, ...] = (), model: Path = tiny_model, method: str = "sft",
        images: Path | None = None, **data: object,
    ) -> Path:  # fmt: skip
        tree = {
            "run": {"name": "t", "url": "file:///run"},
            "model": {"base": "file:///nowhere"},
            "data": {"train": ["file:///nowhere/x.jsonl"], **data},
            "train": {"method": method},
        }
        settings = config.check(tree, config.Places("test", {}))
        base = inputs.Base("file:///nowhere", model, manifest.of(model).digest)
        shown = inputs.Images(images.as_uri(), images, "any") if images else None
        splits = [
            [inputs.DataFile(p.as_uri(), p, manifest.sha256(p), images=shown) for p in split]
            for split in (train, evaluation)
        ]
        with ExitStack() as keep:
            return prepare.dataset(settings, base, *splits, paths.Cache(tmp_path / "cache", "run"), keep).path

    return run


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write the config of a run of seconds and return its path; keyword arguments replace whole sections' keys."""
    return functools.partial(tiny_config, tmp_path, tiny_model)


def tiny_config(folder: Path, model: Path, /, name: str = "run.yaml", **changes: dict[str, object]) -> Path:
    """The same for a `folder` and a `model` of one's own."""
    rows = [
        {"instruction": q, "output": a, "id": i, "source": "made", "lang": "en"} for i, (q, a) in enumerate(QUESTIONS)
    ]
    for split, part in {"train": rows[8:], "eval": rows[:8]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    tree: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "url": f"{folder}/run", "cache": f"{folder}/cache"},
        "model": {"base": str(model)},
        "data": {"train": [f"{folder}/train.jsonl"], "eval": [f"{folder}/eval.jsonl"], "max_length": 64},
        "train": {
            "max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "log_every": 2,
            "eval_every": 3,
        },
        "checkpoint": {"every_steps": 2, "keep": 2},
        "examine": {"minutes": 0},  # it takes as long as all the rest; tests/test_examine.py is about it
    }  # fmt: skip
    for section, keys in changes.items():
        tree.setdefault(section, {}).update(keys)
    path = folder / name
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run entrypoint.py as a process of its own and return its outcome."""

    def start(*arguments: object, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environ or dict(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def take_back(run: Path, step: int) -> None:
    """Make the finished `run` one that was stopped just before `step`, its last one, was safe."""
    for place in ("adapter", "merged", "report"):
        shutil.rmtree(run / place)
    shutil.rmtree(next((run / "checkpoints").glob(f"{step:08d}-*")))
    (run / "done.json").unlink()


def command(*arguments: object) -> list[str]:
    """The command line of the job."""
    return [sys.executable, str(ROOT / "entrypoint.py"), *map(str, arguments)]


def files(directory: Path) -> set[str]:
    """The names of all files below `directory`."""
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def _free_port() -> int:
    """A port that is free, as is the one 10000 above it, which the server uses for gRPC."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = int(a.getsockname()[1])
            try:
                b.bind(("127.0.0.1", port + 10000 if port < 55535 else port - 10000))
            except OSError:
                continue
            if port < 55535:
                return port


def _until_ready(server: S3) -> None:
    client = server.client()
    for _ in range(120):
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"1")
            client.get_object(Bucket="ready", Key="probe")
        except (ClientError, BotoCoreError):
            time.sleep(0.25)
        else:
            return
    raise AssertionError("the S3 server did not come up")
