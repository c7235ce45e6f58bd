"""Every name that the job uses, in the store and on the local disk."""

import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from job import errors, log

CONFIG = "config.json"
DONE = "done.json"
LEASE = "lease.json"
ADAPTER = "adapter/"
MERGED = "merged/"
REPORT = "report/"
CHECKPOINTS = "checkpoints/"
ATTEMPTS = "attempts/"
PREPARED = "prepared/"  # tokenized data, for the other machines of the run
PROBE = ".probe/"
_CHECKPOINT = re.compile(rf"^{CHECKPOINTS}(\d+)-(\d+)/")
SEEN = "seen.json"  # in the report: what the result is like
HELD_OUT = "held-out.json"  # examples to look at the result with
TRAINING = "training.json"  # beside the adapter: what it was trained on, and how it went


def attempt(number: int, node: int = 0) -> str:
    """The log of attempt `number` on machine `node`, in the store."""
    return f"{ATTEMPTS}{number}{f'-node{node}' if node else ''}.jsonl"


def checkpoint(step: int, number: int) -> str:
    """The checkpoint that attempt `number` wrote after `step`; no two attempts share a name."""
    return f"{CHECKPOINTS}{step:08d}-{number}/"


class Place(NamedTuple):
    """A checkpoint by its name in the store."""

    step: int
    attempt: int
    name: str


def parsed(key: str) -> Place | None:
    """The checkpoint that a file with this key belongs to; None if somebody else put it there."""
    found = _CHECKPOINT.match(key)
    return Place(int(found[1]), int(found[2]), found[0]) if found else None


@dataclass(frozen=True)
class Cache:
    """The local disk, which may be empty at every start."""

    root: Path
    run: str  # what tells this run's files from other runs': a digest of its URL

    @classmethod
    def of(cls, root: Path, run_url: str, node: int = 0) -> "Cache":
        """The cache at `root` as machine `node` of the run at `run_url` sees it; two may have the same disk."""
        return cls(root, digest(run_url) + (f"-{node}" if node else ""))

    def check(self) -> None:
        """Raise `errors.ConfigError` if it belongs to another user; that of a mounted disk mostly belongs to root.

        Who else can write there decides which weights are trained and published. Some disks (EFS access points, NFS
        with all_squash) give every file another owner than who made it: there it counts that a new file has the same.
        """
        seen = self.root.stat() if self.root.exists() else None
        if seen and seen.st_uid not in (0, os.geteuid()):
            with tempfile.TemporaryFile(dir=self.root) as made:
                ours = os.fstat(made.fileno()).st_uid
            if ours != seen.st_uid:
                raise errors.ConfigError(
                    f"the cache {self.root} belongs to user {seen.st_uid}, and this is user {os.geteuid()}: set "
                    "run.cache to a folder of your own"
                )
        if seen and seen.st_mode & stat.S_IWOTH:
            log.warn(
                "cache.open",
                f"everybody on this machine may write into the cache {self.root}, and so choose what is trained: where "
                "there are others, set run.cache to a folder below it, which the job makes for itself",
            )

    def make(self) -> None:
        """Make its folder, for this user alone."""
        self.check()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def base(self, fingerprint: str) -> Path:
        """A base model, shared by all runs that use it."""
        return self.root / "models" / fingerprint

    def adapter(self, fingerprint: str) -> Path:
        """An adapter that is merged on its own."""
        return self.root / "models" / f"adapter-{fingerprint}"

    def converted(self, fingerprint: str, made_by: str) -> Path:
        """What the code `made_by` makes of a base model that transformers does not load as it is."""
        return self.root / "models" / f"converted-{fingerprint}-{made_by}"

    def conversions(self, fingerprint: str) -> list[Path]:
        """What any code has made of it."""
        found = (self.root / "models").glob(f"converted-{fingerprint}-*")
        return [path for path in found if path.is_dir() and not path.name.endswith(".partial")]

    def data(self, fingerprint: str) -> Path:
        """Raw data files, shared by all runs that use them."""
        return self.root / "data" / fingerprint

    def prepared(self, fingerprint: str) -> Path:
        """Tokenized data, shared by all runs that prepare the same files in the same way."""
        return self.root / "prepared" / fingerprint

    def kernels(self) -> Path:
        """Kernels that Triton compiled; their names contain everything that they depend on."""
        return self.root / "triton"

    def shelves(self) -> list[Path]:
        """Where the directories lie that may be evicted when nobody uses them."""
        return [self.root / name for name in ("models", "data", "prepared", "runs")]

    def log(self) -> Path:
        """What the attempt under way has logged."""
        return self.root / "logs" / f"{self.run}.jsonl"

    def work(self, name: str) -> Path:
        """Scratch of this run, removed when it is done."""
        return self.root / "runs" / self.run / name


TERMS = r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)[^/]*"
"""What files are called that say what may be done with a model; as a regular expression, in any case."""


def digest(text: str) -> str:
    """A short name for `text` that is safe in file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
