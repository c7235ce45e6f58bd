"""When a directory is complete."""

from pathlib import Path

import pytest
from conftest import files

from job import errors, manifest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "one").write_bytes(b"1")
    (tmp_path / "d" / "sub" / "two").write_bytes(b"22")
    return tmp_path / "d"


def test_a_directory_is_complete_once_it_is_sealed(directory: Path) -> None:
    """Before the manifest is there nothing in it is believed."""
    assert manifest.sealed(directory) is None

    whole = manifest.seal(directory)

    assert manifest.sealed(directory) == whole
    assert {name: file.size for name, file in whole.files.items()} == {"one": 1, "sub/two": 2}
    assert files(directory) == {"one", "sub/two", "manifest.json"}


def test_sealing_again_changes_nothing(directory: Path) -> None:
    """Neither the manifest nor what a killed sealing left is a part of the directory."""
    first = manifest.seal(directory)
    (directory / ".manifest.json.part").write_bytes(b"{")

    assert manifest.seal(directory) == first


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest"])
def test_a_damaged_directory_is_not_complete(directory: Path, damage: str) -> None:
    """A file that is shorter or gone, or a manifest that is cut off."""
    manifest.seal(directory)
    path = directory / ("manifest.json" if damage == "manifest" else "sub/two")
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:1])

    assert manifest.sealed(directory) is None


def test_equal_contents_have_equal_digests(directory: Path) -> None:
    """The digest depends on names and contents, not on times or places."""
    before = manifest.of(directory).digest
    (directory / "one").write_bytes(b"1")

    assert manifest.of(directory).digest == before
    (directory / "one").write_bytes(b"2")
    assert manifest.of(directory).digest != before


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_names_that_leave_the_directory_are_refused(name: str) -> None:
    """Who can write the bucket cannot write the rest of the disk."""
    hostile = manifest.Manifest({name: manifest.File(size=1, sha256="0")})

    with pytest.raises(errors.DamagedError, match="unsafe file name"):
        manifest.parse(hostile.to_json(), "s3://bucket/manifest.json")
