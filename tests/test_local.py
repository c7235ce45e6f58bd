"""The directories of the local cache: who works on one, who uses one, which may go, and is one still whole."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, files

from job import errors, manifest, storage
from job.storage import evict, local

MB = 1 << 20


def put(place: Path, size: int = MB, age: float = 0) -> Path:
    """A sealed directory in the cache, last used `age` seconds ago."""
    place.mkdir(parents=True)
    (place / "file").write_bytes(os.urandom(size))
    manifest.seal(place)
    with storage.used(place):
        pass
    then = time.time() - age
    os.utime(place.with_name(f"{place.name}.use"), (then, then))
    return place


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(evict, "_SPARE", 0)
    return [tmp_path / "cache" / name for name in ("models", "data")]


def test_what_was_used_longest_ago_goes_first(shelves: list[Path]) -> None:
    """And no more than is needed."""
    old, newer, newest = (put(shelves[n % 2] / name, age=100 - n) for n, name in enumerate(("a", "b", "c")))

    storage.make_room(shelves, needed=2 * MB, limit=4 * MB + 100_000)

    assert (old.exists(), newer.exists(), newest.exists()) == (False, True, True)


def test_what_a_running_job_uses_is_never_evicted(shelves: list[Path], said: Callable[[], str]) -> None:
    """However long ago it began; that the limit is exceeded is said."""
    used, unused = put(shelves[0] / "used", age=100), put(shelves[0] / "unused")

    with storage.used(used):
        storage.make_room(shelves, needed=2 * MB, limit=3_000_000)
    assert (used.exists(), unused.exists()) == (True, False)
    assert "running jobs use 1.1 MB of 3.0 MB" in said()
    storage.make_room(shelves, needed=2 * MB, limit=3_000_000)

    assert not used.exists()


def test_a_run_that_needs_more_than_the_limit_is_told_so(shelves: list[Path]) -> None:
    """Nothing is removed for it."""
    kept = put(shelves[0] / "kept")

    with pytest.raises(errors.DiskFullError, match=r"run.cache_limit is 1.0 MB, and the run needs 2.1 MB"):
        storage.make_room(shelves, needed=2 * MB, limit=1_000_000)

    assert kept.exists()


def test_looking_removes_nothing(shelves: list[Path]) -> None:
    """`validate` says whether there is room, and makes none."""
    kept = put(shelves[0] / "kept")

    storage.make_room(shelves, needed=MB, limit=MB, look=True)

    assert kept.exists()


def test_another_process_protects_what_it_uses_until_it_is_killed(shelves: list[Path]) -> None:
    """The kernel releases the lock of a killed process, so nothing stays locked for ever."""
    place = put(shelves[0] / "used")
    program = (
        "import sys, time; from pathlib import Path; from job import storage\n"
        "with storage.used(Path(sys.argv[1])): print('using', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(place)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()

    storage.make_room(shelves, needed=MB, limit=MB)
    assert place.exists()
    process.kill()
    process.communicate()
    storage.make_room(shelves, needed=MB, limit=MB)

    assert not place.exists()


def test_half_pulled_models_go_too(shelves: list[Path]) -> None:
    """With their journal, so that nobody believes in parts that are gone."""
    half = shelves[0] / "half.partial"
    half.mkdir(parents=True)
    (half / "file").write_bytes(bytes(MB))
    (shelves[0] / "half.journal").write_text("{}\n")

    storage.make_room(shelves, needed=MB, limit=MB)

    assert not files(shelves[0]) - {"half.use"}


def test_what_is_being_pulled_stays(shelves: list[Path]) -> None:
    """Another job that needs room does not take it from a pull that is under way."""
    with storage.used(shelves[0] / "coming"):
        half = shelves[0] / "coming.partial"
        half.mkdir(parents=True)
        (half / "file").write_bytes(bytes(MB))

        storage.make_room(shelves, needed=MB, limit=MB)

        assert (half / "file").exists()


def test_without_a_limit_the_disk_is_the_limit(shelves: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody uses makes room for what is needed."""
    place = put(shelves[0] / "old")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9 * MB, 0, 0 if place.exists() else 2 * MB)
    )

    storage.make_room(shelves, needed=MB, limit=None)

    assert not place.exists()


def test_one_works_while_the_others_wait(tmp_path: Path) -> None:
    """And the others find what the one has made."""
    found: list[bool] = []

    def make() -> None:
        with storage.alone(tmp_path / "made") as place:
            found.append(place.sealed() is not None)
            if not found[-1]:
                time.sleep(0.1)
                made = tmp_path / "made.partial"
                made.mkdir()
                (made / "file").write_bytes(b"x")
                manifest.seal(made)
                place.fill(made)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(found) == [False, True, True]


@pytest.mark.parametrize("damaged", [0, 1])
def test_after_a_restart_of_the_machine_every_byte_is_read_once(
    damaged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """Sizes survive a power cut that the bytes did not; what is whole is not read a third time."""
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    monkeypatch.setattr(local, "_BOOT", boot)
    made = put(tmp_path / "made")
    with storage.alone(tmp_path / "kept") as place:
        place.fill(made)
        assert place.sealed()
    if damaged:
        (tmp_path / "kept" / "file").write_bytes(bytes(MB))
    boot.write_text("two\n")

    outcomes = []
    for _ in range(2):
        with storage.alone(tmp_path / "kept") as place:
            outcomes.append(place.sealed() is not None)

    assert outcomes == [not damaged] * 2
    assert said().count("reading it back") == (2 if damaged else 1)
