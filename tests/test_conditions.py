"""Stores that do not keep their word on conditional writes are found out before anything rests on it."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from conftest import S3, _free_port, need
from faults import Fault, Proxy, Request

from job import errors, storage


@pytest.fixture
def careless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`rclone serve s3`, which accepts conditions and ignores them, as this process's store."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need("rclone", rclone)
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    port = _free_port()
    process = subprocess.Popen(
        [str(rclone), "serve", "s3", f"{tmp_path}/served", "--addr", f"127.0.0.1:{port}", "--auth-key", "KEY,SECRET",
         "--config", "/dev/null"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environ = {
        "AWS_ACCESS_KEY_ID": "KEY",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    try:
        for _ in range(100):
            with contextlib.suppress(errors.JobError):
                storage.connect("s3://bucket").put("ready", b"1")
                break
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_store_that_keeps_its_word_is_taken_as_it_is(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """And nothing of the trial is left there."""
    url = tmp_path.as_uri() if kind == "file" else f"s3://{request.getfixturevalue('bucket')}/run"
    store = storage.connect(url)

    assert storage.checked(store, ".probe/", required=True) is store
    assert store.list() == []


@pytest.mark.usefixtures("careless")
def test_a_store_that_ignores_conditions_is_refused() -> None:
    """With what it does, why that matters, and the two ways out."""
    store = storage.connect("s3://bucket/run")

    with pytest.raises(errors.UnsupportedError) as caught:
        storage.checked(store, ".probe/", required=True)

    assert caught.value.status == 64
    assert "the store ignores If-None-Match, so two starts of one run could overwrite" in str(caught.value)
    assert "set run.conditional_writes to emulated" in str(caught.value)
    assert store.list() == []


def test_a_probe_that_another_start_removed_says_nothing_of_the_store(tmp_path: Path) -> None:
    """The end of a run sweeps all probes, also one that is being made; a second one is believed."""

    class Swept(storage.Folder):
        left = 1

        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            if self.left:
                self.left -= 1
                self.delete(key)

    store = Swept(tmp_path / "run")

    assert storage.checked(store, ".probe/", required=True) is store
    assert store.list() == []


@pytest.mark.usefixtures("careless")
def test_a_user_who_sees_to_it_may_use_such_a_store(said: Callable[[], str]) -> None:
    """Loudly; the store then at least looks before it writes."""
    store = storage.checked(storage.connect("s3://bucket/run"), ".probe/", required=False)

    assert "NOTHING protects this run from a second start" in said()
    store.create("lease.json", b"one")
    with pytest.raises(errors.ConflictError):
        store.create("lease.json", b"two")
    seen = store.read("lease.json")
    assert seen
    store.replace("lease.json", b"two", seen.version)
    with pytest.raises(errors.ConflictError):
        store.replace("lease.json", b"three", seen.version)


@pytest.mark.usefixtures("careless")
def test_the_job_says_so_in_its_first_seconds(
    tiny_run: Callable[..., Path], job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Before anything is pulled; the config decides."""
    config = tiny_run(run={"url": "s3://bucket/run"})

    refused = job("run", config)
    allowed = job("validate", config, "--set", "run.conditional_writes=emulated")

    assert refused.returncode == 64, refused.stderr
    assert "ignores If-None-Match" in refused.stderr
    assert "LoRA" not in refused.stderr
    assert allowed.returncode == 0, allowed.stderr
    assert "NOTHING protects this run" in allowed.stderr


def if_match(answer: Fault) -> Callable[[Request, int], Fault | None]:
    return lambda request, _: answer if request.method == "PUT" and request.header("If-Match") else None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (faults.says(501, "NotImplemented"), "has not all conditional writes"),
        (faults.says(412, "PreconditionFailed"), "refuses If-Match even where the version is right"),
    ],
)
def test_a_store_with_half_of_the_conditions_is_refused(
    answer: Fault, told: str, s3_server: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenStack Swift 2.38 (501) and Ceph 16 (always 412) were seen to answer."""
    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.chosen = if_match(answer)

        with pytest.raises(errors.UnsupportedError, match=told):
            storage.checked(storage.connect(f"s3://{bucket}/run"), ".probe/", required=True)

    assert s3_server.keys(bucket) == set()


def test_credentials_that_may_not_write_are_no_missing_feature(
    s3_server: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """403 is said as what it is."""
    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.chosen = lambda request, _: faults.says(403, "AccessDenied") if request.method == "PUT" else None

        with pytest.raises(errors.DeniedError, match=r"writing \.probe/"):
            storage.checked(storage.connect(f"s3://{bucket}/run"), ".probe/", required=False)
