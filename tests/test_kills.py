"""SIGKILL in the middle of real pulls and pushes: the next start goes on, and nothing false is believed."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, S3, files
from faults import Forward, Proxy, Request

from job import log, manifest, storage

MOMENTS = [pytest.param(n, marks=[pytest.mark.slow] if n > 2 else []) for n in range(20)]
SPAN = 0.6  # seconds; what is transferred takes about half of it
PULL = (
    "import sys; from pathlib import Path; from job import log, storage; log.to_people(sys.stderr);"
    "store = storage.connect(sys.argv[1]); print('begins', flush=True);"
    "storage.fetch(store, 'merged/', Path(sys.argv[2]))"
)
PUSH = PULL.replace(
    "storage.fetch(store, 'merged/', Path(sys.argv[2]))", "storage.push(store, Path(sys.argv[2]), 'merged/')"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files of several parts, of one, and small ones."""
    made = tmp_path / "made"
    made.mkdir()
    dice = random.Random(0)
    for name, size in {"large": 80 << 20, "other": 40 << 20, **{f"small{n}": 70_000 for n in range(30)}}.items():
        (made / name).write_bytes(dice.randbytes(size))
    return made


def begun(program: str, url: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs `program` and is about to transfer."""
    command = [sys.executable, "-c", program, url, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begins\n"
    return process


def killed(program: str, url: str, path: Path, moment: float) -> None:
    process = begun(program, url, path)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finished(program: str, url: str, path: Path) -> str:
    process = begun(program, url, path)
    _, told = process.communicate()
    assert process.returncode == 0, told
    return told


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_pull_that_is_killed_goes_on(seed: int, bucket: str, directory: Path, tmp_path: Path) -> None:
    """Three times at random moments: what is sealed is whole; in the end all is there, and nothing beside it."""
    url, target, dice = f"s3://{bucket}/run", tmp_path / "back" / "merged", random.Random(seed)
    sent = storage.push(storage.connect(url), directory, "merged/")

    for _ in range(3):
        killed(PULL, url, target, dice.uniform(0, SPAN))
        assert manifest.sealed(target) in (None, sent)
        assert not target.exists() or manifest.of(target) == sent
    finished(PULL, url, target)

    assert manifest.of(target) == sent
    assert files(tmp_path / "back") == {*(f"merged/{name}" for name in [*sent.files, "manifest.json"]), "merged.lock"}


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_push_that_is_killed_goes_on(seed: int, s3_server: S3, bucket: str, directory: Path, tmp_path: Path) -> None:
    """Three times at random moments: what is sealed is whole; in the end all is there, and nothing beside it."""
    url, dice = f"s3://{bucket}/run", random.Random(seed)
    store, whole = storage.connect(url), manifest.of(directory)

    for _ in range(3):
        killed(PUSH, url, directory, dice.uniform(0, SPAN * 2))
        assert storage.sealed(store, "merged/") in (None, whole)
    finished(PUSH, url, directory)

    assert storage.fetch(store, "merged/", tmp_path / "back") == whole == manifest.of(tmp_path / "back")
    assert {key.removeprefix("run/merged/") for key in s3_server.keys(bucket)} == {*whole.files, "manifest.json"}
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)
    assert "push" not in finished(PUSH, url, directory), "the same again sends nothing"


def test_what_arrived_before_a_kill_is_not_fetched_again(bucket: str, directory: Path, tmp_path: Path) -> None:
    """The second start says how much it found, and transfers the rest."""
    url, target = f"s3://{bucket}/run", tmp_path / "merged"
    storage.push(storage.connect(url), directory, "merged/")
    journal = tmp_path / "merged.journal"
    process = begun(PULL, url, target)
    while not journal.exists() or arrived(journal) < 16 << 20:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    there = arrived(journal)

    told = finished(PULL, url, target)

    assert f"{log.size(there)} are here from an earlier start" in told
    assert manifest.of(target) == manifest.of(directory)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_sent_before_a_stop_is_not_sent_again(
    stop: signal.Signals, s3_server: S3, bucket: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an upload in parts, the second start sends those that are missing, and finishes it."""
    url, sent = f"s3://{bucket}/run", list[str]()
    push = PUSH.replace("store =", "from job import preemption; preemption.Notice().listen(); store =")

    def arrives(request: Request, forward: Forward) -> None:
        forward(request)
        sent.append(f"{request.path.partition('?')[0]} {re.findall('partNumber=([0-9]+)', request.path)}")

    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.chosen = lambda request, _: arrives if "partNumber" in request.path else None
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        process = begun(push, url, directory)
        while len(sent) < 3:
            time.sleep(0.001)
        process.send_signal(stop)
        before = {*sent}
        process.communicate()
        assert storage.sealed(storage.connect(url), "merged/") is None
        time.sleep(1)  # what the proxy has already still reaches the server
        first = {*sent}
        sent.clear()
        finished(push, url, directory)
        assert storage.sealed(storage.connect(url), "merged/") == manifest.of(directory)

    assert not before & {*sent}
    assert len(first | {*sent}) == 80 / 16 + 3
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)


def test_a_full_disk_ends_a_pull_and_loses_nothing(bucket: str, directory: Path, tmp_path: Path) -> None:
    """At once, not after many tries; when there is room, the pull goes on."""
    url, disk = f"s3://{bucket}/run", tmp_path / "disk"
    sent = storage.push(storage.connect(url), directory, "merged/")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk to fill it")
    try:
        process = begun(PULL, url, disk / "merged")
        _, told = process.communicate(timeout=30)
        assert "No space left on device" in told
        assert "again" not in told
        assert not (disk / "merged").exists()
        subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
        told = finished(PULL, url, disk / "merged")
        assert manifest.of(disk / "merged") == sent
        assert "are here from an earlier start" in told
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("program", [PULL, PUSH], ids=["pull", "push"])
def test_memory_does_not_grow_with_the_file(program: str, bucket: str, tmp_path: Path) -> None:
    """An upload holds a part for each connection, a download less, whatever the size of the file."""
    made, sizes = tmp_path / "made", (64 << 20, 512 << 20)
    made.mkdir()
    peaks = []
    for size in sizes:
        with (made / "large").open("wb") as file:
            file.truncate(size)
        if program == PULL:
            storage.push(storage.connect(f"s3://{bucket}/run"), made, "merged/")
        process = begun(f"{program}; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
                        f"s3://{bucket}/run", tmp_path / str(size) if program == PULL else made)  # fmt: skip
        peaks.append(int(process.communicate()[0]) << 10)

    assert peaks[1] < peaks[0] + (32 << 20)


def arrived(journal: Path) -> int:
    """The bytes of which a journal speaks; its last line may have been cut."""
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    return sum(stop - start for start, stop, _ in (line["part"] for line in lines if "part" in line))


def test_several_processes_pull_once(bucket: str, directory: Path, tmp_path: Path) -> None:
    """One transfers while the others wait, also when the first is killed, and all of them succeed."""
    url, target = f"s3://{bucket}/run", tmp_path / "merged"
    sent = storage.push(storage.connect(url), directory, "merged/")
    first = begun(PULL, url, target)
    others = [begun(PULL, url, target) for _ in range(3)]

    first.kill()
    first.communicate()
    told = [process.communicate()[1] for process in others]

    assert [process.returncode for process in others] == [0, 0, 0], told
    assert sum("MB/s" in said for said in told) <= 1
    assert manifest.of(target) == sent
