"""What training is made from, on the local disk: the base model, the data files, the prepared data, and the task."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import config, errors, paths
from job.config import Config

AT_THE_END = 4.0  # seconds of the cluster's grace that the job needs when training has ended
AFTER_A_LOSS = 15.0  # seconds that the processes of a team have when one is lost, for a checkpoint that is on its way


@dataclass(frozen=True)
class Base:
    """A base model; `digest` says exactly which, wherever it came from and whatever is written about it there."""

    url: str
    path: Path
    digest: str
    fingerprint: str = "any"
    """Names the files without their content: URL, names, sizes and versions."""


def facts(folder: Path) -> dict[str, Any]:
    """What is told of how an adapter or a merged model was made, by the job; nothing if it was made elsewhere."""
    path = folder / paths.TRAINING
    return parse_facts(path.read_bytes(), str(path)) if path.is_file() else {}


def parse_facts(training: bytes, where: str) -> dict[str, Any]:
    """Return what the training.json that came from `where` holds; nothing if others wrote it."""
    try:
        facts = json.loads(training)
    except ValueError as e:
        raise errors.ModelError(f"{where} cannot be read ({e}): download it again") from e
    return facts if isinstance(facts, dict) else {}


def belongs(base: Base, adapter: Path) -> bool:
    """Raise `errors.ModelError` if the `adapter` says that it was trained on another base; False if it says nothing."""
    trained_on = facts(adapter).get("inputs", {}).get("base")
    if trained_on and trained_on != base.digest:
        raise errors.ModelError(
            f"model.base: {base.url} has digest {base.digest}, the adapter was trained on {trained_on}: put that base "
            "back"
        )
    return bool(trained_on)


_IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_HIDDEN = re.compile(r"(^|/)[._]")  # of editors, and of file systems


def is_image(key: str) -> bool:
    """Whether a file of that name counts as an image: those are brought, and looked at for changes."""
    return bool(_IMAGE.search(key)) and not _HIDDEN.search(key)


@dataclass(frozen=True)
class Images:
    """The folder of images that records name by their paths in it."""

    url: str
    path: Path
    digest: str


@dataclass(frozen=True)
class DataFile:
    """A data file as its owner wrote it."""

    url: str
    path: Path
    sha256: str
    weight: float = 1.0
    """How often each of its records is trained on in an epoch."""
    format: str | None = None
    """What the config says of this file alone."""
    images: Images | None = None
    """Where those that its records name lie, if the base sees images and there are any."""


@dataclass(frozen=True)
class Prepared:
    """Tokenized data, and the digest of all they contain."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Start:
    """One start of the run: its attempt number, the attempt that the run began with, and how to know its lease."""

    attempt: int
    began: int
    lease: str
    between: float
    """Mean seconds between two preemptions of this run."""


@dataclass(frozen=True)
class Team:
    """The processes that train together: `processes` on each of `nodes` machines, one of which this is."""

    nodes: int = 1
    node: int = 0
    processes: int = 1
    strategy: str = "ddp"
    first: str = "127.0.0.1"
    port: int = 0
    gpus: bool = False
    """Whether each process has a GPU."""
    sharded_over: int = 0
    """With fsdp, how many processes share one copy of the frozen base; 0 means all of them."""

    @property
    def size(self) -> int:
        """How many there are: the world size."""
        return self.nodes * self.processes

    @property
    def shards(self) -> int:
        """Return how many processes share one copy of the frozen base under fsdp."""
        return self.sharded_over or self.size

    @property
    def grouped(self) -> bool:
        """Whether torch joins them in a group; sharing out takes one, even of a single process."""
        return self.size > 1 or self.strategy != "ddp"

    def rank(self, local: int) -> int:
        """That of process `local` of this machine."""
        return self.node * self.processes + local


@dataclass(frozen=True)
class Outcome:
    """How one process of the team ended, as it said itself, or as was seen of one that was killed."""

    rank: int
    status: int
    why: str
    time: float  # seconds since 1970, by the clock of its machine
    lost: bool = False
    """Whether it ended only because it lost another process of the team."""
    fault: str = ""
    """Which part of the machine failed, as `errors.JobError.fault` names it."""


@dataclass(frozen=True)
class Task:
    """What a training process is told. `out` is sealed when training is done; `scratch` may be lost."""

    config: Config
    start: Start
    team: Team
    base: Path
    data: Path
    out: Path
    scratch: Path
    log: Path
    inputs: Mapping[str, str]
    """Digests of the base and of the data: a checkpoint of other inputs is not resumed."""
    resumed: Path | None
    """The checkpoint to go on from, verified, on this machine."""

    @property
    def grace(self) -> float:
        """Seconds that training has after a request to stop: those of the cluster, or the config, but the last few."""
        told = self._grace
        whole = float(told.read_text("ascii")) if told.exists() else self.config.checkpoint.grace_seconds
        return max(whole - AT_THE_END, whole / 2)

    def allow(self, grace: float) -> None:
        """Let the training know how long the cluster waits, where that is not what the config says."""
        part = self._grace.with_suffix(".part")
        part.write_text(str(grace), encoding="ascii")
        part.rename(self._grace)

    @property
    def at_risk(self) -> bool:
        """Whether the cluster said that the machine may be taken away soon."""
        return self._risk.exists()

    def warn(self) -> None:
        """Let the training know that."""
        self._risk.touch()

    def log_of(self, rank: int) -> Path:
        """Where a process of the team logs: rank 0 into the log of the attempt."""
        return self.scratch / f"rank-{rank}.jsonl" if rank else self.log

    def ended(self, outcome: Outcome) -> None:
        """Keep how a process of the team ended; what it said itself counts more than what others saw."""
        told = self._outcomes / f"{outcome.rank}.json"
        if not told.exists():
            self._outcomes.mkdir(parents=True, exist_ok=True)
            part = told.with_suffix(".part")
            part.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")
            part.rename(told)

    def outcomes(self) -> list[Outcome]:
        """How the processes on this machine ended, the first one first."""
        told = [Outcome(**json.loads(path.read_text("utf-8"))) for path in self._outcomes.glob("*.json")]
        return sorted(told, key=lambda outcome: outcome.time)

    @property
    def _outcomes(self) -> Path:
        return self.scratch / "outcomes"

    @property
    def _risk(self) -> Path:
        return self.scratch / "at-risk"

    @property
    def _grace(self) -> Path:
        return self.scratch / "grace"

    def to_json(self) -> str:
        """The task as the text that `from_json` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            "config": self.config.model_dump(mode="json"),
            "start": dataclasses.asdict(self.start),
            "team": dataclasses.asdict(self.team),
            "resumed": str(self.resumed) if self.resumed else None,
            "inputs": dict(self.inputs),
        }
        return json.dumps(fields | plain, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task that `to_json` wrote."""
        fields = json.loads(text)
        folders = {name: Path(fields[name]) for name in ("base", "data", "out", "scratch", "log")}
        settings = config.check(fields["config"], config.Places("the task", {}))
        return cls(
            config=settings,
            start=Start(**fields["start"]),
            team=Team(**fields["team"]),
            inputs=fields["inputs"],
            resumed=Path(fields["resumed"]) if fields["resumed"] else None,
            **folders,
        )
