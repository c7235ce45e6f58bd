"""The exit status that a process of the job ends with."""

import subprocess
import sys

import pytest
from conftest import ROOT

STOP = "os.kill(os.getpid(), signal.SIGTERM)"
# What C code does that calls back into Python and takes no notice of the exception there.
PROGRAM = """
import os, signal, sys
from job import errors, outcome

def load():
    try:
        {happens}
    except BaseException as e:
        raise SystemError("error return without exception set") from e

def interrupted_below_c(notice, after):
    try:
        load()
    except Exception as e:
        {then}

outcome.conclude(interrupted_below_c, as_json=False, debug=False)
"""


@pytest.mark.parametrize(
    ("happens", "then", "status", "message"),
    [
        (STOP, "raise", 75, "stopped by SIGTERM"),
        (STOP, "raise errors.ModelError('cannot load it') from e", 75, "stopped by SIGTERM"),
        (STOP, "raise errors.FencedError('another attempt owns the run')", 75, "another attempt"),
        ("raise ValueError('torn')", "raise", 1, "unexpected SystemError"),
        ("raise ValueError('torn')", "raise errors.ModelError('no') from e", 64, "no"),
    ],
)
def test_a_request_to_stop_stays_one_whatever_a_library_makes_of_it(
    happens: str, then: str, status: int, message: str
) -> None:
    """Nor what our own code makes of that; an error of its own while the job ends is another one."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(happens=happens, then=then)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ended.returncode == status, ended.stderr
    assert message in ended.stderr
