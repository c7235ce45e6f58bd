"""The memory that this process's container may have, and how many processes the kernel killed."""

import re
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63 where there is none
# The files of a limit and of what is used of it, in version 2 and in version 1.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Of memory.stat: pages of files, which the kernel drops when memory is wanted. Version 1 counts
# those of a group with all groups in it as `total_…`.
_CACHED = re.compile(r"^(total_)?(in)?active_file (\d+)$", re.MULTILINE)


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
    return min((limit for limit, _ in _find_limits(root, own)), default=None)


def unused_memory(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Return the bytes of memory that this container may still take; None without a limit.

    A base model that was just downloaded fills the page cache, which counts as used and can be
    dropped.
    """
    return min((max(0, limit - used) for limit, used in _find_limits(root, own)), default=None)


def _find_limits(root: Path, own: Path) -> list[tuple[int, int]]:
    """Return the limits of this process's group and of those around it, each with what is used."""
    limits = []
    for folder in _folders(root, own):
        for limit_file, usage_file in _LIMITS:
            text, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if text.isdecimal() and int(text) < _NO_LIMIT:
                used = int(usage) if usage.isdecimal() else 0
                limits.append((int(text), max(0, used - _count_cached(folder))))
    return limits


def _count_cached(folder: Path) -> int:
    """Return the bytes of files' pages that a group and those within it have in memory."""
    found = _CACHED.findall(_read(folder / "memory.stat"))
    total = [count for prefix, _, count in found if prefix] or [count for _, _, count in found]
    return sum(map(int, total))


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
