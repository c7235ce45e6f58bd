"""Code of a base runs only after it was compared with what was sealed."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from conftest import S3
from faults import Fault, Forward, Proxy, Request

from job import config, errors, manifest, paths, pull, storage
from job.model import footprint
from job.pull import kinds, look, verified
from job.storage import directory, patience
from job.storage.checksum import Expected

Sizing = Callable[[], footprint.Footprint | None]
CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineModel(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that the base's code writes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path, marker: Path) -> Path:
    """A merged model with code of its own, as a run publishes it."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    model_config = json.loads((folder / "config.json").read_text())
    model_config["model_type"] = "mine"
    model_config["auto_map"] = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineModel",
    }
    (folder / "config.json").write_text(json.dumps(model_config))
    (folder / "configuration_mine.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (folder / "modeling_mine.py").write_text(MODELING)
    (folder / paths.TRAINING).write_text(json.dumps({"inputs": {}}))
    manifest.seal(folder)
    return folder


@pytest.fixture
def size_up(base: Path, tiny_run: Callable[..., Path], tmp_path: Path) -> Sizing:
    """Size the base up before it is downloaded, as the job does where there are GPUs."""
    settings = config.read(tiny_run(model={"base": str(base), "trust_remote_code": True}))

    def ask() -> footprint.Footprint | None:
        folder = tmp_path / "outline"
        folder.mkdir()
        pull.survey(settings).outline(folder, code=True)
        return footprint.ask(settings, folder)

    return ask


def test_code_as_it_was_sealed_runs(size_up: Sizing, marker: Path) -> None:
    """The model is sized up with it."""
    sizes = size_up()

    assert sizes
    assert sizes.weights > 0
    assert marker.exists()


def append_code(base: Path) -> None:
    with (base / "modeling_mine.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (append_code, "modeling_mine.py"),
        (lambda base: (base / "other.py").write_text("pass"), "other.py"),
        (lambda base: (base / "modeling_mine.py").unlink(), "modeling_mine.py"),
        (lambda base: (base / "config.json").write_text('{"model_type": "x"}'), "config.json"),
    ],
    ids=["changed", "added", "removed", "config"],
)
def test_code_that_was_not_sealed_does_not_run(
    spoil: Callable[[Path], object],
    name: str,
    base: Path,
    size_up: Sizing,
    marker: Path,
    tmp_path: Path,
) -> None:
    """The base is refused with the error of the download, before any of its code has run."""
    spoil(base)
    told = f"is not what its manifest.json says, such as {name}"

    with pytest.raises(errors.ModelError, match=told) as early:
        size_up()
    with pytest.raises(errors.ModelError, match=told) as late:
        pull.base(base.as_uri(), paths.Cache(tmp_path / "cache", "run"))

    assert str(early.value) == str(late.value)
    assert not marker.exists()


def test_a_sealed_base_without_its_manifest_does_not_run(
    base: Path,
    size_up: Sizing,
    marker: Path,
) -> None:
    """The manifest is written last, so the base is not whole."""
    (base / manifest.NAME).unlink()

    with pytest.raises(errors.ModelError, match=r"has no manifest\.json, so it is not whole"):
        size_up()

    assert not marker.exists()


def test_code_of_a_base_that_was_made_elsewhere_runs_as_before(
    base: Path,
    size_up: Sizing,
    marker: Path,
) -> None:
    """There is no manifest of ours to compare it with."""
    (base / paths.TRAINING).unlink()
    append_code(base)

    assert size_up()
    assert marker.exists()


@pytest.mark.parametrize("name", ["config.json", "modeling_mine.py"])
def test_a_file_that_is_too_large_for_code_or_a_config_is_not_read(
    name: str, base: Path, size_up: Sizing, marker: Path
) -> None:
    """The message names the file, its size and the limit."""
    (base / name).write_bytes(b" " * 4_100_000)

    told = rf"{name} has 4\.1 MB, more than the 4\.0 MB that such a file may have"
    with pytest.raises(errors.ModelError, match=told):
        size_up()

    assert not marker.exists()


class Damaging(storage.Folder):
    """A store that keeps a checksum, and damages the first `times` files that it sends."""

    def __init__(self, root: Path, times: int) -> None:
        super().__init__(root)
        self.times = times

    def checksum(self, entry: storage.Entry) -> Expected:  # type: ignore[override]
        return Expected("SHA256", manifest.sha256(self.root / entry.key), hashlib.sha256)

    def stream(self, entry: storage.Entry, start: int, stop: int) -> Iterator[bytes]:
        self.times -= 1
        yield from [b"y = 1"] if self.times >= 0 else super().stream(entry, start, stop)


@pytest.mark.usefixtures("hasty")
def test_a_small_file_that_arrives_damaged_is_read_again(tmp_path: Path) -> None:
    """It is compared with the store's own checksum, as files of the download are."""
    (tmp_path / "modeling.py").write_bytes(b"x = 1")
    once, always = Damaging(tmp_path, 1), Damaging(tmp_path, 100)
    (entry,) = once.list()

    assert storage.read_file(once, entry) == b"x = 1"
    with pytest.raises(errors.DamagedError, match=r"modeling\.py arrived damaged: SHA256 is"):
        storage.read_file(always, entry)


CODE = b"x = 1\n" * 100


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy between this process's stores and the S3 server."""
    with Proxy(s3.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(patience, "USUAL", patience.Patience(tries=6, first=0.01))
        yield proxy


@pytest.fixture(params=["obstore", "boto3"])
def remote(
    request: pytest.FixtureRequest,
    proxy: Proxy,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> storage.Store:
    """A bucket with one file of Python code, read through obstore or boto3 by way of the proxy."""
    if request.param == "boto3":
        monkeypatch.setitem(sys.modules, "obstore.store", None)
    store = storage.connect(f"s3://{bucket}/base")
    store.put("modeling.py", CODE)
    proxy.hurt = 0
    return store


def spoil_answers(proxy: Proxy, method: str, fault: Fault, times: int) -> None:
    """Do `fault` to the next answers about the file of code."""
    left = iter([fault] * times)

    def chosen(request: Request, _number: int) -> Fault | None:
        asked = request.method == method and "modeling.py" in request.path
        return next(left, None) if asked else None

    proxy.chosen = chosen


@pytest.mark.parametrize(
    "fault",
    [faults.says(503, "SlowDown"), faults.reset],
    ids=["503", "reset"],
)
def test_the_checksum_of_a_small_file_is_asked_for_again(
    fault: Fault,
    proxy: Proxy,
    remote: storage.Store,
) -> None:
    """One answer of an overloaded store does not end the job in its first second."""
    (entry,) = remote.list()
    spoil_answers(proxy, "HEAD", fault, 2)

    assert storage.read_file(remote, entry) == CODE
    assert proxy.hurt == 2


@pytest.mark.parametrize("short", [faults.shorten, faults.shorten_chunks], ids=["length", "chunks"])
@pytest.mark.parametrize("read", ["file", "range"])
def test_a_short_answer_is_never_the_whole_file(
    read: str,
    short: Fault,
    proxy: Proxy,
    remote: storage.Store,
) -> None:
    """Where the store keeps no checksum, the number of bytes is what tells."""
    (entry,) = remote.list()
    left = iter([short] * 3)

    def chosen(request: Request, _number: int) -> Fault | None:
        if "modeling.py" not in request.path:
            return None
        return faults.hide_checksum if request.method == "HEAD" else next(left, None)

    proxy.chosen = chosen

    if read == "file":
        assert storage.read_file(remote, entry) == CODE
    else:
        assert storage.read_range(remote, entry, 6, 60) == CODE[6:60]
    assert next(left, None) is None


def test_an_answer_that_is_short_each_time_ends_with_an_error(
    proxy: Proxy,
    remote: storage.Store,
) -> None:
    """A later start may succeed."""
    (entry,) = remote.list()
    spoil_answers(proxy, "GET", faults.shorten, 100)

    with pytest.raises(errors.StoreError, match=r"broke off after 27 of 54 bytes|transfer failed"):
        storage.read_range(remote, entry, 6, 60)

    assert proxy.hurt == 6


def test_a_proxy_that_ignores_ranges_is_noticed(
    proxy: Proxy,
    remote: storage.Store,
) -> None:
    """The whole file is not collected in memory for the sake of 8 bytes."""
    (entry,) = remote.list()
    spoil_answers(proxy, "GET", faults.ignore_range, 3)

    assert storage.read_range(remote, entry, 0, 8) == CODE[:8]
    assert proxy.hurt == 3


class Answering(storage.Folder):
    """A store that keeps no checksum, and answers with `blocks` whatever it is asked for."""

    def __init__(self, root: Path, blocks: list[bytes]) -> None:
        super().__init__(root)
        self.left = iter(blocks)

    def stream(self, _entry: storage.Entry, _start: int, _stop: int) -> Iterator[bytes]:
        return self.left


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("blocks", "message", "unread"),
    [
        ([b"x"], "broke off after 1 of 5 bytes", 0),
        ([b"xxx"] * 99, "more bytes arrived than the 5 requested", 93),
    ],
    ids=["short", "long"],
)
def test_of_a_wrong_number_of_bytes_nothing_is_kept(
    blocks: list[bytes], message: str, unread: int, tmp_path: Path
) -> None:
    """Whatever the store is; and no more is read than shows that it is wrong."""
    (tmp_path / "modeling.py").write_bytes(b"x = 1")
    store = Answering(tmp_path, blocks)
    (entry,) = store.list()

    with pytest.raises(errors.DamagedError):
        storage.read_file(store, entry)
    assert len(list(store.left)) == unread

    store.left = iter(blocks * 3)
    with pytest.raises(errors.DamagedError):
        storage.read_range(store, entry, 0, 5)
    store.left = iter(blocks)
    with pytest.raises(errors.DamagedError, match=message):
        directory._receive_range(store, entry, 0, 5)


def test_an_empty_file_is_not_requested(proxy: Proxy, remote: storage.Store) -> None:
    """HTTP has no range without a byte; some stores refuse what is sent in its place."""
    remote.put("__init__.py", b"")
    (entry, _) = remote.list()
    count = proxy.count

    assert storage.read_file(remote, entry) == b""
    assert storage.read_range(remote, entry, 0, 0) == b""
    assert proxy.count == count


def publish_anew(base: Path) -> None:
    """Put another version into `base`, as a run does that was restarted."""
    append_code(base)
    (base / "helpers.py").write_text("pass")
    manifest.seal(base)


def test_a_base_that_is_replaced_while_it_is_read_is_read_again_by_the_next_start(
    base: Path, proxy: Proxy, s3_server: S3, bucket: str
) -> None:
    """The manifest of the new version does not judge files of the old one: the status is 1."""
    s3_server.upload(base, bucket, "base")
    found = look.base(f"s3://{bucket}/base")

    def replace(request: Request, forward: Forward) -> None:
        forward(request)
        proxy.chosen = lambda _request, _number: None
        publish_anew(base)
        s3_server.upload(base, bucket, "base")

    def chosen(request: Request, _number: int) -> Fault | None:
        last = request.method == "GET" and paths.TRAINING in request.path
        return replace if last else None

    proxy.chosen = chosen

    with pytest.raises(errors.ChangedError) as caught:
        verified.read_sealed(found, {"config.json", "modeling_mine.py"}, "model.base")

    assert proxy.hurt == 1
    assert caught.value.status == 1


class Torn(storage.Folder):
    """A store whose first listing has the files of one moment, and the manifest of a later one."""

    calls = 0

    def list(self, prefix: str = "") -> list[storage.Entry]:
        self.calls += 1
        listed = super().list(prefix)
        if self.calls > 1:
            return listed
        (self.root / "helpers.py").write_text("pass")
        manifest.seal(self.root)
        later = [entry for entry in super().list(prefix) if entry.key == manifest.NAME]
        return [*(entry for entry in listed if entry.key != manifest.NAME), *later]


@pytest.mark.parametrize("when", ["sized up", "pulled"])
def test_a_listing_of_two_versions_is_no_fault_of_the_base(
    when: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is in the manifest and not in the listing came meanwhile: the status is 1."""
    monkeypatch.setattr(storage, "source", lambda _url: Torn(base))
    url, cache = base.as_uri(), paths.Cache(tmp_path / "cache", "run")
    reads: dict[str, Callable[[], object]] = {
        "sized up": lambda: verified.read_sealed(look.base(url), {"config.json"}, "model.base"),
        "pulled": lambda: pull.base(url, cache),
    }

    with pytest.raises(errors.ChangedError, match="was changed while it was read: start again"):
        reads[when]()


def test_a_base_that_is_being_replaced_is_waited_for(
    base: Path,
    size_up: Sizing,
    marker: Path,
) -> None:
    """What stands in place of its manifest meanwhile is no damage: the status is 1."""
    (base / manifest.NAME).write_bytes(directory.void())

    with pytest.raises(errors.ChangedError, match="is being replaced: start again when that"):
        size_up()

    assert not marker.exists()


@pytest.mark.parametrize(
    "damage",
    [b"[1]", b"\xff", b'{"files": {"../x": {"size": 1, "sha256": ""}}}'],
)
def test_a_manifest_that_is_damaged_where_it_is_stored_is_an_error_for_good(
    damage: bytes, base: Path, size_up: Sizing, marker: Path
) -> None:
    """Each start would find the same; the message says how to mend it."""
    (base / manifest.NAME).write_bytes(damage)

    message = f"has a damaged manifest.json: {verified.REBUILD}"
    with pytest.raises(errors.ModelError, match=message):
        size_up()

    assert not marker.exists()


class DamagingOnce(storage.Folder):
    """A store that keeps no checksum, and damages the first manifest that it sends."""

    damaged = False

    def stream(self, entry: storage.Entry, start: int, stop: int) -> Iterator[bytes | memoryview]:
        if entry.key == manifest.NAME and not self.damaged:
            self.damaged = True
            return iter([b"x" * entry.size])
        return super().stream(entry, start, stop)


def test_a_manifest_that_arrives_damaged_is_read_again(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also from a store that keeps no checksum of it."""
    store = DamagingOnce(base)
    monkeypatch.setattr(storage, "source", lambda _url: store)

    content = verified.read_sealed(look.base(base.as_uri()), {"config.json"}, "model.base")

    assert content == {"config.json": (base / "config.json").read_bytes()}
    assert store.damaged


def test_a_manifest_has_a_limit_of_size(base: Path, size_up: Sizing, marker: Path) -> None:
    """It is no larger than other small files that are read into memory."""
    (base / manifest.NAME).write_bytes(b" " * 4_100_000)

    with pytest.raises(errors.ModelError, match=r"manifest\.json has 4\.1 MB, more than the"):
        size_up()

    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"short", "it has 5 bytes"),
        (b"\xff" * 8 + b"{}", "its header would have 18446744073709551615 bytes, the file has 10"),
        ((9).to_bytes(8, "little") + b"{}", "its header would have 9 bytes, the file has 10"),
    ],
)
def test_a_weight_file_that_cannot_hold_its_header_is_an_error_for_good(
    content: bytes, message: str, base: Path
) -> None:
    """It is not mistaken for a transfer that broke off, and nothing is read in vain."""
    (base / "model.safetensors").write_bytes(content)
    found = look.base(base.as_uri())

    with pytest.raises(errors.ModelError, match=rf"is no safetensors file \({message}\)"):
        kinds._tensors(found)
