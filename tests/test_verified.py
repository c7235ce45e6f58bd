"""Code of a base runs only after it was compared with what was sealed."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job import config, errors, manifest, paths, pull, storage
from job.model import footprint
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

    told = rf"{name} has 4\.1 MB, more than the 4\.0 MB that a config or code may have"
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
        yield from [b"damaged"] if self.times >= 0 else super().stream(entry, start, stop)


@pytest.mark.usefixtures("hasty")
def test_a_small_file_that_arrives_damaged_is_read_again(tmp_path: Path) -> None:
    """It is compared with the store's own checksum, as files of the download are."""
    (tmp_path / "modeling.py").write_bytes(b"x = 1")
    once, always = Damaging(tmp_path, 1), Damaging(tmp_path, 100)
    (entry,) = once.list()

    assert storage.read_file(once, entry) == b"x = 1"
    with pytest.raises(errors.DamagedError, match=r"modeling\.py arrived damaged: SHA256 is"):
        storage.read_file(always, entry)
