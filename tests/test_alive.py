"""The sign of life that probes look at."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job import alive


def test_the_file_is_young_as_long_as_the_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made at once, touched again and again, and gone at the end."""
    monkeypatch.setattr(alive, "BEAT_SECONDS", 0.05)
    sign = tmp_path / "alive"

    end = alive.keep(sign)
    os.utime(sign, (0, 0))
    until = time.monotonic() + 10
    while sign.stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    end()

    assert not sign.exists()


@pytest.mark.parametrize("place", ["missing/alive", "link"])
def test_one_that_cannot_be_written_is_said_and_nothing_more(
    place: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    """The job can do without; a link that somebody put into a shared /tmp is not followed."""
    (tmp_path / "link").symlink_to(tmp_path / "precious")

    alive.keep(tmp_path / place)()

    assert "FINETUNE_ALIVE) cannot be written" in said()
    assert not (tmp_path / "precious").exists()
