"""Reading a base model from the Hugging Face Hub, against a server that answers as the Hub does."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import ROOT, files

from job import manifest, storage

Job = Callable[..., subprocess.CompletedProcess[str]]
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """A repository of a model, org/tiny, at one commit, and one of data, org/data, of the files in `data`.

    `damaged` names a file whose bytes are flipped on the way; `hurts` are done to the next requests for that file.
    """

    folder: Path
    data: Path
    damaged = ""
    hurts: ClassVar[list[str]] = []
    listings = 0

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            type(self).listings += 1
            self._send(json.dumps(self._info(self.folder)).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/datasets/org/data"):
            self._send(json.dumps(self._info(self.data)).encode(), {"Content-Type": "application/json"})
        elif path.startswith((f"/org/tiny/resolve/{COMMIT}/", "/org/tiny/resolve/main/")):
            self._file(self.folder, path.rpartition("/")[2])
        elif path.startswith(f"/datasets/org/data/resolve/{COMMIT}/"):
            self._file(self.data, path.removeprefix(f"/datasets/org/data/resolve/{COMMIT}/"))
        else:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def _info(self, folder: Path) -> dict[str, object]:
        there = [self._sibling(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        return {"id": "org/any", "sha": COMMIT, "siblings": there}

    @staticmethod
    def _sibling(path: Path, folder: Path) -> dict[str, object]:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        entry: dict[str, object] = {"rfilename": str(path.relative_to(folder)), "size": len(data), "blobId": blob}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _file(self, folder: Path, name: str) -> None:
        data = bytearray((folder / name).read_bytes())
        hurt = self.hurts.pop(0) if name == self.damaged and self.hurts else "flipped"
        if name == self.damaged and hurt == "flipped":
            data[-1] ^= 1
        start, stop = re.findall(r"\d+", self.headers["Range"])
        piece = bytes(data[int(start) : int(stop) + 1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if name == self.damaged and hurt == "503":
            self._send(b"", {}, 503)
        elif name == self.damaged and hurt == "truncated":
            self._send(piece, headers, 206, whole=False)
        elif name == self.damaged and hurt == "trickle":
            self._send(piece, headers, 206, pause=0.05)
        else:
            self._send(piece, headers, 206)

    def _send(
        self,
        data: bytes,
        headers: dict[str, str],
        status: int = 200,
        *,
        whole: bool = True,
        pause: float = 0,
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if pause:
            self._trickle(data, pause)
        elif self.command == "GET":
            self.wfile.write(data if whole else data[: len(data) // 2])
        self.close_connection = not whole

    def _trickle(self, data: bytes, pause: float) -> None:
        """Send a byte at a time, until all are sent or the job goes away."""
        with contextlib.suppress(ConnectionError):
            for number in range(len(data)):
                time.sleep(pause)
                self.wfile.write(data[number : number + 1])


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[dict[str, str]]:
    """A running Hub; returns the environment that makes the job use it."""
    Hub.folder, Hub.damaged, Hub.hurts, Hub.listings = tiny_model, "", [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_a_base_comes_from_the_hub(
    hub: dict[str, str], tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Every file verified by the checksum that the Hub keeps for it; the rest of the job as ever."""
    outcome = job("run", tiny_run(model={"base": "hf://org/tiny@main"}, train={"max_steps": 2}), environ=hub)

    assert outcome.returncode == 0, outcome.stderr
    assert "hf://org/tiny@main: 6 file(s)" in outcome.stderr
    assert (
        json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "hf://org/tiny@main"
    )


@pytest.mark.slow
@pytest.mark.every_commit
def test_data_come_from_the_hub(hub: dict[str, str], tiny_run: Callable[..., Path], job: Job, tmp_path: Path) -> None:
    """The files of a data set that are named, in a folder of it, by a star and one by one; verified like all others."""
    config = tiny_run()
    Hub.data = tmp_path / "hub"
    (Hub.data / "data").mkdir(parents=True)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in {"train-0": lines[:20], "train-1": lines[20:40], "test-0": lines[40:48]}.items():
        (Hub.data / "data" / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    (Hub.data / "README.md").write_text("About.", encoding="utf-8")
    place = f"hf://datasets/org/data@{COMMIT}/data"
    config = tiny_run(
        data={"train": [f"{place}/train-*.jsonl"], "eval": [{"url": f"{place}/test-0.jsonl"}]}, train={"max_steps": 2}
    )

    outcome = job("run", config, environ=hub)

    assert outcome.returncode == 0, outcome.stderr
    assert f"{place}: 2 file(s)" in outcome.stderr
    assert f"{place}/test-0.jsonl: 1 file(s)" in outcome.stderr
    counts = json.loads((tmp_path / "run" / "report" / "data.json").read_text(encoding="utf-8"))
    assert (counts["train"]["examples"], counts["eval"]["examples"]) == (40, 8)
    assert "Tokens in an example of the train split" in (tmp_path / "run" / "report" / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("url", "repository", "revision", "shown"),
    [
        ("hf://org/name", "org/name", "main", "hf://org/name@main"),
        ("hf://org/name@v1", "org/name", "v1", "hf://org/name@v1"),
        ("hf://org/name@refs/pr/1", "org/name", "refs/pr/1", "hf://org/name@refs/pr/1"),
        ("hf://datasets/org/name/data", "org/name", "main", "hf://datasets/org/name@main/data"),
        ("hf://datasets/org/name@v1", "org/name", "v1", "hf://datasets/org/name@v1"),
        ("hf://datasets/org/name@v1/a/b", "org/name", "v1", "hf://datasets/org/name@v1/a/b"),
        ("hf://datasets/org/name@refs/convert/parquet/default/train", "org/name", "refs/convert/parquet",
         "hf://datasets/org/name@refs/convert/parquet/default/train"),
        ("hf://datasets/org/name@a%2Fb/c", "org/name", "a/b", "hf://datasets/org/name@a/b/c"),
    ],
)  # fmt: skip
def test_a_url_says_repository_revision_and_folder(url: str, repository: str, revision: str, shown: str) -> None:
    """Branches of pull requests and of the hub's own conversions have slashes in their names."""
    found = storage.source(url)

    assert (found.repository, found.revision, found.url) == (repository, revision, shown)  # type: ignore[attr-defined]


def test_a_hub_with_hiccups_delivers_in_the_end(hub: dict[str, str], tmp_path: Path, tiny_model: Path) -> None:
    """Overload, bodies that break off, a flipped byte: what is pulled in the end is what the Hub has."""
    Hub.damaged = "model.safetensors"
    Hub.hurts = ["503", "truncated", "flipped", "truncated", "none"]
    program = (
        "import sys; from pathlib import Path; from job import log, storage; log.to_people(sys.stderr);"
        "hub = storage.source('hf://org/tiny@main'); storage.pull(hub, hub.list(), Path(sys.argv[1]))"
    )

    outcome = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "back")],
        cwd=ROOT, env=hub, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert outcome.returncode == 0, outcome.stderr
    assert not Hub.hurts
    assert manifest.of(tmp_path / "back") == manifest.of(tiny_model)
    assert outcome.stderr.count("trying again") == 3
    assert outcome.stderr.count("damaged on the way: SHA256") == 1


def run_program(program: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: the Hub's client reads its settings once."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_small_file_that_trickles_is_asked_for_again(hub: dict[str, str]) -> None:
    """Each byte comes in time, and the last one would take a minute."""
    Hub.damaged, Hub.hurts = "config.json", ["trickle", "none"]
    program = (
        "import sys; from job import log, storage; from job.storage import patience;"
        "log.to_people(sys.stderr); patience.PART_SECONDS = 1.0;"
        "hub = storage.source('hf://org/tiny@main');"
        "entry = next(e for e in hub.list() if e.key == 'config.json');"
        "print(storage.read_file(hub, entry).decode())"
    )

    outcome = run_program(program, hub)

    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout) == json.loads((Hub.folder / "config.json").read_text())
    assert "bytes arrived in 1 s; trying again" in outcome.stderr


def test_a_sealed_base_on_the_hub_is_read_at_one_commit(
    hub: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """A second listing could find a branch that has moved, and read the manifest of other files."""
    Hub.folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (Hub.folder / "training.json").write_text(json.dumps({"inputs": {}}))
    manifest.seal(Hub.folder)
    program = (
        "from job.pull import look, verified; found = look.base('hf://org/tiny@main');"
        "print(*verified.read_sealed(found, {'config.json'}, 'model.base'))"
    )

    outcome = run_program(program, hub)

    assert outcome.stdout.strip() == "config.json", outcome.stderr
    assert Hub.listings == 1


@pytest.mark.parametrize(
    ("base", "status", "told"),
    [
        ("hf://org/nothing@main", 64, "hf://org/nothing@main: not found on the Hub"),
        ("hf://org/tiny@main", 1, "model.safetensors: damaged on the way: SHA256 is"),
    ],
)
def test_what_the_hub_does_not_deliver_is_explained(
    base: str, status: int, told: str, hub: dict[str, str], tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """A repository that is not there is permanent, a damaged file may come whole next time."""
    Hub.damaged = "model.safetensors"

    outcome = job("run", tiny_run(model={"base": base}), environ=hub)

    assert outcome.returncode == status, outcome.stderr
    assert told in outcome.stderr
    assert not [name for name in files(tmp_path / "cache") if name.endswith(("manifest.json", "model.safetensors"))]


def test_a_hub_that_cannot_be_reached_may_be_there_next_time(tiny_run: Callable[..., Path], job: Job) -> None:
    """With the way out: a bucket."""
    config = tiny_run(model={"base": "hf://org/tiny@main"})

    outcome = job("run", config, environ={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})

    assert outcome.returncode == 1, outcome.stderr
    assert "cannot reach the Hub" in outcome.stderr
    assert "Put the model in a bucket" in outcome.stderr
