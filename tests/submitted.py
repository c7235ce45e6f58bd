"""The folder that a user submits jobs from, and what becomes of them."""

import re
import sys
import time
from pathlib import Path

from conftest import ROOT

# Stands in for the job where only its end matters: ends after SECONDS with STATUS, or with 75 when it is asked to.
STAND_IN = """#!/bin/bash
echo "start ${SLURM_RESTART_COUNT:-0} on $(hostname), GPU $CUDA_VISIBLE_DEVICES, until $SLURM_JOB_END_TIME: $*"
trap 'asked=yes' USR1 TERM
[ -z "$DEAF" ] || trap '' USR1 TERM
for ((i = 0; i < ${LASTS:-0} * 10; i++)); do [ -z "$asked" ] || { echo "asked"; exit 75; }; sleep 0.1; done
exit "${STATUS:-0}"
"""


class Checkout:
    """The folder that jobs are submitted from, with the scripts as somebody edited them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "slurm").mkdir(parents=True)
        (folder / "entrypoint.py").symlink_to(ROOT / "entrypoint.py")
        (folder / ".venv").symlink_to(sys.prefix)
        for script in (ROOT / "slurm").iterdir():
            (folder / "slurm" / script.name).write_text(script.read_text())
        self.edit("train.sbatch", CACHE=folder / "cache")

    def edit(self, script: str, **settings: object) -> None:
        """Change lines such as NAME=value."""
        path = self.folder / "slurm" / script
        text = path.read_text()
        for name, value in settings.items():
            text, changed = re.subn(rf"^{name}=\S+", f"{name}={value}", text, flags=re.MULTILINE)
            assert changed == 1, name
        path.write_text(text)

    def stand_in(self) -> None:
        """From now on not the job itself is started, but the script above."""
        (self.folder / ".venv").unlink()
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        python = self.folder / ".venv" / "bin" / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def said(self, job: str, name: str = "finetune") -> str:
        log = self.folder / f"{name}-{job}.log"
        return log.read_text() if log.exists() else ""

    def until(self, text: str, job: str, name: str = "finetune") -> None:
        """Wait until a job has said it."""
        end = time.monotonic() + 120
        while text not in self.said(job, name):
            assert time.monotonic() < end, self.said(job, name)
            time.sleep(0.05)

    @property
    def left(self) -> list[Path]:
        """What the scripts keep from one start to the next."""
        return list(self.folder.glob(".failures*"))
