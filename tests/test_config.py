"""Reading configs: what is accepted, what is refused, and how the refusal reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from job import config, errors

SMALL = """\
run:
  name: tiny
  url: s3://bucket/run
model:
  base: s3://bucket/base
data:
  train: [s3://bucket/train.jsonl]
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(errors.ConfigError) as caught:
        config.read(path, overrides)
    return str(caught.value).replace(f"{path}", "run.yaml")


def test_defaults_are_those_worth_trusting(write: Callable[[str], Path]) -> None:
    """A config of four lines is complete, and trains as QLoRA is commonly and safely done."""
    read = config.read(write(SMALL))

    assert (read.lora.r, read.lora.alpha, read.lora.dropout, read.lora.targets) == (16, 32, 0.05, "auto")
    assert (read.train.learning_rate, read.train.schedule, read.train.warmup) == (2e-4, "cosine", 0.03)
    assert (read.train.optimizer, read.train.max_grad_norm) == ("paged_adamw_8bit", 0.3)
    assert (read.model.quantization, read.model.double_quant, read.model.trust_remote_code) == ("nf4", True, False)


def test_a_mistake_in_a_source_is_told_like_any_other(write: Callable[[str], Path]) -> None:
    """With its place in the list, and no word of the other ways to name data."""
    path = write(SMALL)

    for given, told in {
        "{url: s3://b/x.jsonl, wieght: 2}": "wieght: unknown key. Did you mean data.train.1.weight? Allowed here",
        "{url: s3://b/x.jsonl, weight: a}": "weight: was given 'a'; input should be a valid number",
        "{weight: 2}": "url: is missing and has no default: add it",
    }.items():
        message = refusal(path, f"data.train=[s3://b/y.jsonl, {given}]")
        assert f"data.train.1.{told}" in message
        assert "or:" not in message
        assert "tuple" not in message


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(path: Path) -> None:
    """What lies in configs/ can be copied and started."""
    assert config.read(path).run.name


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            "train: {learning_rat: 1e-4}",
            "run.yaml:8: train.learning_rat: unknown key. Did you mean train.learning_rate?",
        ),
        (
            "lora: {learning_rate: 1e-4}",
            "run.yaml:8: lora.learning_rate: unknown key. Did you mean train.learning_rate?",
        ),
        ("trian: {epochs: 1}", "run.yaml:8: trian: unknown key. Did you mean train? Allowed here: run, model"),
        ("train: {epochs: soon}", "run.yaml:8: train.epochs: was given 'soon'; input should be a valid number"),
        ("train: {epochs: -1}", "run.yaml:8: train.epochs: was given -1; input should be greater than 0"),
        ("lora: {r: 16.5}", "run.yaml:8: lora.r: was given 16.5; input should be a valid integer"),
        ("lora: {r: true}", "run.yaml:8: lora.r: was given True; input should be a valid integer"),
        (
            "train: {schedule: cosin}",
            "run.yaml:8: train.schedule: was given 'cosin'; input should be 'cosine', 'linear' or",
        ),
        (
            "lora: {targets: some}",
            "run.yaml:8: lora.targets: was given 'some'; input should be 'auto', 'all-linear' or",
        ),
        ("train: {epochs: 1, max_steps: 5}", "run.yaml:8: train: epochs and max_steps exclude each other"),
        (
            "train: {global_batch_size: 8, micro_batch_size: 3}",
            "is not micro_batch_size 3 x 1 process x a whole number: use micro_batch_size 1 or 2 or 4 or 8",
        ),
        ("train: [1]", "run.yaml:8: train: was given [1]"),
        ("train: {warmup: .inf}", "run.yaml:8: train.warmup: was given inf; input should be a finite number"),
        ("train: {max_steps: 1}", "warmup 0.03 fills all 1 steps, so nothing would be learned"),
        ("2020-01-01: x", "holds something other than plain keys and values"),
        ("lora: {dora: true}\nmodel2: &a [*a]", "holds something other than plain keys and values"),
        ("lora: {r: 8}\nlora: {r: 4}", "run.yaml:9: lora is given twice"),
        ("lora: {r: [", "run.yaml: not valid YAML"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_way_out(
    changed: str, told: str, write: Callable[[str], Path]
) -> None:
    """File, line, key, what was given, what is allowed, and the nearest key."""
    assert told in refusal(write(SMALL + changed))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("run.url", "gs://bucket/run", "must be s3://bucket/prefix or file:///absolute/path"),
        ("run.url", "s3://Bad_Bucket/run", "'Bad_Bucket' is no bucket name"),
        ("run.url", "s3://KEY:SECRET@bucket/run", "must not carry credentials"),
        ("model.base", "hf://name", "must be hf://org/name or hf://org/name@revision"),
        ("run.url", "s3://${BUCKET}/run", "is not expanded: configs take no variables"),
        ("run.name", "My Run", "string should match pattern"),
        ("data.train", "[]", "data.train"),
        ("data.train", "[s3://bucket]", "names a bucket only"),
        ("data.train", '[""]', "must be s3://bucket/key"),
        ("run.url", "file:///", "must not be the root"),
        ("run.url", "~nouser/run", "nouser"),
        ("run.cache", "file:///tmp/x", "must be a path on the local disk"),
        ("data.train", "[hf://org/data]", "hf://datasets/org/name@revision/file or a path"),
        ("data.train", "[hf://datasets/org/data]", "names no files: add /file"),
        ("data.train", "[{url: x.jsonl, weight: 0}]", "data.train"),
        ("data.train", "[{url: x.jsonl, wieght: 2}]", "data.train"),
        ("data.eval", "[{url: x.jsonl, weight: 2}]", "eval sources have no weight"),
        ("model.base", "s3://bucket/run/base", "lies inside run.url s3://bucket/run, where the run writes"),
        ("run.url", "s3://bucket/base", "model.base s3://bucket/base lies inside run.url"),
    ],
)
def test_an_unusable_value_is_refused(key: str, value: str, told: str, write: Callable[[str], Path]) -> None:
    """URLs that lead nowhere, secrets in a config, and variables that nobody would expand."""
    assert told in refusal(write(SMALL), f"{key}={value}")


def test_remote_code_needs_a_pinned_revision(write: Callable[[str], Path]) -> None:
    """Code that comes with a model is run only as the user has read it."""
    at = "model.base=hf://org/name@"

    assert "needs a pinned base" in refusal(write(SMALL), f"{at}main", "model.trust_remote_code=true")
    assert config.read(write(SMALL), [f"{at}{'a' * 40}", "model.trust_remote_code=true"]).model.trust_remote_code


def test_a_missing_key_is_named(write: Callable[[str], Path]) -> None:
    """What has no default must be given."""
    tree = yaml.safe_load(SMALL)
    del tree["model"]["base"]

    assert "model.base: is missing and has no default" in refusal(write(yaml.safe_dump(tree)))


def test_a_section_of_comments_is_an_empty_one(write: Callable[[str], Path]) -> None:
    """Whoever comments out every key gets the defaults, and can still override them."""
    read = config.read(write(SMALL + "train:\n  # epochs: 1\n"), ["train.epochs=2"])

    assert read.train.epochs == 2


def test_a_key_that_came_with_a_later_version_is_no_difference(write: Callable[[str], Path]) -> None:
    """A run that was begun before the key existed goes on if the key has its default now."""
    read = config.read(write(SMALL))
    older = json.loads(config.claimed(read, 0, 1))
    del older["lora"]["dora"]

    assert config.differences(read, json.dumps(older).encode()) == []


def test_overrides_replace_what_the_file_says(write: Callable[[str], Path]) -> None:
    """--set takes YAML values at dotted keys, in sections that the file need not have."""
    read = config.read(write(SMALL), ["train.learning_rate=1e-4", "lora.targets=[q_proj, v_proj]"])

    assert read.train.learning_rate == 1e-4
    assert read.lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("override", ["train.epochs", "=1", "run.name.first=x", "train.epochs=["])
def test_an_override_that_is_none_is_refused(override: str, write: Callable[[str], Path]) -> None:
    """The message quotes the override."""
    assert f"--set {override}" in refusal(write(SMALL), override)


def test_plain_paths_become_urls(write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolved config means the same from every working directory."""
    monkeypatch.chdir(tmp_path)

    read = config.read(write(SMALL), ["data.train=[train.jsonl, more/]", "run.url=./run", "model.base=./base"])

    assert read.data.train == (f"file://{tmp_path}/train.jsonl", f"file://{tmp_path}/more/")
    assert (read.run.url, read.model.base) == (f"file://{tmp_path}/run", f"file://{tmp_path}/base")


def test_only_keys_that_change_the_result_make_another_run(write: Callable[[str], Path]) -> None:
    """Cadence, logging, the place and the number of processes may change under a run; the rest may not."""
    one = config.read(write(SMALL))
    same = config.read(write(SMALL), ["checkpoint.every_steps=7", "train.log_every=1", "run.url=s3://bucket/moved"])
    other = config.read(write(SMALL), ["train.learning_rate=1e-4"])

    assert config.digest(same) == config.digest(one)
    assert config.differences(same, config.claimed(one, 0, 1)) == []
    assert config.digest(other) != config.digest(one)
    assert config.differences(other, config.claimed(one, 0, 1)) == ["train.learning_rate: 0.0002 there, 0.0001 here"]


def test_the_config_is_frozen(write: Callable[[str], Path]) -> None:
    """Nobody changes a run while it runs."""
    with pytest.raises(ValueError, match="frozen"):
        config.read(write(SMALL)).train.epochs = 9  # type: ignore[misc]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A wrong path is a config error, not a traceback."""
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


def test_a_kept_config_can_be_used_again(write: Callable[[str], Path], tmp_path: Path) -> None:
    """What lies under a run URL is a config, also with the note of the attempt that began the run."""
    ours = config.read(write(SMALL))
    kept = tmp_path / "config.json"
    kept.write_bytes(config.claimed(ours, 7, 8))

    assert config.read(kept) == ours
    assert config.began(kept.read_bytes()) == 7


def test_a_key_that_comes_later_does_not_make_a_run_another_one(write: Callable[[str], Path]) -> None:
    """What is at its default is not part of the digest: finished runs stay finished, and others can go on."""
    changed = config.digest(config.read(write(SMALL), ["train.learning_rate=1e-3"]))

    assert (
        config.digest(config.read(write(SMALL))) == "73387eea184546f86df5828b9216efb79907ce474f218e7534c4c93810cddfc3"
    )
    assert changed == "73b415236cec04842ed597f714776064da7fbc9e5dc3a43f14cc10cf42e01a2b"
