"""Rendering in several processes: nothing but the time it takes depends on how many there are."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import seeing
from conftest import command
from PIL import Image

from job import cluster, errors, manifest
from job.cluster import hardware
from job.prepare import crew
from job.prepare.crew import Batch, Crew, Recipe
from job.prepare.formats import Example
from job.prepare.tokens import Row


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, after the first batch, for text too."""
    monkeypatch.setattr(crew, "_ALONE", 1)
    monkeypatch.setattr(crew, "_CORES", 2)
    monkeypatch.setattr(cluster, "cpus", lambda: 3)


@pytest.fixture
def recipe(tiny_model: Path) -> Recipe:
    return Recipe(tiny_model, "auto", False, 64, "assistant", None, "it is blind")  # noqa: FBT003 - in a row


def batches(count: int) -> Iterator[Batch]:
    """Of seven examples each, of which the last cannot be used."""
    for number in range(count):
        told = [(f"{number}:{each}", Example(({"role": "user", "content": f"What is {number} and {each}?"},
                 {"role": "assistant", "content": f"It is {number + each}."}))) for each in range(6)]  # fmt: skip
        yield [*told, (f"{number}:6", Example(({"role": "user", "content": "?" * 100}, told[0][1].messages[1])))]


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "job.prepare.crew" in " ".join(each.cmdline())]


def test_several_processes_give_the_same_rows_in_the_same_order(recipe: Recipe) -> None:
    """With the reasons why there is none; they are gone when the crew is closed."""
    made = Crew(recipe.renderer(), recipe)
    alone = recipe.renderer()

    given = list(made.rows(batches(11)))

    assert len(children()) == 3
    made.close()
    assert not children()
    assert [batch for batch, _ in given] == list(batches(11))
    for batch, rows in given:
        expected = list(alone.rows([example for _, example in batch]))
        assert [isinstance(row, Row) for row in rows] == [True] * 6 + [False]
        assert list(map(str, rows)) == list(map(str, expected))


def test_few_records_start_no_process(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer than the work."""
    monkeypatch.setattr(crew, "_ALONE", 8)
    made = Crew(recipe.renderer(), recipe)

    assert len(list(made.rows(batches(8)))) == 8
    assert not children()


def test_data_are_the_same_whoever_prepares_them(
    tmp_path: Path, prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: on which machine it was does not tell if a checkpoint belongs to them. With images too."""
    seeing.records(tmp_path)
    base = seeing.base("qwen2_5_vl", tmp_path / "base")
    monkeypatch.setattr("job.prepare.preparation._BATCH", 3)
    digests = []
    for processors in (1, 3):
        monkeypatch.setattr(cluster, "cpus", lambda many=processors: many)
        folder = prepared(tmp_path / "train.jsonl", model=base, images=tmp_path)
        digests.append({name: file.sha256 for name, file in manifest.of(folder).files.items()})
        (folder / manifest.NAME).unlink()

    assert digests[0] == digests[1]
    assert "train.arrow" in digests[0]


def test_a_process_that_is_killed_is_missed_at_once(recipe: Recipe) -> None:
    """And says how it ended, which is worth another start."""
    made = Crew(recipe.renderer(), recipe)
    rows = made.rows(batches(100))
    for _ in range(5):
        next(rows)

    for each in children():
        each.kill()

    with pytest.raises(errors.JobError, match="that prepared the data ended with status -9; the kernel does"):
        list(rows)
    made.close()


def test_what_nobody_thought_of_is_told_by_its_name(recipe: Recipe) -> None:
    """And not only that a process is gone."""
    made = Crew(recipe.renderer(), Recipe(**{**vars(recipe), "max_length": "?"}))

    with pytest.raises(errors.JobError, match="a process that prepared the data met TypeError: "):
        list(made.rows(batches(5)))
    made.close()


def test_what_a_base_cannot_do_is_said_as_it_is_in_one_process(recipe: Recipe, tmp_path: Path) -> None:
    """By the error that a process met, with its message."""
    made = Crew(recipe.renderer(), Recipe(**{**vars(recipe), "base": tmp_path}))

    with pytest.raises(errors.ModelError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        list(made.rows(batches(5)))
    made.close()
    assert not children()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_the_processes_go_with_the_job(
    number: signal.Signals, status: int, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Asked to stop, as a scheduler asks every process at once, the job ends with 75; killed, it takes them along."""
    if hardware.cpus() < 2:
        pytest.skip("needs two cores")
    base = seeing.base("llava", tmp_path / "base")
    Image.effect_noise((256, 256), 64).save(tmp_path / "noise.png")  # some of which make a batch
    asked = {"role": "user", "content": "<image>What is it?"}
    row = {"messages": [asked, {"role": "assistant", "content": "Noise."}], "image": "noise.png"}
    config = tiny_run(model={"base": str(base)}, data={"eval": []})
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 20_000)
    with subprocess.Popen(command("run", config), stderr=subprocess.PIPE, start_new_session=True) as process:
        started = time.monotonic()
        while len(there := psutil.Process(process.pid).children()) < 2:
            assert time.monotonic() - started < 120
            assert process.poll() is None
            time.sleep(0.1)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        assert process.wait(60) == status
    assert not psutil.wait_procs(there, timeout=30)[1]
