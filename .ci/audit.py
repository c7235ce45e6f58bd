#!/usr/bin/env python3
"""Has a pinned package a known vulnerability? pip-audit over every pin, with the options that follow.

The status is 1 if one has. Where advisories cannot be had that is said, as NOT AUDITED, and the status is 0: a place
without them can still check everything else.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = ("constraints.txt", "requirements.txt", "requirements-dev.txt")


def main(options: Sequence[str]) -> int:
    """Say what is known, and return the exit status."""
    pins = pinned()
    answers, why = ask(pins[:1], options)  # a place that knows nothing of one package is not asked for a hundred
    if any("vulns" in each for each in answers):
        answers, why = ask(pins, options)
    audited = [each for each in answers if "vulns" in each]
    found = [(each, flaw) for each in audited for flaw in each["vulns"]]
    for each, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        say(f"VULNERABLE: {each['name']} {each['version']}: {flaw['id']}, fixed in {fixed}")
    if missing := len(pins) - len(audited):
        say(f"NOT AUDITED: {missing} of {len(pins)} packages: {why}")
    else:
        say(f"{len(pins)} packages audited: {len(found)} known vulnerabilities")
    return 1 if found else 0


def pinned() -> list[str]:
    """Every pin once, as name==version."""
    lines = [line for name in FILES for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return sorted({re.sub(r"[-_.]+", "-", pin[1]).lower() + f"=={pin[2]}" for pin in found if pin})


def ask(pins: Sequence[str], options: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit answers for each pin, or nothing and why."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        tool = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        line = [*tool, "--format=json", "--progress-spinner=off", *options]
        done = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return [], (done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]
    return answers, next((each["skip_reason"] for each in answers if "skip_reason" in each), "")


def say(text: str) -> None:
    """Into the log of who checks."""
    print(text)  # noqa: T201 - a script


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
