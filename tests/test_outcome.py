"""The exit status that a process of the job ends with."""

import subprocess
import sys

import pytest
from conftest import ROOT

# What C code does that calls back into Python and takes no notice of the exception there.
PROGRAM = """
import os, signal, sys
from job import outcome

def interrupted_below_c(notice, after):
    try:
        {happens}
    except BaseException as e:
        raise SystemError("error return without exception set") from e

outcome.conclude(interrupted_below_c, as_json=False, debug=False)
"""


@pytest.mark.parametrize(
    ("happens", "status", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 75, "stopped by SIGTERM"),
        ("raise ValueError('torn')", 1, "unexpected SystemError"),
    ],
)
def test_a_request_to_stop_stays_one_whatever_a_library_makes_of_it(happens: str, status: int, message: str) -> None:
    """A library that replaces the exception of a request with its own does not make it a failure."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(happens=happens)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ended.returncode == status, ended.stderr
    assert message in ended.stderr
