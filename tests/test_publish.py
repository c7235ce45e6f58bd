"""When a run is done, and the page that says so."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from job import config, errors, goodput, manifest, paths, preemption, publish, report, storage

FACTS = {
    "base": "s3://b/base",
    "inputs": {"base": "d1", "data": "d2"},
    "steps": 20,
    "step_kept": 10,
    "epochs": 1.5,
    "tokens": 12345,
    "loss_measured_on": "eval",
    "loss_before": 4.5,
    "loss_after": 3.25,
}
SPENT = goodput.Spent(2, {"load": 20.0, "train": 60.0, "lost": 20.0}, 3)


@pytest.fixture
def settings(tiny_run: Callable[..., Path]) -> config.Config:
    return config.read(tiny_run())


@pytest.fixture
def facts(settings: config.Config) -> dict[str, object]:
    return FACTS | {"inputs": {"base": "d1", "data": "d2", "config": config.digest(settings), "began": "0"}}


@pytest.fixture
def store(tmp_path: Path) -> storage.Store:
    """A run whose three artefacts are published."""
    made = storage.connect((tmp_path / "run").as_uri())
    for place in (paths.ADAPTER, paths.MERGED, paths.REPORT):
        (tmp_path / place).mkdir()
        (tmp_path / place / "file").write_text(place)
        publish.directory(made, tmp_path / place, place, lambda: None)
    return made


def test_a_run_is_done_when_everything_it_names_is_there(
    store: storage.Store, settings: config.Config, facts: dict[str, object]
) -> None:
    """The record names inputs, outputs, versions and losses."""
    assert publish.finished(store, settings, 0) is None

    record = publish.done(store, settings, facts, SPENT, 3, lambda: None)

    assert publish.finished(store, settings, 0) == record
    assert record["inputs"] == facts["inputs"]
    assert set(record["artefacts"]) == {"adapter/", "merged/", "report/"}
    assert record["attempt"] == 3
    assert (record["time"]["goodput"], record["time"]["lost_steps"]) == (0.6, 3)
    assert record["training"]["loss_after"] == 3.25
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes"} < set(record["versions"])


def test_a_run_whose_artefact_was_lost_is_not_called_done(
    store: storage.Store, settings: config.Config, facts: dict[str, object]
) -> None:
    """The record would name nothing in its place, and be believed for ever."""
    store.delete("merged/manifest.json")

    with pytest.raises(errors.StoreError, match="merged/ is not whole any more: start again"):
        publish.done(store, settings, facts, SPENT, 1, lambda: None)

    assert store.read(paths.DONE) is None


def test_a_successor_that_was_faster_keeps_its_record(
    store: storage.Store, settings: config.Config, facts: dict[str, object]
) -> None:
    """Who was paused before the very last write loses it."""
    confirmed: list[int] = []

    def pause() -> None:
        confirmed.append(1)
        if len(confirmed) == 2:
            store.put(paths.DONE, b"of another start")

    with pytest.raises(errors.ConflictError):
        publish.done(store, settings, facts, SPENT, 1, pause)

    kept = store.read(paths.DONE)
    assert kept
    assert kept.data == b"of another start"


def test_a_merged_model_of_another_adapter_is_made_again(store: storage.Store, tmp_path: Path) -> None:
    """An adapter that was damaged and trained again elsewhere may differ in its last bits."""
    whole = storage.sealed(store, paths.ADAPTER)
    assert whole
    for digest, fits in ((whole.digest, True), ("another", False)):
        told = {"inputs": {"began": "0"}, "adapter": digest}
        (tmp_path / paths.MERGED / paths.TRAINING).write_text(json.dumps(told))
        publish.directory(store, tmp_path / paths.MERGED, paths.MERGED, lambda: None)

        assert publish.merged(store, 0) is fits


def test_who_was_replaced_while_a_checkpoint_was_on_its_way_takes_its_parts_back(store: storage.Store) -> None:
    """They arrive when the machine wakes up; whole checkpoints stay, and so do those of others."""
    theirs = ["checkpoints/00000004-2/state.json", "checkpoints/best/manifest.json", "checkpoints/notes.txt"]
    for key in ("checkpoints/00000004-1/state.json", "checkpoints/00000006-1/manifest.json", *theirs):
        store.put(key, b"{}")
    whole = manifest.Manifest({"state.json": manifest.File(2, "0" * 64)})
    store.put("checkpoints/00000002-1/state.json", b"{}")
    store.put("checkpoints/00000002-1/manifest.json", whole.to_json())

    with pytest.raises(errors.FencedError), publish.tidied(store, 1, preemption.Notice()):
        raise errors.FencedError("taken for dead")

    kept = ["checkpoints/00000002-1/manifest.json", "checkpoints/00000002-1/state.json", *theirs]
    assert {entry.key for entry in store.list(paths.CHECKPOINTS)} == set(kept)


def test_what_others_put_beside_the_checkpoints_is_not_ours(store: storage.Store) -> None:
    """Somebody's copy of a good one is no reason to fail."""
    store.put("checkpoints/best/manifest.json", b"{}")
    store.put("checkpoints/00000020-1/manifest.json", b"{}")

    assert publish.progress(store, 0) == (0, 0, 20)


@pytest.mark.parametrize("damage", ["changed", "gone", "unreadable", "empty"])
def test_a_record_that_does_not_fit_is_not_believed(
    damage: str,
    store: storage.Store,
    settings: config.Config,
    facts: dict[str, object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An artefact that changed or vanished, and a record that is cut off, make the run unfinished, and it is said."""
    publish.done(store, settings, facts, SPENT, 1, lambda: None)
    if damage == "changed":
        (tmp_path / paths.MERGED / "file").write_text("other weights")
        publish.directory(store, tmp_path / paths.MERGED, paths.MERGED, lambda: None)
    elif damage == "gone":
        store.delete("merged/manifest.json")
    else:
        store.put(paths.DONE, b'{"artefacts"' if damage == "unreadable" else b"{}")

    assert publish.finished(store, settings, 0) is None
    assert "merged/" in caplog.text or "cannot be read" in caplog.text


def test_a_record_of_another_config_is_refused(
    store: storage.Store, facts: dict[str, object], settings: config.Config, tiny_run: Callable[..., Path]
) -> None:
    """Also when config.json was lost."""
    publish.done(store, settings, facts, SPENT, 1, lambda: None)

    with pytest.raises(errors.ConfigError, match="is of a run with another config"):
        publish.finished(store, config.read(tiny_run(lora={"r": 4})), 0)


@pytest.mark.parametrize(("made", "stays"), [(3, True), (0, False)])
def test_without_a_merge_the_merged_model_is_not_asked_for(
    *, made: int, stays: bool, store: storage.Store, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Who wants the adapter only is done with it; a merged model from before a restart would not fit it and goes."""
    settings = config.read(tiny_run(merge={"enabled": False}))
    adapter = storage.sealed(store, paths.ADAPTER)
    assert adapter
    told = {"inputs": {"began": str(made)}, "adapter": adapter.digest}
    (tmp_path / paths.MERGED / paths.TRAINING).write_text(json.dumps(told))
    publish.directory(store, tmp_path / paths.MERGED, paths.MERGED, lambda: None)
    inputs = {"config": config.digest(settings), "began": "3"}

    publish.done(store, settings, FACTS | {"inputs": inputs}, SPENT, 3, lambda: None)

    assert publish.finished(store, settings, 3)
    assert bool(store.list(paths.MERGED)) is stays


def test_the_report_says_what_was_made_of_what(settings: config.Config, tmp_path: Path) -> None:
    """Base, data, losses, counts, the sample and the config, on one page."""
    lengths = {"mean": 14.1, "p50": 12, "p90": 30, "p99": 31, "histogram": [[15, 4], [31, 2]]}
    counts = {
        "records": 9, "examples": 6, "bad": 2, "truncated": 1, "repeated": 1, "leaked": 0, "tokens": 99,
        "trained_tokens": 33, "longest": 31, "lengths": lengths,
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps({"train": counts}))
    (tmp_path / "sample.txt").write_text("Why? ⟦Because.⟧")

    page = (report.write(settings, FACTS, SPENT, tmp_path, "s3://b/run") / report.NAME).read_text()

    assert "eval loss 4.5000 before, 3.2500 after" in page
    assert "| train | 9 | 2 | 1 | 1 | - | 6 | 99 | 33.3% |" in page
    assert "14 on average; half have up to 12, 90% up to 30, 99% up to 31." in page
    assert f"    up to     15         4 {'█' * 40}\n    up to     31         2 {'█' * 20}" in page
    assert "20 (1.50 epochs, 12,345 tokens); the adapter is that of step 10" in page
    assert "⟦Because.⟧" in page
    assert "60.0% of the time of 2 attempt(s) went into training steps that count; 3 step(s) were done twice" in page
    assert "| lost | 20 | 20.0% |" in page
    assert '"learning_rate": 0.01' in page


CLAIM = {"made_of": "1", "base": "s3://bucket/base", "adapter_url": "s3://bucket/adapter"}


def published(store: storage.Store, folder: Path, claim: dict[str, str] = CLAIM) -> bool:
    """Whether a merged model had to be published in the place that the claim gets."""
    with publish.claimed(store, claim) as put:
        if put:
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_bytes(b"weights" + claim["made_of"].encode())
            (folder / "training.json").write_text(json.dumps(claim))
            manifest.seal(folder)
            put(folder)
        return put is not None


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_place_of_its_own_is_filled_once_and_again_when_it_is_damaged(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whatever ended the start before: the claim was all that it left, or half of the model, or all of it."""
    url = f"s3://{request.getfixturevalue('bucket')}/out" if kind == "s3" else (tmp_path / "out").as_uri()
    store = storage.connect(url)

    with contextlib.suppress(KeyboardInterrupt), publish.claimed(store, CLAIM):
        raise KeyboardInterrupt
    assert [entry.key for entry in store.list("")] == ["training.json"]
    assert published(store, tmp_path / "made")
    assert not published(store, tmp_path / "made")
    store.delete("model.safetensors")
    assert published(store, tmp_path / "made")
    store.delete("manifest.json")
    assert published(store, tmp_path / "made")

    assert {entry.key for entry in store.list("")} == {"manifest.json", "model.safetensors", "training.json"}


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"notes.json": b"{}"}, "holds something else already, such as notes.json: give a place of its own"),
        ({"model.safetensors": b"x", "training.json": b"{}"}, "holds something else already, such as model"),
        ({"training.json": b"loss: 1"}, "holds something else already, such as training.json"),
        (
            {"training.json": json.dumps({**CLAIM, "made_of": "2"}).encode()},
            "is taken by the merge of s3://bucket/adapter into s3://bucket/base, which has not ended",
        ),
    ],
    ids=["one file", "a model", "another training.json", "another merge"],
)  # fmt: skip
def test_a_place_that_is_not_empty_is_left_as_it_is(there: dict[str, bytes], told: str, tmp_path: Path) -> None:
    """Nothing of it looks like a leftover to anybody but who left it."""
    store = storage.connect((tmp_path / "out").as_uri())
    for name, data in there.items():
        store.put(name, data)

    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        published(store, tmp_path / "made")

    assert {entry.key: (tmp_path / "out" / entry.key).read_bytes() for entry in store.list("")} == there


def test_a_merged_model_keeps_its_place_from_other_merges(tmp_path: Path) -> None:
    """They are told what is there."""
    store = storage.connect((tmp_path / "out").as_uri())
    assert published(store, tmp_path / "made")

    with pytest.raises(errors.ConfigError, match="holds something else already, the merge of s3://bucket/adapter into"):
        published(store, tmp_path / "other", {**CLAIM, "made_of": "2"})

    assert not published(store, tmp_path / "made")


def test_who_has_a_merged_model_may_put_things_beside_it_and_write_about_it(tmp_path: Path) -> None:
    """A second start finds the model, and leaves all of it as it is."""
    out = tmp_path / "out"
    store = storage.connect(out.as_uri())
    made = tmp_path / "made"
    made.mkdir()
    (made / "README.md").write_text("a card")
    assert published(store, made)
    (out / "README.md").write_text("a card that took three hours")
    (out / "evals").mkdir()
    (out / "evals" / "mmlu.json").write_text("{}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    assert not published(store, made)

    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda out: (out / "model.safetensors").write_bytes(b"in 4 bits"),
            "holds model.safetensors, which is not as the merge wrote it: remove it, and it is made again",
        ),
        (
            lambda out: ((out / "model.safetensors").unlink(), (out / "model-Q4_K_M.gguf").write_bytes(b"much")),
            "holds model-Q4_K_M.gguf, which the merge did not write and would remove: move it",
        ),
        (
            lambda out: ((out / "manifest.json").unlink(), (out / "model-Q4_K_M.gguf").write_bytes(b"much")),
            "holds model-Q4_K_M.gguf, which the merge did not write and would remove: move it",
        ),
    ],
    ids=["changed", "damaged, and more", "half there, and more"],
)
def test_what_somebody_did_to_a_merged_model_is_not_undone(
    change: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    """To make it again would lose that; it is made again when that is out of the way."""
    out = tmp_path / "out"
    store = storage.connect(out.as_uri())
    assert published(store, tmp_path / "made")
    change(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        published(store, tmp_path / "made")

    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for name in {entry.key for entry in store.list("")} - {"training.json", "manifest.json"}:
        store.delete(name)
    assert published(store, tmp_path / "made")


@pytest.mark.parametrize(("error", "left"), [(errors.ModelError, []), (errors.StoreError, ["training.json"])])
def test_a_claim_of_which_nothing_can_come_is_given_back(
    error: type[Exception], left: list[str], tmp_path: Path
) -> None:
    """So that the next try, with another adapter, finds the place empty; what may pass, keeps it."""
    store = storage.connect((tmp_path / "out").as_uri())

    with pytest.raises(error), publish.claimed(store, CLAIM):
        raise error("no")

    assert [entry.key for entry in store.list("")] == left


def test_a_model_is_not_sealed_in_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    """By somebody who removed the claim: theirs is untouched."""
    store = storage.connect((tmp_path / "out").as_uri())
    theirs = {**CLAIM, "made_of": "2"}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").write_bytes(b"weights")
    manifest.seal(tmp_path / "made")

    with publish.claimed(store, CLAIM) as put:
        assert put
        store.put("training.json", json.dumps(theirs).encode())
        with pytest.raises(errors.ConfigError, match="is taken by the merge of"):
            put(tmp_path / "made")

    assert [entry.key for entry in store.list("")] == ["training.json"]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == theirs
