"""What the kernel tells of the memory of a container: its limit, and whom it killed for want of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from job.cluster import cgroup

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = {CGROUPS / "memory": "memory.limit_in_bytes", CGROUPS: "memory.max"}  # of versions 1 and 2
KILLED = """
import os, subprocess, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
Path(sys.argv[2], "cgroup.procs").write_text(str(os.getpid()))
from job import cluster

before = cluster.oom_kills(), cluster.memory_limit()
ended = subprocess.run([sys.executable, "-c", "bytearray(300 << 20)"], check=False)
print(*before, ended.returncode, cluster.oom_kills())
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory group of 64 MiB, of the version that this machine has."""
    for parent, limit in LIMITS.items():
        folder = parent / f"test-{os.getpid()}"
        if os.access(parent, os.W_OK) and not folder.mkdir() and (folder / limit).exists():
            (folder / limit).write_text(str(64 << 20))
            yield folder
            folder.rmdir()
            return
        if folder.exists():
            folder.rmdir()
    pytest.skip("no memory cgroup can be made here: that takes root and a writable /sys/fs/cgroup")


def test_the_kernel_counts_whom_it_kills_for_want_of_memory(group: Path) -> None:
    """Here a process that takes more than its group may have."""
    ended = subprocess.run([sys.executable, "-c", KILLED, ROOT, group], capture_output=True, text=True, check=False)

    assert ended.stdout.split() == ["0", str(64 << 20), "-9", "1"], ended.stderr


def write_groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write a tree of control groups and the file that names this process's; return both places."""
    root, told = folder / "fs", folder / "cgroup"
    told.write_text(own)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root, told


EVENTS = "low 0\nhigh 0\nmax 12\noom 4\noom_kill 3\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("own", "files", "kills", "limit"),
    [
        ("0::/\n", {"memory.events": EVENTS, "memory.max": "1000\n"}, 3, 1000),  # a container's own root
        (  # Slurm: a step within a job, whose limit is the smaller one
            "0::/job_7/step_0\n",
            {
                "job_7/step_0/memory.events": EVENTS, "job_7/step_0/memory.max": "max\n",
                "job_7/memory.events": EVENTS.replace("3", "9"), "job_7/memory.max": "500\n",
            }, 3, 500,
        ),
        ("0::/of/the/host\n", {"memory.events": EVENTS, "memory.max": "max\n"}, 3, None),  # not to be seen from here
        (
            "5:cpu:/\n4:memory:/job_7\n",
            {
                "memory/job_7/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
                "memory/job_7/memory.limit_in_bytes": "2000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            }, 2, 2000,
        ),
        ("0::/\n", {}, 0, None),  # outside of any container
    ],
)  # fmt: skip
def test_each_version_is_read_where_it_tells(
    own: str, files: dict[str, str], kills: int, limit: int | None, tmp_path: Path
) -> None:
    """The group of this process, and those around it."""
    root, told = write_groups(tmp_path, own, files)

    assert cgroup.oom_kills(root, told) == kills
    assert cgroup.memory_limit(root, told) == limit


CACHED = "anon 300\nfile 600\nactive_file 150\ninactive_file 400\nshmem 50\n"


@pytest.mark.parametrize(
    ("own", "files", "unused"),
    [
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ("0::/\n", {"memory.max": "300\n", "memory.current": "400\n"}, 0),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "400\n"}, None),
        (  # a base that was just downloaded: pages of its files can be dropped
            "0::/\n",
            {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": CACHED},
            650,
        ),
        (  # Slurm: the job has a limit, and its step has none
            "0::/job_7/step_0\n",
            {
                "job_7/step_0/memory.max": "max\n",
                "job_7/step_0/memory.current": "100\n",
                "job_7/memory.max": "500\n",
                "job_7/memory.current": "350\n",
            },
            150,
        ),
        (  # version 1, where the group's own pages are counted beside those of all within it
            "4:memory:/job_7\n",
            {
                "memory/job_7/memory.limit_in_bytes": "2000\n",
                "memory/job_7/memory.usage_in_bytes": "1900\n",
                "memory/job_7/memory.stat": "inactive_file 1\ntotal_inactive_file 900\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            1000,
        ),
        ("0::/\n", {}, None),  # outside of any container
    ],
)
def test_memory_that_a_container_can_still_take_excludes_files_that_can_be_dropped(
    own: str, files: dict[str, str], unused: int | None, tmp_path: Path
) -> None:
    """In each version, of the tightest of the groups around this process."""
    root, told = write_groups(tmp_path, own, files)

    assert cgroup.unused_memory(root, told) == unused
