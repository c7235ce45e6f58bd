"""The memory limit of this process's container, and how many processes the kernel killed for it."""

import re
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63 where there is none


def oom_kills(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Return how many processes of this container the kernel has killed for want of memory.

    0 where it does not tell, as outside of any container.
    """
    for folder in _folders(root, own):
        for name in ("memory.events", "memory.oom_control"):  # of version 2, and of version 1
            if found := re.search(r"^oom_kill (\d+)$", _read(folder / name), re.MULTILINE):
                return int(found[1])
    return 0


def memory_limit(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Return the bytes of memory that this container may have; None without a limit."""
    limits = []
    for folder in _folders(root, own):  # the smallest of all around it counts
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdecimal() and int(text) < _NO_LIMIT:
                limits.append(int(text))
    return min(limits, default=None)


def _folders(root: Path, own: Path) -> list[Path]:
    """Return the folders of this process's memory cgroup and those around it, innermost first.

    A line of /proc/self/cgroup is `0::/path` in version 2 and `7:memory:/path` in version 1. A
    container often sees its own group as the root, whatever the path says: so a folder that is not
    there is left out.
    """
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        inner = top / path.strip("/")
        found += [each for each in (inner, *inner.parents) if each.is_relative_to(top)]
    return [folder for folder in found if folder.is_dir()]


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""
