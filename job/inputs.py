"""What training is made from, on the local disk: the base model, the data files, the prepared data, and the task."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from job import config
from job.config import Config


@dataclass(frozen=True)
class Base:
    """A base model; `digest` says exactly which, wherever it came from."""

    url: str
    path: Path
    digest: str


@dataclass(frozen=True)
class DataFile:
    """A data file as its owner wrote it."""

    url: str
    path: Path
    sha256: str


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
class Task:
    """What a training process is told. `out` is sealed when training is done; `scratch` may be lost."""

    config: Config
    start: Start
    base: Path
    data: Path
    out: Path
    scratch: Path
    log: Path
    inputs: Mapping[str, str]
    """Digests of the base and of the data: a checkpoint of other inputs is not resumed."""

    @property
    def grace(self) -> float:
        """Seconds that are left after a request to stop: what the job was told by the cluster, or else the config."""
        told = self._grace
        return float(told.read_text("ascii")) if told.exists() else self.config.checkpoint.grace_seconds

    def know(self, grace: float) -> None:
        """Let the training know what the cluster said; to be called before it is asked to stop."""
        self._grace.write_text(str(grace), encoding="ascii")

    @property
    def _grace(self) -> Path:
        return self.scratch / "grace"

    def to_json(self) -> str:
        """The task as the text that `from_json` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            "config": self.config.model_dump(mode="json"),
            "start": dataclasses.asdict(self.start),
            "inputs": dict(self.inputs),
        }
        return json.dumps(fields | plain, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task that `to_json` wrote."""
        fields = json.loads(text)
        folders = {name: Path(fields[name]) for name in ("base", "data", "out", "scratch", "log")}
        settings = config.check(fields["config"], config.Places("the task", {}))
        return cls(config=settings, start=Start(**fields["start"]), inputs=fields["inputs"], **folders)
