"""What the README promises a new user, done as the README says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOT_HERE = {"make test", "make check", "make setup"}  # these run the tests, or make the environment they run in
MAKE = ("make", "-o", ".venv/.ready")  # the environment is there: this test runs in it


def commands(name: str) -> list[str]:
    """The lines of the shell blocks of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def clone(tmp_path: Path, smol_model: Path) -> Path:
    """A copy of what git knows, with the test's environment as .venv and the fetched model and data beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shutil.copytree(smol_model.parent, tmp_path / ".smoke", ignore=lambda _, names: {"run", "cache"} & set(names))
    return tmp_path


def run(line: str, where: Path) -> subprocess.CompletedProcess[str]:
    words = line.split()
    command = [*MAKE, *words[1:]] if words[0] == "make" else words
    outcome = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, (line, outcome.stdout, outcome.stderr)
    return outcome


@pytest.mark.slow
@pytest.mark.every_commit
def test_the_commands_of_the_readme_do_what_it_says(clone: Path) -> None:
    """The smoke run makes, shows and repeats nothing; what comes after it runs too."""
    lines = [line for line in commands("README.md") if line not in NOT_HERE]
    assert lines[0] == "make smoke"

    first = run(lines[0], clone)
    again = run(lines[0], clone)
    for line in lines[1:]:
        run(line, clone)

    before, after = map(float, re.findall(r"dialogues: ([\d.]+) before, ([\d.]+) after", first.stdout)[0])
    assert after < before - 0.5
    base, merged = re.findall(r"  (?:base|merged): +(\S.*)", first.stdout)
    assert base != merged
    assert "entrypoint.py validate" in first.stdout
    assert "done already" in again.stderr
    assert {"adapter", "merged", "report", "done.json"} < {p.name for p in (clone / ".smoke" / "run").iterdir()}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    """And every file that it links to."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")

    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in re.findall(r"make ([a-z-]+)[`\n]", text))
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", text))


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    """Four statuses, in the README as in job/errors.py."""
    from job import errors

    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert {int(row) for row in rows} == {errors.DONE, errors.PERMANENT, errors.AGAIN, errors.FAILED}


def test_the_import_table_of_the_docs_is_the_enforced_one() -> None:
    """docs/architecture.md and tests/test_architecture.py say the same."""
    from test_architecture import ROWS

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {
        name.removesuffix(".py"): int(row)
        for row, names in re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", names)
    }

    assert rows == ROWS
