"""The import table of docs/architecture.md, and the habits that keep the code readable, enforced."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ROWS = {
    "errors": 0, "log": 0,
    "alive": 1, "preemption": 1, "config": 1, "cluster": 1, "manifest": 1, "goodput": 1, "paths": 1,
    "failures": 2, "inputs": 2, "storage": 2, "model": 2,
    "card": 3, "checkpoint": 3, "lease": 3, "claim": 3, "attempts": 3, "outcome": 3,
    "pull": 4, "convert": 4, "prepare": 4, "launch": 4, "train": 4, "merge": 4, "examine": 4, "publish": 4,
    "report": 4, "render": 4, "generate": 4, "chat": 4,
    "cli": 5,
    "entrypoint": 6,
}  # fmt: skip
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "deepspeed"}
MAY_BE_HEAVY = {"model", "convert", "checkpoint", "prepare", "train", "merge", "examine"}
MODULES = sorted([*(ROOT / "job").rglob("*.py"), ROOT / "entrypoint.py"])


def room(path: Path) -> str:
    """The room that a file belongs to: the module or package directly under job/."""
    relative = path.relative_to(ROOT)
    return relative.parts[1].removesuffix(".py") if relative.parts[0] == "job" else relative.stem


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or late, absolutely or relatively, for types or for use."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts
            start = ".".join(package[: -node.level]) + "." if node.level else ""
            origin = f"{start}{node.module or ''}".rstrip(".")
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("job.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_above_its_own(path: Path) -> None:
    """Steps use things, no step imports a step, and nothing imports the entrypoint."""
    own = room(path)
    if own == "__init__":
        assert not rooms_used(path)
        return

    below = {other for other in rooms_used(path) - {own} if ROWS[other] >= ROWS[own]}

    assert not below


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    """A new room is entered into the table, a deleted one leaves it."""
    there = {room(path) for path in MODULES} - {"__init__"}

    assert there == set(ROWS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_appear_only_where_the_table_says(path: Path) -> None:
    """boto3 in the storage room; torch and its family in the rooms that compute."""
    used = {name.split(".")[0] for name in imports(path)}

    if room(path) != "storage":
        assert not used & {"boto3", "botocore", "s3transfer", "huggingface_hub"}
    if room(path) not in MAY_BE_HEAVY:
        assert not used & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_entrypoint_reads_the_environment(path: Path) -> None:
    """Everybody else is handed what he needs of it."""
    reads = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    ]

    assert path.name == "entrypoint.py" or not reads


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_and_files_stay_small(path: Path) -> None:
    """A function of more than 60 lines or a file of more than 400 is two."""
    source = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]

    assert source.count("\n") <= 400
    assert not [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda p: p.name)
def test_every_test_says_in_a_sentence_what_it_specifies(path: Path) -> None:
    """The docstrings of the tests, read in order, are the specification."""
    tests = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]

    assert not [t.name for t in tests if t.name.startswith("test_") and not (ast.get_docstring(t) or "").endswith(".")]
