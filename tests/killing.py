"""How the tests stop the job at one exact moment, and what must be true of a run afterwards."""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conftest import ROOT, S3, command

from job import manifest

SECONDS = 120.0  # that a start may take to reach the moment, or to end


@dataclass(frozen=True)
class Moment:
    """The n-th call of a function in the job's process or in its worker, or its end; see moments/sitecustomize.py."""

    process: str
    module: str
    function: str
    call: int = 1
    after: bool = False
    argument: str = ""


class Stopped:
    """A start of the job that stands still at `moment`."""

    def __init__(
        self, moment: Moment, config: Path, environ: dict[str, str] | None = None, told: Sequence[object] = ()
    ) -> None:  # fmt: skip
        self._reached = config.parent / "reached"
        where = {**asdict(moment), "reached": str(self._reached)}
        self._log = config.parent / "started.log"
        more = {"MOMENT": json.dumps(where), "PYTHONPATH": str(ROOT / "tests" / "moments")}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command(*(told or ("run", config))),
                env={**(environ or os.environ), **more},
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + SECONDS
        while not self._reached.exists():
            assert self._process.poll() is None, f"ended before {moment}: {self.said}"
            assert time.monotonic() < until, f"never came to {moment}: {self.said}"
            time.sleep(0.02)
        ids = json.loads(self._reached.read_text())
        self.job, self.here = ids["job"], ids["here"]
        assert self.job == self._process.pid

    @property
    def said(self) -> str:
        return self._log.read_text()

    def go_on(self) -> None:
        self._reached.unlink()

    def ended(self) -> int:
        """The status, when all processes of this start are gone."""
        status = self._process.wait(SECONDS)
        until = time.monotonic() + 5
        while left := session(self.job):
            assert time.monotonic() < until, f"outlived the job: {left}"
            time.sleep(0.02)
        self._reached.unlink(missing_ok=True)
        return status


def session(number: int) -> list[str]:
    """The command lines of what runs in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            line = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == number and fields[0] not in "ZX":
            found.append(line.replace("\0", " "))
    return found


def download(s3: S3, bucket: str, target: Path) -> Path:
    """The run as it lies in the store, as a folder."""
    for key in s3.keys(bucket, "run/"):
        path = target / key.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.client().download_file(bucket, key, str(path))
    return target


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ in their weights, in the state after the last step, or in what they measured at a step."""
    names = ["adapter/adapter_model.safetensors", "merged/model.safetensors"]
    last = [max((run / "checkpoints").iterdir()) for run in (one, other)]
    pairs = {name: (one / name, other / name) for name in names}
    pairs |= {name: (last[0] / name, last[1] / name) for name in ("adapter.safetensors", "optimizer.safetensors")}
    found = [name for name, (mine, theirs) in pairs.items() if mine.read_bytes() != theirs.read_bytes()]
    mine, theirs = _measured(one), _measured(other)
    return found + [f"{at}: {mine.get(at)} {theirs.get(at)}" for at in mine | theirs if mine.get(at) != theirs.get(at)]


def _measured(run: Path) -> dict[tuple[int, str], float]:
    """Losses and the like by their step, each measured once although a request to stop cuts evaluations off."""
    lines = [json.loads(line) for line in (run / "report" / "metrics.jsonl").read_text().splitlines()]
    aside = ("step", "epoch", "tokens_per_second", "memory_gb")
    found = [((line["step"], what), value) for line in lines for what, value in line.items() if what not in aside]
    assert len(found) == len(dict(found)), "measured twice"
    return dict(found)


def debris(run: Path, attempts: int, keep: int) -> set[str]:
    """What lies in the store of a finished run that nobody needs, or lacks what it promises."""
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    logs = {f"attempts/{n}.jsonl" for n in range(1, attempts + 1)} & files  # one that was killed at once left none
    wanted = {"config.json", "lease.json", "done.json"} | logs
    sealed = [run / place for place in ("adapter", "merged", "report", *checkpoints(run))]
    for directory in sealed:
        whole = manifest.sealed(directory)
        assert whole == manifest.of(directory), directory
        wanted |= {f"{directory.relative_to(run)}/{name}" for name in (*whole.files, manifest.NAME)}
    assert len(checkpoints(run)) <= keep + 1  # the best one
    return files ^ wanted


def checkpoints(run: Path) -> list[str]:
    """Those of which something is there: of one that was killed between its folder and its first file, nothing is."""
    found = (run / "checkpoints").iterdir()
    return sorted(f"checkpoints/{p.name}" for p in found if re.fullmatch(r"\d+-\d+", p.name) and any(p.iterdir()))
