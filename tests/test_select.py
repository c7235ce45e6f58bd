"""Which examples are trained on and how often: duplicates, leaks between the splits, and the weights of sources."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from datasets import Dataset

from job import config, errors, inputs, manifest, paths, prepare
from job.prepare import select
from job.prepare.tokens import Row


def pairs(numbers: Iterator[int] | range | list[int]) -> list[dict[str, str]]:
    return [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in numbers]


def rows(folder: Path, split: str = "train") -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in Dataset.from_file(str(folder / f"{split}.arrow"))]


def counts(folder: Path) -> dict[str, dict[str, object]]:
    told: dict[str, dict[str, object]] = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return told


def test_equal_examples_are_counted_and_kept(
    prepared: Callable[..., Path], records: Callable[..., Path], said: Callable[[], str]
) -> None:
    """Somebody may have repeated them on purpose."""
    folder = prepared(records("train.jsonl", pairs([1, 2, 1, 3, 1])))

    assert len(rows(folder)) == 5
    assert counts(folder)["train"]["repeated"] == 2
    assert "2 of 5 examples are equal to earlier ones: kept; data.deduplicate: true leaves them out" in said()


def test_equal_examples_are_left_out_if_asked(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """The first one stays where it is; from several files, and told in other words, as long as the tokens are equal."""
    one = records("one.jsonl", pairs([1, 2, 1, 3]))
    other = records("other.jsonl", [{"prompt": "What is 2?", "completion": "It is 2."}])

    folder = prepared(one, other, deduplicate=True)

    assert rows(folder) == rows(prepared(records("plain.jsonl", pairs([1, 2, 3]))))
    told = counts(folder)["train"]
    assert (told["records"], told["examples"], told["repeated"]) == (5, 3, 2)


def test_eval_examples_that_are_trained_on_stop_the_run(
    prepared: Callable[..., Path], records: Callable[..., Path], tmp_path: Path
) -> None:
    """With their number and the first one; nothing is left behind."""
    with pytest.raises(errors.DataError, match="2 of 3 examples are in the training data too") as caught:
        prepared(records("train.jsonl", pairs(range(5))), evaluation=(records("eval.jsonl", pairs([9, 3, 4])),))

    assert "⟦It is 3." in str(caught.value)
    assert not [path for path in (tmp_path / "cache" / "prepared").glob("*") if manifest.sealed(path)]


def test_eval_examples_can_be_taken_out_of_training(
    prepared: Callable[..., Path], records: Callable[..., Path], said: Callable[[], str]
) -> None:
    """All of their equals; the eval split stays as it is."""
    train, evaluation = records("train.jsonl", pairs([0, 3, 1, 3, 2])), records("eval.jsonl", pairs([9, 3, 4]))

    folder = prepared(train, evaluation=(evaluation,), leaks="drop")

    assert len(rows(folder)) == 3
    assert not set(rows(folder)) & set(rows(folder, "eval"))
    assert counts(folder)["eval"]["leaked"] == 1
    assert "1 of 3 examples are in the training data too: they are not trained on" in said()
    with pytest.raises(errors.DataError, match="nothing is left to train on"):
        prepared(records("same.jsonl", pairs([3, 4])), evaluation=(evaluation,), leaks="drop")


def test_leaks_can_be_allowed(
    prepared: Callable[..., Path], records: Callable[..., Path], said: Callable[[], str]
) -> None:
    """To see whether a model can learn by heart, of the very same file too; it is said all the same."""
    train = records("train.jsonl", pairs(range(5)))

    folder = prepared(train, evaluation=(train,), leaks="allow")

    assert len(rows(folder)) == 5
    assert "as data.leaks allows, the eval loss measures memory" in said()


def test_equal_records_are_held_out_together(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """Otherwise every held-out share of data with duplicates would leak; what tells them apart may be unused."""
    told = [{**record, "id": number} for number, record in enumerate(pairs([n % 20 for n in range(200)]))]

    folder = prepared(records("train.jsonl", told), eval_fraction=0.3)

    held = Counter(rows(folder, "eval"))
    assert set(held.values()) == {10}
    assert 1 <= len(held) <= 12
    assert not set(held) & set(rows(folder))


@pytest.fixture
def mixed(tiny_model: Path, tmp_path: Path, records: Callable[..., Path]) -> Callable[..., Path]:
    """Prepare two files of 200 examples, with a weight for each."""

    def run(*weights: float, seed: int = 42) -> Path:
        files = [records(f"{place}.jsonl", pairs(range(place * 200, place * 200 + 200))) for place in (0, 1)]
        tree = {
            "run": {"name": "t", "url": "file:///run", "seed": seed},
            "model": {"base": "file:///nowhere"},
            "data": {"train": [{"url": p.as_uri(), "weight": w} for p, w in zip(files, weights, strict=True)]},
        }
        settings = config.check(tree, config.Places("test", {}))
        given = [
            inputs.DataFile(source.url, path, manifest.sha256(path), source.weight)
            for path, source in zip(files, settings.data.sources("train"), strict=True)
        ]
        base = inputs.Base("file:///nowhere", tiny_model, "digest")
        with ExitStack() as keep:
            return prepare.dataset(settings, base, given, [], paths.Cache(tmp_path / "cache", "run"), keep).path

    return run


def test_sources_are_repeated_by_their_weight(mixed: Callable[..., Path], said: Callable[[], str]) -> None:
    """2.5 is every example twice and a half of them once more; 0.25 is a quarter, and which is drawn by the seed."""
    folder = mixed(2.5, 0.25)

    found = Counter(rows(folder))
    first, second = [found[row] for row in rows(mixed(1, 1))[:200]], [found[row] for row in rows(mixed(1, 1))[200:]]
    assert set(first) == {2, 3}
    assert set(second) == {0, 1}
    assert 70 < first.count(3) < 130
    assert 30 < second.count(1) < 70
    assert rows(folder) == rows(mixed(2.5, 0.25))
    assert rows(folder) != rows(mixed(2.5, 0.25, seed=7))
    assert f"with the weights of the sources an epoch has {len(rows(folder))} examples" in said()


def test_lengths_are_described(prepared: Callable[..., Path], records: Callable[..., Path]) -> None:
    """Percentiles, and a histogram that holds every example."""
    folder = prepared(records("train.jsonl", pairs(range(30))))

    told = counts(folder)["train"]
    lengths = sorted(map(len, rows(folder)))
    described = told["lengths"]
    assert isinstance(described, dict)
    assert described["p50"] in lengths
    assert described["p99"] == told["longest"] == lengths[-1]
    assert sum(count for _, count in described["histogram"]) == 30
    assert described["histogram"][-1][0] == lengths[-1]
    for upto, _ in described["histogram"]:
        counted = sum(count for edge, count in described["histogram"] if edge <= upto)
        assert counted == sum(length <= upto for length in lengths)


def test_rows_are_chosen_in_any_batch(tmp_path: Path) -> None:
    """Also when a batch keeps none of its rows."""
    import numpy as np
    import pyarrow as pa

    path = tmp_path / "x.arrow"
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, 12, 4):
            part = [[number] for number in range(start, start + 4)]
            writer.write_batch(pa.record_batch([part, part], schema=schema))

    assert select.rows(path, np.arange(12) > 5, 2) == [Row([6], [6], truncated=False), Row([7], [7], truncated=False)]
    select.keep(path, np.array([1, 0, 2, 0] + [0] * 4 + [0, 3, 0, 1]))

    found = [row["input_ids"][0] for row in Dataset.from_file(str(path))]
    assert found == [0, 2, 2, 9, 9, 9, 11]
