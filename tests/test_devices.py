"""On which devices and in which format each model is verified, computed for machines that nobody has to have."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_load_size import GIB, SHAPES

from job import config
from job.examine.devices import Machine, Placement, Work
from job.examine.questions import Questions
from job.examine.sizes import Sizes
from job.model import load_size

WORK = Work(longest=2048, prompts=4, prompt=2048 + 128, adapter=650 * 10**6)
DRIVER = GIB // 2
"""What the driver keeps of a card for itself, roughly: NVML never tells all of it as free."""
Choices = dict[str, list[Placement]]


class Bases:
    """Published models without weights, and where the job verifies each of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, Sizes] = {}  # each remembers what it counted

    def choose(self, name: str, gpus: list[int], host: int, work: Work = WORK) -> Choices:
        """Return the places on a machine with so many GiB on each GPU and on the host, and 8 cores.

        A real `Sizes` counts the models, as in a run that trained on the base in nf4.
        """
        if name not in self._sizes:
            base = self._folder / name
            SHAPES[name].save_pretrained(base)
            self._sizes[name] = Sizes(base, config.Model(base=base.as_uri()))
        machine = Machine(tuple(each * GIB - DRIVER for each in gpus), host * GIB, 8)
        return self._sizes[name].choose(("merged", "adapted", "trained"), machine, work)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def choose_tuned(choices: Choices) -> str:
    """Return the model that answers as the tuned one, without the run around the question."""
    questions: Any = Questions.__new__(Questions)
    questions.choices = choices
    answering: str = questions._choose_tuned()
    return answering


def read_table() -> Iterator[list[str]]:
    """Yield the cells of each row of the table of models and machines in docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = text.partition("| model, GPUs, free host memory |")[2].splitlines()[2:]
    for row in rows:
        if not row.startswith("| "):
            return
        yield [cell.strip() for cell in row.strip("|").split("|")]


def describe_cell(found: list[Placement]) -> str:
    """Return the best place in the words of that table."""
    if not found:
        return "left out, and said"
    place, _, dtype = str(found[0]).rpartition(" in ")
    return f"{place.removeprefix('the ').replace(' of weights', '')}, {dtype}"


def test_the_table_in_the_docs_is_what_the_job_does(bases: Bases) -> None:
    """Every cell of it: the place and the format of each model, and which one answers."""
    answers = {"merged": "of `examine.tokens`"}
    answers["trained"] = f"{answers['merged']}, by the base as trained"
    machine = re.compile(r"(.+), (\d+) × (\d+) GiB, (\d+) GiB")
    rows = 0

    for title, *cells in read_table():
        matched = machine.fullmatch(title)
        assert matched, title
        name, *numbers = matched.groups()
        count, card, host = map(int, numbers)
        choices = bases.choose(name, [card] * count, host)
        found = [describe_cell(choices["merged"]), describe_cell(choices["trained"])]
        assert [*found, answers[choose_tuned(choices)]] == cells, title
        assert choices["adapted"] == choices["merged"]
        rows += 1

    assert rows == 8


@pytest.mark.parametrize(
    ("name", "gpus", "host", "whole", "trained"),
    [
        (
            "Llama-3.1-70B", [24] * 4, 240,
            "4 GPUs, 69 GB of weights in host memory in bfloat16", "4 GPUs in bfloat16",
        ),
        ("Llama-3.1-70B", [], 60, None, "the CPU in bfloat16"),
        ("Qwen2.5-7B", [], 60, "the CPU in bfloat16", "the CPU in bfloat16"),
        ("Qwen2.5-7B", [], 120, "the CPU in float32", "the CPU in float32"),
        ("Qwen2.5-7B", [4], 120, "the CPU in float32", "the CPU in bfloat16"),  # as in training
    ],
)  # fmt: skip
def test_a_model_is_verified_on_the_gpus_that_it_was_trained_on(
    name: str, gpus: list[int], host: int, whole: str | None, trained: str, bases: Bases
) -> None:
    """Those in 16 bits too, if need be with a part in host memory; without a GPU on the CPU, if that holds them."""
    choices = bases.choose(name, gpus, host)

    assert str(choices["merged"][0] if choices["merged"] else None) == str(whole)
    assert str(choices["trained"][0]) == trained


@pytest.mark.parametrize(
    ("name", "card"),
    [("Llama-3.1-8B", 16), ("Qwen2.5-7B", 16), ("Qwen2.5-32B", 40), ("Llama-3.1-70B", 48)],
)
def test_the_base_as_trained_fits_on_the_smallest_card_of_a_preset(
    name: str,
    card: int,
    bases: Bases,
) -> None:
    """With examples as long as there, and the adapter; a quantized model is never partly in host memory."""
    short = Work(longest=1024, prompts=4, prompt=1024 + 128, adapter=WORK.adapter)

    found = bases.choose(name, [card], 30, short)["trained"]

    assert str(found[0]) == "the GPU in bfloat16"
    assert not any(each.offloaded for each in found)


def test_more_is_computed_at_once_where_memory_is_left(bases: Bases) -> None:
    """Positions whose logits are in memory, and prompts that are answered together; one is always possible."""
    roomy = bases.choose("Llama-3.1-70B", [80], 200)["trained"][0]
    tight = bases.choose("Llama-3.1-70B", [48], 200)["trained"][0]

    assert (roomy.positions, roomy.batch) == (1024, 4)
    assert 64 <= tight.positions <= 1024
    assert 1 <= tight.batch < roomy.batch


def test_float32_takes_no_more_than_half_of_the_free_host_memory(bases: Bases) -> None:
    """A CPU computes in bfloat16 where it would; what the command needs in all is bounded by that."""
    need = 7_615_616_512 * 4 * load_size.ROOM

    wide, narrow = (bases.choose("Qwen2.5-7B", [], host)["merged"][0] for host in (80, 55))

    assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
    assert 55 * GIB / 2 < need < 80 * GIB / 2


def test_the_next_choice_is_another_device_or_format(bases: Bases) -> None:
    """For a fault that the sizes did not tell; the last one is the CPU."""
    found = [str(each) for each in bases.choose("Llama-3.1-70B", [80] * 8, 1000)["merged"]]

    assert found == [
        "8 GPUs in float32", "8 GPUs in bfloat16", "the CPU in float32", "the CPU in bfloat16",
    ]  # fmt: skip


def test_what_stays_in_host_memory_takes_its_time_for_each_pass(bases: Bases) -> None:
    """So that no more examples are read than there is time for; many positions share one pass."""
    machine = Machine((80 * GIB,), 200 * GIB, 8)
    placement = bases.choose("Llama-3.1-70B", [80], 200)["merged"][0]
    outline = load_size.outline(SHAPES["Llama-3.1-70B"], None, torch.bfloat16)
    size = load_size.measure(outline, None, torch.bfloat16)

    transfer = placement.offloaded / 1e10
    passes = [placement.seconds(size, 1, trained, machine) for trained in (1, 1024, 1025)]

    assert transfer == pytest.approx(6.8, abs=0.2)
    assert passes == [pytest.approx(count * transfer, rel=0.01) for count in (1, 1, 2)]
