"""Directories and small objects in a store: the same promises from the folder and from a real S3 server."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import files

from job import errors, manifest, storage

Made = Callable[[], storage.Store]


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> storage.Store:
    if request.param == "file":
        return storage.connect((tmp_path / "store").as_uri())
    return storage.connect(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Small and large files; the large one is uploaded to S3 in several parts."""
    path = tmp_path / "made"
    (path / "sub").mkdir(parents=True)
    (path / "small").write_bytes(b"hello")
    (path / "sub" / "large").write_bytes(os.urandom(20 << 20))
    return path


class Fragile:
    """A store that fails at the n-th upload, as a killed process would."""

    def __init__(self, store: storage.Store, survives: int) -> None:
        self._store, self._left = store, survives

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def upload(self, path: Path, key: str, advance: storage.Advance) -> None:
        if not self._left:
            raise errors.StoreError("the network is gone")
        self._left -= 1
        self._store.upload(path, key, advance)


class Damaging:
    """A source that flips a byte of what it delivers, as often as told."""

    def __init__(self, store: storage.Store, times: int) -> None:
        self._store, self._left, self.downloads = store, times, 0
        self.url = store.url

    def list(self, prefix: str = "") -> list[storage.Entry]:
        return self._store.list(prefix)

    def download(self, entry: storage.Entry, target: Path, advance: storage.Advance) -> storage.Seen:
        self.downloads += 1
        seen = self._store.download(entry, target, advance)
        if self._left:
            self._left -= 1
            data = bytearray(target.read_bytes())
            data[len(data) // 2] ^= 1
            target.write_bytes(data)
            return storage.Seen(manifest.sha256(target), seen.verified_by)
        return seen


def test_a_pushed_directory_comes_back_whole(store: storage.Store, directory: Path, tmp_path: Path) -> None:
    """Every byte, and nothing besides."""
    sent = storage.push(store, directory, "merged/")

    got = storage.fetch(store, "merged/", tmp_path / "back")

    assert got == sent == manifest.sealed(tmp_path / "back")
    assert files(tmp_path / "back") == {"small", "sub/large", "manifest.json"}
    assert (tmp_path / "back" / "sub" / "large").read_bytes() == (directory / "sub" / "large").read_bytes()
    assert not [name for name in files(tmp_path) if ".part" in name]


def test_nothing_looks_complete_before_everything_is_there(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """A push that breaks off leaves no manifest, and so nothing that anybody believes."""
    with pytest.raises(errors.StoreError, match="the network is gone"):
        storage.push(Fragile(store, survives=1), directory, "merged/")  # type: ignore[arg-type]

    assert storage.sealed(store, "merged/") is None
    assert storage.fetch(store, "merged/", tmp_path / "back") is None
    assert not (tmp_path / "back").exists()


def test_replacing_a_directory_never_shows_a_mixture(store: storage.Store, directory: Path) -> None:
    """From the first changed file to the last the old manifest is gone; files that are no longer wanted go too."""
    storage.push(store, directory, "merged/")
    (directory / "small").write_bytes(b"other")
    (directory / "sub" / "large").rename(directory / "renamed")

    with pytest.raises(errors.StoreError):
        storage.push(Fragile(store, survives=1), directory, "merged/")  # type: ignore[arg-type]
    assert storage.sealed(store, "merged/") is None
    storage.push(store, directory, "merged/")

    assert {e.key for e in store.list("merged/")} == {"merged/small", "merged/renamed", "merged/manifest.json"}


def test_pushing_the_same_again_sends_nothing(store: storage.Store, directory: Path) -> None:
    """What the store's manifest lists is not sent again."""
    first = storage.push(store, directory, "merged/")

    assert storage.push(Fragile(store, survives=0), directory, "merged/") == first  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["small", "manifest.json"])
def test_a_directory_that_lost_a_file_is_not_complete(store: storage.Store, directory: Path, missing: str) -> None:
    """A manifest without its files is as good as none."""
    storage.push(store, directory, "merged/")

    store.delete(f"merged/{missing}")

    assert storage.sealed(store, "merged/") is None


def test_removing_leaves_nothing(store: storage.Store, directory: Path) -> None:
    """Neither files nor empty folders."""
    storage.push(store, directory, "checkpoints/1/")

    storage.remove(store, "checkpoints/1/")

    assert store.list() == []


def test_a_damaged_transfer_is_fetched_again(store: storage.Store, directory: Path, tmp_path: Path) -> None:
    """A flipped byte is noticed by our SHA-256, and a second try may succeed."""
    sent = storage.push(store, directory, "merged/")
    source = Damaging(store, times=1)
    entries = [e for e in store.list("merged/") if not e.key.endswith("manifest.json")]

    got = storage.pull(source, entries, tmp_path / "back", below="merged/", expected=sent)

    assert got == sent
    assert source.downloads == 3


def test_a_transfer_that_is_always_damaged_ends_with_an_error(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """After three tries nothing is left that a later run would trust."""
    sent = storage.push(store, directory, "merged/")
    entries = [e for e in store.list("merged/") if not e.key.endswith("manifest.json")]

    with pytest.raises(errors.DamagedError, match="its manifest says"):
        storage.pull(Damaging(store, times=99), entries, tmp_path / "back", below="merged/", expected=sent)

    assert not (tmp_path / "back").exists()
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


def test_a_pull_goes_on_with_what_is_verified(store: storage.Store, directory: Path, tmp_path: Path) -> None:
    """Files that arrived before the interruption are not fetched again."""
    sent = storage.push(store, directory, "merged/")
    entries = [e for e in store.list("merged/") if not e.key.endswith("manifest.json")]
    large = next(e for e in entries if e.key.endswith("large"))

    class Breaking(Damaging):
        def download(self, entry: storage.Entry, target: Path, advance: storage.Advance) -> storage.Seen:
            if entry != large:
                while not (tmp_path / "back.partial" / "sub" / "large").exists():
                    time.sleep(0.01)
                raise errors.DeniedError("the credentials were taken away")
            return super().download(entry, target, advance)

    with pytest.raises(errors.DeniedError):
        storage.pull(Breaking(store, 0), entries, tmp_path / "back", below="merged/", expected=sent)
    assert not (tmp_path / "back").exists()
    second = Damaging(store, times=0)
    storage.pull(second, entries, tmp_path / "back", below="merged/", expected=sent)

    assert second.downloads == 1


def test_a_file_that_changed_since_it_was_listed_is_not_taken(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """The manifest that a pull leaves describes what the listing promised, or there is none."""
    storage.push(store, directory, "base/")
    entries = [e for e in store.list("base/") if not e.key.endswith("manifest.json")]
    (directory / "small").write_bytes(b"hello, world")
    store.upload(directory / "small", "base/small", lambda _: None)

    with pytest.raises(errors.DamagedError, match=r"changed|when listed"):
        storage.pull(store, entries, tmp_path / "back", below="base/")

    assert not (tmp_path / "back").exists()


def test_two_pulls_of_the_same_download_it_once(store: storage.Store, directory: Path, tmp_path: Path) -> None:
    """Several processes or jobs that share a cache wait for the one that is at work."""
    storage.push(store, directory, "base/")
    source = Damaging(store, times=0)
    entries = [e for e in store.list("base/") if not e.key.endswith("manifest.json")]
    pulls = [
        threading.Thread(target=storage.pull, args=(source, entries, tmp_path / "back"), kwargs={"below": "base/"})
        for _ in range(3)
    ]

    for pull in pulls:
        pull.start()
    for pull in pulls:
        pull.join()

    assert source.downloads == len(entries)
    assert manifest.sealed(tmp_path / "back")


def test_create_succeeds_once(store: storage.Store) -> None:
    """Of many who create the same key with different content exactly one succeeds."""
    outcomes: list[bool] = []

    def create(number: int) -> None:
        try:
            store.create("lease.json", b"owner %d" % number)
        except errors.ConflictError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    racers = [threading.Thread(target=create, args=(n,)) for n in range(12)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()

    assert sorted(outcomes) == [False] * 11 + [True]


def test_replace_fails_when_somebody_was_faster(store: storage.Store) -> None:
    """A write that names a version wins only against that version."""
    store.create("lease.json", b"one")
    seen = store.read("lease.json")
    assert seen
    store.replace("lease.json", b"two", seen.version)

    with pytest.raises(errors.ConflictError):
        store.replace("lease.json", b"three", seen.version)
    with pytest.raises(errors.ConflictError):
        store.replace("nothing.json", b"three", seen.version)

    now = store.read("lease.json")
    assert now
    assert now.data == b"two"


def test_what_is_not_there_reads_as_nothing(store: storage.Store) -> None:
    """A missing key is no error; deleting it is none either."""
    assert store.read("done.json") is None
    assert store.list("checkpoints/") == []
    store.delete("done.json")


def test_a_base_without_a_manifest_is_verified_by_the_stores_own_checksum(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """Models that others uploaded: multipart objects by the MD5 of their parts, small ones by their CRC."""
    for name in ("small", "sub/large"):
        store.upload(directory / name, name, lambda _: None)

    seen = [store.download(e, tmp_path / "got", lambda _: None).verified_by for e in store.list()]

    assert seen == (["CRC32", "MD5 of parts"] if store.url.startswith("s3") else ["size", "size"])


REFUSALS = {
    "bucket": ("The specified bucket does not exist: create the bucket or correct the URL", {}),
    "secret": ("check the credentials and what they may do", {"AWS_SECRET_ACCESS_KEY": "wrong"}),
    "none": ("no AWS credentials found", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}),
    "endpoint": ("cannot reach http://127.0.0.1:9", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("bucket", errors.NotFoundError),
        ("secret", errors.DeniedError),
        ("none", errors.DeniedError),
        ("endpoint", errors.StoreError),
    ],
)
def test_what_s3_refuses_is_explained(
    fault: str, kind: type[errors.JobError], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing bucket and wrong credentials are permanent, an unreachable endpoint is not; 403 is never "not there"."""
    told, environ = REFUSALS[fault]
    for name, value in environ.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = storage.connect("s3://no-such-bucket/run" if fault == "bucket" else f"s3://{bucket}/run")

    attempts = [lambda: store.read("done.json"), store.list]
    if fault != "bucket":  # this server makes a missing bucket at the first write
        attempts.append(lambda: store.put("x", b""))
    for attempt in attempts:
        with pytest.raises(kind) as caught:
            attempt()
        assert told in str(caught.value)
        assert caught.value.status == (1 if fault == "endpoint" else 64)


def test_an_unknown_kind_of_store_is_refused() -> None:
    """The message names the kinds there are."""
    with pytest.raises(errors.ConfigError, match="use s3://bucket/prefix or file:///absolute/path"):
        storage.connect("gs://bucket/run")
