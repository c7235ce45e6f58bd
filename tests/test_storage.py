"""Directories and small objects in a store: the same promises from the folder and from a real S3 server."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig
from conftest import S3, files
from faults import Proxy, says

from job import errors, manifest, storage
from job.storage import checksum, incoming, local, upload
from job.storage.journal import Journal, Part
from job.storage.store import ANY, Upload


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
    """A store that fails for good at the n-th upload, as it does for a killed process; it counts the uploads."""

    def __init__(self, store: storage.Store, survives: int = 99) -> None:
        self._store, self._left, self.uploads = store, survives, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def upload(self, key: str, size: int, over: str | None) -> object:
        if self.uploads == self._left:
            raise errors.DeniedError("the credentials were taken away")
        self.uploads += 1
        return self._store.upload(key, size, over)


class Counting:
    """A source that counts the bytes that are asked for, and flips one in the middle of a file as often as told."""

    def __init__(self, store: storage.Store, flips: int = 0) -> None:
        self._store, self._flips, self.url = store, flips, store.url
        self.asked: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def stream(self, entry: storage.Entry, start: int, stop: int) -> Iterator[bytes | memoryview]:
        self.asked.append((entry.key, start, stop))
        for block in self._store.stream(entry, start, stop):
            if self._flips:
                self._flips -= 1
                yield bytes([block[0] ^ 1]) + bytes(block[1:])
            else:
                yield block


def until(journal: Path, lines: int) -> None:
    """Wait until the journal has so many lines."""
    while not journal.exists() or len(journal.read_text().splitlines()) < lines:
        time.sleep(0.01)


def entries_of(store: storage.Store, prefix: str) -> list[storage.Entry]:
    return [e for e in store.list(prefix) if not e.key.endswith("manifest.json")]


def write(store: storage.Store, key: str, path: Path) -> None:
    """Put a file there as another tool would: without a manifest."""
    bring(store.upload(key, path.stat().st_size, ANY), path.read_bytes(), store.part_size(path.stat().st_size))


def bring(upload: Upload, data: bytes, size: int) -> None:
    """All parts of an upload, and its end."""
    for number in range(max(1, -(-len(data) // size))):
        upload.send(number, data[number * size : (number + 1) * size], lambda: None)
    upload.finish()


@pytest.mark.parametrize("size", [100, 40 << 20], ids=["whole", "in parts"])
@pytest.mark.parametrize("was_there", [False, True], ids=["new", "replaced"])
def test_a_late_write_does_not_replace_a_newer_one(
    *, was_there: bool, size: int, store: storage.Store, tmp_path: Path
) -> None:
    """A start that was taken for dead comes back in the middle of an upload: what its successor wrote stays."""
    late, newer = tmp_path / "late", tmp_path / "newer"
    late.write_bytes(os.urandom(size))
    newer.write_bytes(os.urandom(size))
    if was_there:
        write(store, "merged/file", late)
    seen = {entry.key: entry.version for entry in store.list("merged/")}.get("merged/file")
    upload, part = store.upload("merged/file", size, seen), store.part_size(size)
    write(store, "merged/file", newer)

    with pytest.raises((errors.ConflictError, errors.ChangedError), match=r"exists already|somebody"):
        bring(upload, late.read_bytes(), part)
    upload.abort()

    store.sweep("merged/")
    entry = store.list("merged/")[0]
    assert b"".join(store.stream(entry, 0, entry.size)) == newer.read_bytes()


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
    with pytest.raises(errors.DeniedError, match="taken away"):
        storage.push(Fragile(store, survives=1), directory, "merged/")  # type: ignore[arg-type]

    assert storage.sealed(store, "merged/") is None
    assert storage.fetch(store, "merged/", tmp_path / "back") is None
    assert not (tmp_path / "back").exists()
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


def test_replacing_a_directory_never_shows_a_mixture(store: storage.Store, directory: Path) -> None:
    """From the first changed file to the last the old manifest is gone; files that are no longer wanted go too."""
    storage.push(store, directory, "merged/")
    (directory / "small").write_bytes(b"other")
    (directory / "sub" / "large").rename(directory / "renamed")

    with pytest.raises(errors.DeniedError):
        storage.push(Fragile(store, survives=1), directory, "merged/")  # type: ignore[arg-type]
    assert storage.sealed(store, "merged/") is None
    storage.push(store, directory, "merged/")

    assert {e.key for e in store.list("merged/")} == {"merged/small", "merged/renamed", "merged/manifest.json"}


def test_pushing_the_same_again_sends_nothing(store: storage.Store, directory: Path) -> None:
    """What the store's manifest lists is not sent again."""
    first = storage.push(store, directory, "merged/")

    assert storage.push(Fragile(store, survives=0), directory, "merged/") == first  # type: ignore[arg-type]


def test_of_a_changed_directory_only_the_changed_file_is_sent(store: storage.Store, directory: Path) -> None:
    """A file of the same size and other content is found by its digest."""
    storage.push(store, directory, "merged/")
    (directory / "small").write_bytes(b"jello")

    counted = Fragile(store)
    whole = storage.push(counted, directory, "merged/")  # type: ignore[arg-type]

    assert counted.uploads == 1
    assert whole == manifest.of(directory) == storage.sealed(store, "merged/")


def test_an_old_manifest_never_vouches_for_new_files(store: storage.Store, directory: Path) -> None:
    """A directory that lost a file is not sealed; its manifest must be gone before anything new lies beside it."""
    storage.push(store, directory, "merged/")
    store.delete("merged/small")
    (directory / "sub" / "large").write_bytes(os.urandom(20 << 20))

    with pytest.raises(errors.DeniedError):
        storage.push(Fragile(store, survives=1), directory, "merged/")  # type: ignore[arg-type]
    store.put("merged/small", b"hello")

    assert storage.sealed(store, "merged/") is None


def test_a_directory_that_vanishes_while_it_is_pulled_is_not_whole(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """What the manifest names and the listing does not is missed, never left out."""
    sent = storage.push(store, directory, "merged/")
    listed = [entry for entry in entries_of(store, "merged/") if not entry.key.endswith("small")]

    with pytest.raises(errors.ChangedError, match="was it removed meanwhile"):
        storage.pull(store, listed, tmp_path / "back", below="merged/", expected=sent)

    assert not (tmp_path / "back").exists()


def test_whole_files_of_an_interrupted_pull_are_not_believed_after_a_power_cut(
    store: storage.Store, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file can have its size and holes in it; parts are compared with their CRC."""
    sent, listed = storage.push(store, directory, "merged/"), entries_of(store, "merged/")
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(local, "_BOOT", boot)
    boot.write_text("one")
    with pytest.raises(errors.ChangedError):
        storage.pull(store, listed[:1], tmp_path / "back", below="merged/", expected=sent)
    arrived = listed[0].key.removeprefix("merged/")
    (tmp_path / "back.partial" / arrived).write_bytes(bytes(listed[0].size))
    boot.write_text("two")

    got = storage.pull(store, listed, tmp_path / "back", below="merged/", expected=sent)

    assert got == sent == manifest.of(tmp_path / "back")


@pytest.mark.parametrize("when", ["first", "last"])
def test_who_may_not_write_any_more_seals_nothing(store: storage.Store, directory: Path, when: str) -> None:
    """Asked before the old content is given up, and again before the new is sealed."""
    before = storage.push(store, directory, "merged/")
    (directory / "small").write_bytes(b"other")
    asked = iter([errors.FencedError("no"), None] if when == "first" else [None, errors.FencedError("no")])

    def confirm() -> None:
        if answer := next(asked):
            raise answer

    with pytest.raises(errors.FencedError):
        storage.push(store, directory, "merged/", confirm)

    assert storage.sealed(store, "merged/") == (before if when == "first" else None)


def test_who_was_paused_in_the_middle_of_a_push_sends_nothing_more(
    store: storage.Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When some time has passed since it was certain that we may write, that is asked again before each request."""
    monkeypatch.setattr(upload, "_FRESH_SECONDS", 0.0)
    asked = []

    def confirm() -> None:
        asked.append(1)
        if len(asked) > 1:  # the first time is before anything is given up
            raise errors.FencedError("no")

    with pytest.raises(errors.FencedError):
        storage.push(store, directory, "merged/", confirm)

    assert not list(store.list("merged/"))


def test_of_two_who_seal_one_place_one_loses(store: storage.Store, directory: Path) -> None:
    """Whoever woke up too late is told so, and the manifest stays the other's."""
    theirs = manifest.Manifest({}).to_json()

    with pytest.raises(errors.ConflictError):
        storage.push(store, directory, "merged/", lambda: store.put("merged/manifest.json", theirs))

    blob = store.read("merged/manifest.json")
    assert blob
    assert blob.data == theirs


def test_after_a_killed_push_only_what_is_missing_is_sent(bucket: str, directory: Path) -> None:
    """Without a manifest, what is there is compared by the checksum that S3 keeps; a stale file does not count."""
    store = storage.connect(f"s3://{bucket}/run")
    write(store, "merged/sub/large", directory / "sub" / "large")
    store.put("merged/small", b"jello")

    counted = Fragile(store)
    storage.push(counted, directory, "merged/")  # type: ignore[arg-type]

    assert counted.uploads == 1
    blob = store.read("merged/small")
    assert blob
    assert blob.data == b"hello"


def test_the_parts_of_a_killed_upload_are_not_sent_again(s3: S3, bucket: str, directory: Path) -> None:
    """They are compared by their checksum; one that differs is sent, and nothing unfinished stays."""
    store, large = storage.connect(f"s3://{bucket}/run"), directory / "sub" / "large"
    size = store.part_size(large.stat().st_size)
    killed = store.upload("merged/sub/large", large.stat().st_size, None)
    killed.send(0, large.read_bytes()[:size], lambda: None)
    killed.send(1, b"stale" * 100, lambda: None)
    sent: list[int] = []
    s3_upload_part = type(killed)._write

    def count(self: object, number: int, *rest: object) -> str:
        sent.append(number)
        return s3_upload_part(self, number, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(killed), "_write", count)
        storage.push(store, directory, "merged/")

    assert sent == [1]
    assert storage.sealed(store, "merged/") == manifest.of(directory)
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)


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
    source = Counting(store, flips=1)

    got = storage.pull(source, entries_of(store, "merged/"), tmp_path / "back", below="merged/", expected=sent)  # type: ignore[arg-type]

    assert got == sent == manifest.of(tmp_path / "back")
    assert len(source.asked) == 3


def test_a_transfer_that_is_always_damaged_ends_with_an_error(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """After three tries nothing is left that a later run would trust."""
    sent = storage.push(store, directory, "merged/")
    source = Counting(store, flips=999)

    with pytest.raises(errors.DamagedError, match=r"its manifest says .*; it arrived damaged 3 times"):
        storage.pull(source, entries_of(store, "merged/"), tmp_path / "back", below="merged/", expected=sent)  # type: ignore[arg-type]

    assert not (tmp_path / "back").exists()
    assert not files(tmp_path / "back.partial")


def test_a_pull_goes_on_with_what_is_there(
    store: storage.Store, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and parts of files that arrived before the interruption are not fetched again."""
    monkeypatch.setattr(incoming, "PART_BYTES", 4 << 20)
    sent = storage.push(store, directory, "merged/")

    class Breaking(Counting):
        def stream(self, entry: storage.Entry, start: int, stop: int) -> Iterator[bytes | memoryview]:
            if start == 16 << 20:
                until(
                    tmp_path / "back.journal", 7
                )  # the boot, four parts, and the small file: its part, and that it is whole
                raise errors.DeniedError("the credentials were taken away")
            yield from super().stream(entry, start, stop)

    listed = entries_of(store, "merged/")
    with pytest.raises(errors.DeniedError):
        storage.pull(Breaking(store), listed, tmp_path / "back", below="merged/", expected=sent)  # type: ignore[arg-type]
    assert not (tmp_path / "back").exists()
    second = Counting(store)
    storage.pull(second, listed, tmp_path / "back", below="merged/", expected=sent)  # type: ignore[arg-type]

    assert second.asked == [("merged/sub/large", 16 << 20, 20 << 20)]
    assert manifest.of(tmp_path / "back") == sent
    assert not {name for name in files(tmp_path) if "back." in name} - {"back.lock"}


def test_a_part_that_the_disk_lost_is_fetched_again(
    store: storage.Store, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that went down may have kept the journal and not the bytes."""
    test_a_pull_goes_on_with_what_is_there(store, directory, tmp_path, monkeypatch)
    listed, sent = entries_of(store, "merged/"), manifest.of(tmp_path / "back")
    (tmp_path / "back" / "manifest.json").unlink()
    (tmp_path / "back").rename(tmp_path / "back.partial")
    large = next(e for e in listed if e.key.endswith("large"))
    data = (directory / "sub" / "large").read_bytes()
    noted = Journal(tmp_path / "back.partial", tmp_path / "back.journal", local.boot_id())
    for start in range(0, 20 << 20, 4 << 20):
        noted.add_part(
            "sub/large", large, Part(start, start + (4 << 20), checksum.crc(data[start : start + (4 << 20)]))
        )
    with (tmp_path / "back.partial" / "sub" / "large").open("r+b") as file:
        file.seek(5 << 20)
        file.write(bytes(100))

    source = Counting(store)
    got = storage.pull(source, listed, tmp_path / "back", below="merged/", expected=sent)  # type: ignore[arg-type]

    assert got == sent == manifest.of(tmp_path / "back")
    assert ("merged/sub/large", 4 << 20, 8 << 20) in source.asked
    assert len(source.asked) == 2


def test_a_file_that_changed_since_it_was_listed_is_not_taken(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """Two versions are never stitched together, even if they are equally long."""
    storage.push(store, directory, "base/")
    listed = entries_of(store, "base/")
    (directory / "sub" / "large").write_bytes(os.urandom(20 << 20))
    write(store, "base/sub/large", directory / "sub" / "large")

    with pytest.raises(errors.ChangedError, match=r"changed since it was listed|overwritten"):
        storage.pull(store, listed, tmp_path / "back", below="base/")

    assert not (tmp_path / "back").exists()


def test_a_file_that_was_removed_since_it_was_listed_is_missed(
    store: storage.Store, directory: Path, tmp_path: Path
) -> None:
    """Whoever reads it is told to start again, and not that the URL is wrong."""
    storage.push(store, directory, "base/")
    listed = entries_of(store, "base/")
    small = next(entry for entry in listed if entry.key == "base/small")
    store.delete("base/small")

    for read in (
        lambda: storage.read_file(store, small),
        lambda: storage.read_range(store, small, 0, 5),
        lambda: storage.pull(store, listed, tmp_path / "back", below="base/"),
    ):
        with pytest.raises(errors.ChangedError, match="removed since it was listed; start again"):
            read()


@pytest.mark.parametrize("size", [600_000, 300_000], ids=["equal", "shorter"])
def test_a_file_that_is_written_while_it_is_read_is_not_taken(size: int, tmp_path: Path) -> None:
    """Its first blocks are of one version and the last ones of another."""
    path = tmp_path / "config.json"
    path.write_bytes(b"1" * 600_000)
    store = storage.Folder(tmp_path)
    (entry,) = store.list()

    reading = store.stream(entry, 0, entry.size)
    next(reading)
    path.write_bytes(b"2" * size)

    with pytest.raises(errors.ChangedError, match="changed since it was listed"):
        list(reading)


def test_an_overloaded_store_is_asked_again_for_the_size_of_parts(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the checksum of a multipart object would be given up without need."""
    (tmp_path / "large").write_bytes(os.urandom(9 << 20))
    parts = TransferConfig(multipart_threshold=8 << 20)
    s3.client().upload_file(str(tmp_path / "large"), bucket, "large", Config=parts)
    with Proxy(s3.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = storage.connect(f"s3://{bucket}")
        (entry,) = store.list()
        left = iter([says(503, "SlowDown")])
        proxy.chosen = lambda request, _: next(left, None) if "partNumber" in request.path else None

        with pytest.raises(errors.StoreError):
            store.checksum(entry)
        known = store.checksum(entry)

    assert known
    assert known.name == "MD5 of parts"


def test_two_pulls_of_the_same_download_it_once(store: storage.Store, directory: Path, tmp_path: Path) -> None:
    """Several processes or jobs that share a cache wait for the one that is at work."""
    storage.push(store, directory, "base/")
    source, listed = Counting(store), entries_of(store, "base/")
    pulls = [
        threading.Thread(target=storage.pull, args=(source, listed, tmp_path / "back"), kwargs={"below": "base/"})
        for _ in range(3)
    ]

    for pull in pulls:
        pull.start()
    for pull in pulls:
        pull.join()

    assert len(source.asked) == len(listed)
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


@pytest.mark.parametrize("tool", ["aws", "multipart", "job"])
def test_a_base_without_a_manifest_is_verified_by_the_stores_own_checksum(
    s3: S3, bucket: str, tool: str, directory: Path, tmp_path: Path
) -> None:
    """Models that others uploaded: multipart objects by the MD5 of their parts, others by the CRC that came along."""
    store = storage.connect(f"s3://{bucket}")
    if tool == "job":
        write(store, "sub/large", directory / "sub" / "large")
    else:
        config = TransferConfig(multipart_threshold=8 << 20 if tool == "multipart" else 1 << 30)
        s3.client().upload_file(str(directory / "sub" / "large"), bucket, "sub/large", Config=config)
    (entry,) = store.list()

    known = store.checksum(entry)

    assert known
    assert known.name == {"aws": "CRC32", "multipart": "MD5 of parts", "job": "CRC64NVME"}[tool]
    assert storage.pull(Counting(store, flips=1), [entry], tmp_path / "back") == manifest.of(tmp_path / "back")  # type: ignore[arg-type]


REFUSALS = {
    "bucket": ("The specified bucket does not exist: create the bucket or correct the URL", {}),
    "secret": ("check the credentials and what they may do", {"AWS_SECRET_ACCESS_KEY": "wrong"}),
    "none": ("no AWS credentials found", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}),
    "endpoint": ("cannot reach http://127.0.0.1:9", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
}


@pytest.mark.usefixtures("hasty")
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


def test_a_request_to_stop_is_heard_while_a_transfer_begins(
    store: storage.Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the moment when some of its threads are there and others are not yet."""
    begin, begun = threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise errors.Preempted("stopped by the test")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)

    with pytest.raises(errors.Preempted):
        storage.push(store, directory, "merged/")

    for thread in begun:
        thread.join(10)
        assert not thread.is_alive()


def test_more_files_than_a_store_lists_at_once(bucket: str, tmp_path: Path) -> None:
    """S3 names 1000 objects in an answer; a directory of more is as whole as any."""
    made, store = tmp_path / "made", storage.connect(f"s3://{bucket}/run")
    made.mkdir()
    for number in range(1100):
        (made / f"{number}").write_bytes(b"%d" % number)

    sent = storage.push(store, made, "merged/")

    assert storage.push(store, made, "merged/") == sent == manifest.of(made)
    assert storage.fetch(store, "merged/", tmp_path / "back") == sent


def test_a_folder_that_becomes_empty_takes_no_file_with_it(tmp_path: Path) -> None:
    """Deleting the last file of a folder removes the folder, also while somebody else puts a file there."""
    store = storage.connect((tmp_path / "store").as_uri())

    def come_and_go() -> None:
        for number in range(500):
            store.put(f"attempts/one/{number}", b"1")
            store.delete(f"attempts/one/{number}")

    busy = threading.Thread(target=come_and_go)
    busy.start()
    for number in range(500):
        store.create(f"attempts/one/other{number}", b"1")
        assert f"attempts/one/other{number}" in {entry.key for entry in store.list()}
        store.delete(f"attempts/one/other{number}")
    busy.join()

    assert store.list() == []


def test_one_file_of_a_folder_is_found_without_a_look_at_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be somebody's home, with millions of files below and some that are closed to us."""
    for name in ("train.jsonl", "train.jsonl.d/1", "else/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(str(path)), scandir(path))[1])

    found = [entry.key for entry in storage.connect(tmp_path.as_uri()).list("train.jsonl")]

    assert found == ["train.jsonl", "train.jsonl.d/1"]
    assert str(tmp_path / "else") not in seen


def test_an_unknown_kind_of_store_is_refused() -> None:
    """The message names the kinds there are."""
    with pytest.raises(errors.ConfigError, match="use s3://bucket/prefix or file:///absolute/path"):
        storage.connect("gs://bucket/run")
