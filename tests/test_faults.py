"""What a bad network and a troubled store do to pulls and pushes, through a proxy that does it to a real S3 server."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from conftest import S3, command, files
from faults import Fault, Forward, Proxy, Request

from job import errors, manifest, storage
from job.storage import incoming, patience
from job.storage import s3 as s3_store

PASSING: dict[str, Fault] = {
    "500": faults.says(500, "InternalError"),
    "503": faults.says(503, "SlowDown"),
    "expired": faults.says(400, "ExpiredToken"),
    "reset": faults.reset,
    "lost reply": faults.lose_reply,
    "truncated": faults.truncate,
    "stall": faults.stall,
    "flipped byte": faults.flip,
}
LASTING: dict[str, tuple[Fault, type[errors.JobError], int]] = {
    "denied": (faults.says(403, "AccessDenied"), errors.DeniedError, 64),
    "revoked": (faults.says(403, "InvalidAccessKeyId"), errors.DeniedError, 64),
    "clock": (faults.says(403, "RequestTimeTooSkewed"), errors.PermanentError, 64),
    "no bucket": (faults.says(404, "NoSuchBucket"), errors.NotFoundError, 64),
    "no store": (faults.reset, errors.StoreError, 1),
}
SIZES = {"large": (5 << 20) * 2 + 7, "sub/middle": 3 << 20, "small": 1000, "empty": 0}
PLACES = (0, 2, 4)  # of the five or six transfers of data that this takes: three parts, and a file each


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that this process's stores go through, and parts small enough for several."""
    with Proxy(s3.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name in ("USUAL", "FIRST"):
            monkeypatch.setattr(patience, name, patience.Patience(tries=6, first=0.01))
        monkeypatch.setattr(patience, "STALL_SECONDS", 1.0)
        monkeypatch.setattr(patience, "ANSWER_SECONDS", 1.0)
        monkeypatch.setattr(incoming, "PART_BYTES", 5 << 20)
        monkeypatch.setattr(s3_store, "_LEAST_PART", 5 << 20)
        yield proxy


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    for name, size in SIZES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(random.Random(name).randbytes(size))
    return made


@pytest.fixture(params=["obstore", "boto3"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ranges are read through obstore, or, where that is missing, through boto3."""
    if request.param == "boto3":
        monkeypatch.setitem(sys.modules, "obstore.store", None)
    return str(request.param)


def unfinished(s3: S3, bucket: str) -> list[object]:
    return s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_can_pass_does_not_fail_a_push(
    fault: Fault, proxy: Proxy, s3_server: S3, bucket: str, directory: Path, said: Callable[[], str]
) -> None:
    """Hurt at several places, every byte is there in the end, nothing is left over, and it is said what happened."""
    store = storage.connect(f"s3://{bucket}/run")
    proxy.hurt_part(fault, PLACES)

    sent = storage.push(store, directory, "merged/")

    assert proxy.hurt == len(PLACES)
    assert "trying again" in said()
    assert s3_server.keys(bucket) == {f"run/merged/{name}" for name in [*SIZES, "manifest.json"]}
    assert sent == manifest.of(directory)
    for name in SIZES:
        there = s3_server.client().get_object(Bucket=bucket, Key=f"run/merged/{name}")["Body"].read()
        assert there == (directory / name).read_bytes(), name
    assert not unfinished(s3_server, bucket)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_can_pass_does_not_fail_a_pull(
    fault: Fault, proxy: Proxy, bucket: str, directory: Path, tmp_path: Path,
    said: Callable[[], str],
) -> None:  # fmt: skip
    """Hurt at several places, every byte is there in the end, nothing is left over, and it is said what happened."""
    store = storage.connect(f"s3://{bucket}/run")
    sent = storage.push(store, directory, "merged/")
    proxy.hurt_part(fault, PLACES)

    got = storage.fetch(store, "merged/", tmp_path / "back" / "merged")

    assert proxy.hurt == len(PLACES)
    assert "again" in said()
    assert got == sent == manifest.of(tmp_path / "back" / "merged")
    assert files(tmp_path / "back") == {*(f"merged/{name}" for name in [*SIZES, "manifest.json"]), "merged.lock"}


@pytest.mark.parametrize(("fault", "kind", "status"), LASTING.values(), ids=LASTING)
def test_what_cannot_pass_ends_a_push(
    fault: Fault, kind: type[errors.JobError], status: int, proxy: Proxy, s3_server: S3, bucket: str, directory: Path
) -> None:
    """At once where no further try could help, after a bounded number of tries elsewhere; nothing looks complete."""
    store = storage.connect(f"s3://{bucket}/run")
    proxy.chosen = lambda request, _: fault if request.part else None

    with pytest.raises(kind) as caught:
        storage.push(store, directory, "merged/")

    assert caught.value.status == status
    assert proxy.hurt <= 8 * (6 if status == 1 else 1), "every hand gives up at its own first error"
    assert s3_server.keys(bucket) <= {"run/merged/empty"}, "a file without content is not a transfer of data"
    assert not unfinished(s3_server, bucket)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(("fault", "kind", "status"), LASTING.values(), ids=LASTING)
def test_what_cannot_pass_ends_a_pull(
    fault: Fault, kind: type[errors.JobError], status: int, proxy: Proxy, bucket: str, directory: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """At once where no further try could help, after a bounded number of tries elsewhere; nothing looks complete."""
    store = storage.connect(f"s3://{bucket}/run")
    storage.push(store, directory, "merged/")
    proxy.chosen = lambda request, _: fault if request.part else None

    with pytest.raises(kind) as caught:
        storage.fetch(store, "merged/", tmp_path / "back")

    assert caught.value.status == status
    assert proxy.hurt <= 8 * (6 if status == 1 else 2), "every hand gives up at its own first error"
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("doing", ["read", "list", "put", "create", "delete", "sealed"])
@pytest.mark.parametrize("fault", [PASSING[name] for name in ("500", "503", "reset", "truncated", "stall")])
def test_small_requests_are_tried_again_too(fault: Fault, doing: str, proxy: Proxy, bucket: str) -> None:
    """Reading a lease is no less exposed than reading a model."""
    store = storage.connect(f"s3://{bucket}/run")
    store.put("manifest.json", manifest.Manifest({}).to_json())
    doings: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("manifest.json"),
        "list": lambda: store.list(""),
        "put": lambda: store.put("there.json", b"new"),
        "create": lambda: store.create("new.json", b"new"),
        "delete": lambda: store.delete("there.json"),
        "sealed": lambda: storage.sealed(store, ""),
    }
    left = iter([fault])
    proxy.chosen = lambda _request, _number: next(left, None)

    outcome = doings[doing]()

    assert proxy.hurt == 1
    assert bool(outcome) is (doing in ("read", "list", "sealed"))


BETWEEN: dict[str, Callable[[Request], bool]] = {
    "begin": lambda request: request.method == "POST" and "uploads" in request.path,
    "complete": lambda request: request.method == "POST" and "uploadId" in request.path,
    "unfinished": lambda request: request.method == "GET" and "uploads" in request.path,
}


@pytest.mark.parametrize("asked", BETWEEN)
@pytest.mark.parametrize("fault", [PASSING[name] for name in ("500", "503", "reset", "lost reply", "truncated")])
def test_what_frames_the_parts_of_an_upload_is_tried_again(
    fault: Fault, asked: str, proxy: Proxy, s3_server: S3, bucket: str, directory: Path
) -> None:
    """Also an upload that was begun twice, because the first answer got lost, leaves nothing behind."""
    store, left = storage.connect(f"s3://{bucket}/run"), iter([fault])
    proxy.chosen = lambda request, _: next(left, None) if BETWEEN[asked](request) else None

    sent = storage.push(store, directory, "merged/")

    assert proxy.hurt == 1
    assert storage.sealed(store, "merged/") == sent == manifest.of(directory)
    assert not unfinished(s3_server, bucket)


@pytest.mark.parametrize("fault", [PASSING[name] for name in ("500", "503", "reset")])
def test_the_stores_checksum_is_asked_for_again(
    fault: Fault, proxy: Proxy, s3_server: S3, bucket: str, directory: Path, tmp_path: Path
) -> None:
    """A model of others' has no manifest; a HEAD that fails must not mean that nothing is known of the file."""
    s3_server.upload(directory, bucket, "theirs")
    store, left = storage.connect(f"s3://{bucket}/theirs"), iter([fault, fault])
    proxy.chosen = lambda request, _: next(left, None) if request.method == "HEAD" else None

    got = storage.pull(store, store.list(), tmp_path / "back")

    assert proxy.hurt == 2
    assert got == manifest.of(directory)


@pytest.mark.usefixtures("reader")
def test_a_trickle_is_not_waited_for(
    proxy: Proxy, bucket: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """A byte now and then keeps every time-out of the network from striking; a part has a deadline besides."""
    monkeypatch.setattr(patience, "PART_SECONDS", 2.0)
    store = storage.connect(f"s3://{bucket}/run")
    sent = storage.push(store, directory, "merged/")
    proxy.hurt_part(faults.trickle, (0, 1))

    got = storage.fetch(store, "merged/", tmp_path / "back")

    assert proxy.hurt == 2
    assert got == sent == manifest.of(tmp_path / "back")
    assert "trying again" in said()


def test_a_trickle_of_a_small_object_is_not_waited_for(
    proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease is read soon or not at all."""
    monkeypatch.setattr(patience, "PART_SECONDS", 1.0)
    store, left = storage.connect(f"s3://{bucket}/run"), iter([faults.trickle])
    store.put("lease.json", b"owner one")
    proxy.chosen = lambda _request, _number: next(left, None)

    blob = store.read("lease.json")

    assert proxy.hurt == 1
    assert blob
    assert blob.data == b"owner one"


def test_a_store_that_knows_no_newer_checksum_gets_an_md5(
    proxy: Proxy, s3_server: S3, bucket: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the AWS setting for such stores says; flipped bytes are noticed no less."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store = storage.connect(f"s3://{bucket}/run")
    proxy.hurt_part(faults.flip, PLACES)
    hurts, seen = proxy.chosen, list[Request]()

    def chosen(request: Request, number: int) -> Fault | None:
        seen.append(request)
        return hurts(request, number)

    proxy.chosen = chosen

    sent = storage.push(store, directory, "merged/")

    assert proxy.hurt == len(PLACES)
    assert all(request.header("Content-MD5") for request in seen if request.part)
    assert not [name for request in seen for name in request.headers if "-crc" in name.lower()]
    assert storage.fetch(store, "merged/", tmp_path / "back") == sent == manifest.of(directory)
    assert not unfinished(s3_server, bucket)


def test_a_store_that_answers_is_given_more_time_than_one_that_never_did(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong URL is told soon; a store that is overloaded when the job starts is waited for."""
    monkeypatch.setattr(patience, "FIRST", patience.Patience(tries=3, first=0.01))
    store, overloaded = storage.connect(f"s3://{bucket}/run"), iter([faults.says(503, "SlowDown")] * 4)
    proxy.chosen = lambda _request, _number: next(overloaded, None)

    store.put("x", b"1")

    assert proxy.hurt == 4, "more than the first patience has"


def test_a_flipped_byte_in_a_small_object_is_noticed(proxy: Proxy, bucket: str) -> None:
    """A lease or a manifest is checked like any file."""
    store = storage.connect(f"s3://{bucket}/run")
    store.put("lease.json", b"owner one")
    left = iter([faults.flip])
    proxy.chosen = lambda _request, _number: next(left, None)

    blob = store.read("lease.json")

    assert proxy.hurt == 1
    assert blob
    assert blob.data == b"owner one"


@pytest.mark.parametrize("write", ["create", "replace"])
def test_a_lost_reply_is_not_anothers_success(write: str, proxy: Proxy, bucket: str) -> None:
    """A conditional write that succeeded, though its reply was lost, loses against itself when it is tried again."""
    store = storage.connect(f"s3://{bucket}/run")
    version = ""
    if write == "replace":
        store.create("lease.json", b"before")
        there = store.read("lease.json")
        version = there.version if there else ""
    left = iter([faults.lose_reply])
    proxy.chosen = lambda _request, _number: next(left, None)

    store.create("lease.json", b"mine") if write == "create" else store.replace("lease.json", b"mine", version)

    now = store.read("lease.json")
    assert now
    assert (proxy.hurt, now.data) == (1, b"mine")


@pytest.mark.parametrize("data", [b"other", b"mine"])
def test_anothers_success_is_not_ours(data: bytes, proxy: Proxy, s3_server: S3, bucket: str) -> None:
    """While our request was lost on the way there, somebody else made the key: even with the same bytes we lost."""
    store = storage.connect(f"s3://{bucket}/run")

    def overtaken(_request: Request, _forward: Forward) -> None:
        s3_server.client().put_object(Bucket=bucket, Key="run/lease.json", Body=data)
        raise faults.DroppedError

    left = iter([overtaken])
    proxy.chosen = lambda _request, _number: next(left, None)

    with pytest.raises(errors.ConflictError, match="exists already"):
        store.create("lease.json", b"mine")


def test_a_conditional_write_that_arrives_damaged_is_repaired(proxy: Proxy, s3_server: S3, bucket: str) -> None:
    """By a store that checks nothing itself: the second try finds its own damaged first one, and replaces it."""
    wanted, damaged = b"hello world", b"iello world"
    direct = s3_server.client()  # made here: the store's answer is awaited for a second only

    def careless(request: Request, forward: Forward) -> None:
        forward(request)
        mark = {"written-by": request.header("x-amz-meta-written-by")}
        reply = direct.put_object(Bucket=bucket, Key="run/report/file", Body=damaged, Metadata=mark)
        kept = {name: value for name, value in request.answer.items() if "checksum" not in name.lower()}
        request.answer = {**kept, "ETag": reply["ETag"]}

    left = iter([careless])
    proxy.chosen = lambda request, _: next(left, None) if request.method == "PUT" else None

    storage.connect(f"s3://{bucket}/run").create("report/file", wanted)

    assert direct.get_object(Bucket=bucket, Key="run/report/file")["Body"].read() == wanted


@pytest.mark.parametrize("faster", [False, True])
def test_a_store_without_conditions_on_multipart_uploads_is_looked_at_instead(
    *, faster: bool, proxy: Proxy, s3_server: S3, bucket: str, tmp_path: Path
) -> None:
    """It answers 501 to the last request; the upload ends well, unless somebody else was faster."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "large").write_bytes(random.Random(0).randbytes(12 << 20))

    def unable(request: Request, forward: Forward) -> None:
        if faster:
            s3_server.client().put_object(Bucket=bucket, Key="run/merged/large", Body=b"newer")
        faults.says(501, "NotImplemented")(request, forward)

    proxy.chosen = lambda request, _: unable if request.method == "POST" and request.header("If-None-Match") else None
    store = storage.connect(f"s3://{bucket}/run")

    if faster:
        with pytest.raises(errors.ConflictError, match="merged/large exists already"):
            storage.push(store, tmp_path / "made", "merged/")
        assert s3_server.client().get_object(Bucket=bucket, Key="run/merged/large")["Body"].read() == b"newer"
    else:
        storage.push(store, tmp_path / "made", "merged/")
        assert storage.fetch(store, "merged/", tmp_path / "back") == manifest.of(tmp_path / "made")


def test_an_upload_whose_last_reply_was_lost_is_whole(
    proxy: Proxy, s3_server: S3, bucket: str, directory: Path
) -> None:
    """Putting the parts together succeeded, so asking for it again finds no upload any more, but the file."""
    store = storage.connect(f"s3://{bucket}/run")
    lost: list[str] = []

    def chosen(request: Request, _number: int) -> Fault | None:
        if request.method == "POST" and "uploadId" in request.path:
            lost.append(request.path)
            return faults.lose_reply if len(lost) == 1 else faults.says(404, "NoSuchUpload")
        return None

    proxy.chosen = chosen

    sent = storage.push(store, directory, "merged/")

    assert len(lost) == 2
    assert storage.sealed(store, "merged/") == sent
    assert not unfinished(s3_server, bucket)


def test_a_reader_that_keeps_failing_is_given_up(
    proxy: Proxy, bucket: str, directory: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    """Where obstore cannot read what boto3 can, boto3 reads, and it is said."""
    store = storage.connect(f"s3://{bucket}/run")
    for number in range(8):
        (directory / f"more{number}").write_bytes(bytes([number]) * 2000)
    sent = storage.push(store, directory, "merged/")
    proxy.chosen = lambda request, _: (
        faults.says(400, "InvalidRequest") if request.part and "otocore" not in request.header("User-Agent") else None
    )

    got = storage.fetch(store, "merged/", tmp_path / "back")

    assert got == sent
    assert "reading through obstore fails too often" in said()


def test_new_credentials_are_taken_where_the_old_ones_came_from(
    proxy: Proxy, s3_server: S3, bucket: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes fresh ones into the credentials file while the old ones expire in the middle of a transfer."""
    given = tmp_path / "credentials"
    old = "[default]\naws_access_key_id = EXPIREDKEY\naws_secret_access_key = x\n"
    new = "[default]\naws_access_key_id = {AWS_ACCESS_KEY_ID}\naws_secret_access_key = {AWS_SECRET_ACCESS_KEY}\n"
    given.write_text(old)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(given))

    def expired(request: Request, forward: Forward) -> None:
        given.write_text(new.format(**s3_server.environ))
        faults.says(400, "ExpiredToken")(request, forward)

    proxy.chosen = lambda request, _: expired if "EXPIREDKEY" in request.header("Authorization") else None

    sent = storage.push(storage.connect(f"s3://{bucket}/run"), directory, "merged/")

    assert proxy.hurt >= 1
    assert sent == manifest.of(directory)


def test_without_the_right_to_tidy_up_a_push_succeeds(
    proxy: Proxy, bucket: str, directory: Path, said: Callable[[], str]
) -> None:
    """Who may not list or give up unfinished uploads is told what that means, once."""
    store = storage.connect(f"s3://{bucket}/run")
    proxy.chosen = lambda request, _: (
        faults.says(403, "AccessDenied") if request.method == "GET" and "uploads" in request.path else None
    )

    for place in ("one/", "two/"):
        storage.push(store, directory, place)

    assert said().count("Uploads that a kill cut off are not gone on with, and stay in the bucket") == 1
    assert storage.sealed(store, "two/") == manifest.of(directory)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "InvalidObjectState", errors.DeniedError),
        (400, "KMS.DisabledException", errors.PermanentError),
        (400, "RequestTimeout", errors.StoreError),
        (429, "TooManyRequests", errors.StoreError),
    ],
)
def test_errors_that_no_table_knows_are_judged_by_their_status(
    status: int, code: str, kind: type[errors.JobError], proxy: Proxy, bucket: str
) -> None:
    """What the client did wrong will not pass; what has to do with time may."""
    store = storage.connect(f"s3://{bucket}/run")
    proxy.chosen = lambda _request, _number: faults.says(status, code)

    with pytest.raises(kind) as caught:
        store.put("x", b"1")

    assert type(caught.value) is kind
    assert code in str(caught.value)


@pytest.mark.parametrize("where", ["base", "run"])
def test_a_silent_store_does_not_hold_up_a_stop(
    where: str, proxy: Proxy, s3_server: S3, bucket: str, tiny_model: Path, tiny_run: Callable[..., Path]
) -> None:
    """SIGTERM while every transfer hangs: the job ends with its status before the grace time is over."""
    s3_server.upload(tiny_model, bucket, "models/tiny")
    base, run = {"base": f"s3://{bucket}/models/tiny"}, {"url": f"s3://{bucket}/run"}
    config = tiny_run(model=base) if where == "base" else tiny_run(run=run)
    # The attempt's log is the first thing that is written to the run, and the last.
    proxy.chosen = lambda request, _: faults.stall if request.part and ".probe" not in request.path else None

    process = subprocess.Popen(command("run", config), stderr=subprocess.PIPE, text=True)
    while not proxy.hurt:
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=15)

    assert process.returncode == 75, told
    assert "stopped by SIGTERM" in told


RANDOM = [fault for name, fault in PASSING.items() if name not in ("stall", "expired")]


@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_twenty_may_fail(
    seed: int, proxy: Proxy, s3_server: S3, bucket: str, directory: Path, tmp_path: Path
) -> None:
    """Whatever it asks for, and however it fails; both ways."""
    for number in range(40):
        (directory / f"more{number}").write_bytes(bytes([number]) * 20_000)
    store = storage.connect(f"s3://{bucket}/run")
    proxy.hurt_at_random(RANDOM, 0.05, seed)

    sent = storage.push(store, directory, "merged/")
    got = storage.fetch(store, "merged/", tmp_path / "back")

    assert proxy.hurt >= 2
    assert got == sent == manifest.of(directory) == manifest.of(tmp_path / "back")
    assert not unfinished(s3_server, bucket)


def test_a_listing_that_was_damaged_is_asked_for_again(
    proxy: Proxy, s3_server: S3, bucket: str, directory: Path
) -> None:
    """It has no checksum; what was just sent and seems to lack is there when looked at once more."""
    store = storage.connect(f"s3://{bucket}/run")
    listings = 0

    def damage(request: Request, forward: Forward) -> None:
        forward(request)
        request.content = request.content.replace(b"<Size>1000<", b"<Size>1001<")

    def last(request: Request, _number: int) -> Fault | None:
        nonlocal listings
        listings = 0 if request.method == "PUT" else listings + ("list-type" in request.path)
        return damage if listings == 2 and "list-type" in request.path else None

    proxy.chosen = last

    assert storage.push(store, directory, "merged/") == manifest.of(directory)

    assert proxy.hurt == 1
    assert s3_server.keys(bucket) == {f"run/merged/{name}" for name in [*SIZES, "manifest.json"]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_twenty_may_fail_in_a_run(
    seed: int, s3_server: S3, bucket: str, tiny_model: Path, tiny_run: Callable[..., Path],
    job: Callable[..., subprocess.CompletedProcess[str]],
) -> None:  # fmt: skip
    """A whole run, from the pull to the last upload, through a network that breaks at random."""
    s3_server.upload(tiny_model, bucket, "models/tiny")
    config = tiny_run(run={"url": f"s3://{bucket}/run"}, model={"base": f"s3://{bucket}/models/tiny"})
    with Proxy(s3_server.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.hurt_at_random(RANDOM, 0.05, seed)
        outcome = job("run", config, environ={**s3_server.environ, "AWS_ENDPOINT_URL": proxy.url})

    assert outcome.returncode == 0, outcome.stderr
    assert proxy.hurt >= 3
    assert "run/done.json" in s3_server.keys(bucket)
    assert not unfinished(s3_server, bucket)
