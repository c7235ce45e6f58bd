"""What can be known before anything is downloaded, and what is used in place."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import S3, files

from job import config, errors, manifest, paths, pull, storage
from job.pull import look


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture
def settings(base: Path, tiny_run: Callable[..., Path]) -> config.Config:
    return config.read(tiny_run(model={"base": str(base)}))


@pytest.fixture
def cache(tmp_path: Path) -> paths.Cache:
    return paths.Cache(tmp_path / "cache", "run")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda b: (b / "model.safetensors").unlink(), "has no weights at all: the job reads *.safetensors"),
        (lambda b: (b / "model.safetensors").rename(b / "flax_model.msgpack"), "has only flax_model.msgpack"),
        (lambda b: (b / "model.safetensors").rename(b / "pytorch_model-00001-of-00002.bin"),
         "lacks pytorch_model-00002-of-00002.bin: the upload"),
        (lambda b: (b / "model.safetensors").rename(b / "model-00001-of-00003.safetensors"),
         "lacks model-00002-of-00003.safetensors, model-00003-of-00003.safetensors: the upload"),
        (lambda b: (b / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda b: (b / "config.json").unlink(), "has no config.json"),
        (lambda b: (b / "config.json").write_text("{}}"), "config.json cannot be read"),
        (lambda b: (b / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
         "is quantized by gptq with None bits, where 2, 4, 8 can be read: use the original weights"),
        (lambda b: (b / "config.json").write_text('{"is_encoder_decoder": true, "architectures": ["T5Model"]}'),
         "is an encoder with a decoder (T5Model): the job trains and merges language models"),
        (shutil.rmtree, "holds no files"),
    ],
)  # fmt: skip
def test_an_unusable_base_is_refused_before_anything_is_read(
    spoil: Callable[[Path], object], told: str, base: Path, settings: config.Config
) -> None:
    """No weights, weights of another kind, half an upload, no tokenizer, no config, nothing."""
    spoil(base)

    with pytest.raises(errors.PermanentError) as caught:
        pull.survey(settings)

    assert told in str(caught.value)
    assert base.as_uri() in str(caught.value)


@pytest.mark.parametrize(
    ("told", "longest"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": None}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 400),
        (
            {"max_position_embeddings": 800, "rope_parameters": {"factor": 8, "original_max_position_embeddings": 50}},
            800,
        ),
    ],
)
def test_examples_are_no_longer_than_the_models_context(
    told: dict[str, object], longest: int, base: Path, tiny_run: Callable[..., Path]
) -> None:
    """Stretched or not; beyond it a model has not been trained, and some have no positions."""
    path = base / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    for key in ("rope_scaling", "rope_parameters"):
        described.pop(key, None)
    path.write_text(json.dumps(described | told), encoding="utf-8")

    def look(length: int) -> None:
        pull.survey(config.read(tiny_run(model={"base": str(base)}, data={"max_length": length})))

    look(longest)
    with pytest.raises(errors.ConfigError, match=f"max_length {longest + 1} is more than the {longest} tokens"):
        look(longest + 1)


def test_a_star_stands_for_a_part_of_names(cache: paths.Cache, tmp_path: Path) -> None:
    """As the shards of a data set are called; not for folders, and a name that has none of it is not meant."""
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl", "train-x/y.jsonl", "train.jsonl"):
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    folder = (tmp_path / "shards").as_uri()

    got = pull.data([config.Source(url=f"{folder}/train-*.jsonl", weight=2.0)], cache)

    assert [file.url for file in got] == [f"{folder}/train-0.jsonl", f"{folder}/train-1.jsonl"]
    assert [file.weight for file in got] == [2.0, 2.0]
    with pytest.raises(
        errors.NotFoundError, match=r"valid-\*\.jsonl fits no file: .* holds test-0.jsonl, train-0.jsonl"
    ):
        pull.data([config.Source(url=f"{folder}/valid-*.jsonl")], cache)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["nothing/"], "nothing/ holds no data files"),
        (["base/config.txt"], "the name must end in .jsonl, .json, .csv or .parquet"),
    ],
)
def test_data_that_are_not_there_are_named(
    data: list[str], told: str, base: Path, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A missing file, an empty folder, a file of an unknown kind."""
    (base / "config.txt").write_text("x")
    settings = config.read(tiny_run(model={"base": str(base)}, data={"train": [f"{tmp_path}/{d}" for d in data]}))

    with pytest.raises(errors.PermanentError, match=told):
        pull.survey(settings)


def test_a_disk_that_is_too_small_is_said_at_once(
    settings: config.Config, cache: paths.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is free, what is needed, and the key that names another disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 5 << 20))

    needed = r"5.2 MB are free, the run needs 1.1 GB.*set run.cache"
    with pytest.raises(errors.DiskFullError, match=needed), ExitStack() as keep:
        pull.preflight(settings, cache, keep, pull.survey(settings))


def test_local_files_are_used_where_they_lie(settings: config.Config, base: Path, cache: paths.Cache) -> None:
    """A base of 140 GB on a shared file system is not copied, only hashed, and that once."""
    one = pull.base(settings.model.base, cache)

    assert one.path == base
    assert one.digest == manifest.Manifest(manifest.of(base).files).digest
    assert not [name for name in files(cache.root) if name.endswith(".safetensors")]
    (base / "model.safetensors").write_bytes(b"another model")
    assert pull.base(settings.model.base, cache).digest != one.digest


def test_files_that_change_before_they_are_hashed_are_not_used_in_place(
    settings: config.Config, base: Path, cache: paths.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No digest of another version is recorded for the listed one."""
    found = look.base(settings.model.base)
    (base / "model.safetensors").write_bytes(b"another model")
    monkeypatch.setattr(look, "base", lambda _url: found)

    with pytest.raises(errors.ChangedError, match=r"safetensors changed since it was listed"):
        pull.base(settings.model.base, cache)

    (base / "model.safetensors").unlink()
    with pytest.raises(errors.ChangedError, match="was removed since it was listed"):
        pull.base(settings.model.base, cache)
    assert files(cache.root) == set()


def test_the_digest_of_a_base_does_not_depend_on_where_it_lies(
    settings: config.Config, base: Path, s3: S3, bucket: str, tiny_run: Callable[..., Path], cache: paths.Cache
) -> None:
    """So a checkpoint resumes when the base moved from a disk to a bucket."""
    s3.upload(base, bucket, "models/tiny")
    remote = config.read(tiny_run(model={"base": f"s3://{bucket}/models/tiny"}))

    got = pull.base(remote.model.base, cache)

    assert got.digest == pull.base(settings.model.base, cache).digest
    assert got.path.is_relative_to(cache.root)
    assert files(got.path) == {*files(base), "manifest.json"}


def test_a_base_is_the_same_with_other_words_about_it(settings: config.Config, base: Path, cache: paths.Cache) -> None:
    """A copy has no README, or a picture more; what computes otherwise is another base."""
    digest = pull.base(settings.model.base, cache).digest
    for name in ("README.md", ".gitattributes", "LICENSE", "plot.png"):
        (base / name).write_text("about it")
    assert pull.base(settings.model.base, cache).digest == digest

    (base / "generation_config.json").write_text("{}")

    assert pull.base(settings.model.base, cache).digest != digest


def test_a_manifest_of_somebody_else_says_nothing_of_an_adapter(cache: paths.Cache, tmp_path: Path) -> None:
    """Only that of a run does, which has told beside it how it was trained."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        (tmp_path / name).write_text("{}")

    assert pull.adapter(tmp_path.as_uri(), cache) == tmp_path


def test_a_changed_base_is_pulled_anew(
    base: Path, s3: S3, bucket: str, tiny_run: Callable[..., Path], cache: paths.Cache
) -> None:
    """The cache never answers for a bucket whose content has changed."""
    s3.upload(base, bucket, "models/tiny")
    settings = config.read(tiny_run(model={"base": f"s3://{bucket}/models/tiny"}))
    old = pull.base(settings.model.base, cache)
    changed = json.loads((base / "config.json").read_text()) | {"changed": True}
    s3.client().put_object(Bucket=bucket, Key="models/tiny/config.json", Body=json.dumps(changed).encode())

    new = pull.base(settings.model.base, cache)

    assert new.digest != old.digest
    assert json.loads((new.path / "config.json").read_text())["changed"]


def test_files_that_the_job_does_not_need_stay_in_the_bucket(
    base: Path, s3: S3, bucket: str, cache: paths.Cache
) -> None:
    """Weights of other frameworks, quantized copies and subfolders are neither downloaded nor part of the digest."""
    for name in ("pytorch_model.bin", "model.gguf", "original/consolidated.pth"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    s3.upload(base, bucket, "models/tiny")

    got = pull.base(f"s3://{bucket}/models/tiny", cache)

    assert not files(got.path) & {"pytorch_model.bin", "model.gguf", "original/consolidated.pth"}


def of_a_run(folder: Path) -> None:
    (folder / "training.json").write_text(json.dumps({"inputs": {}}))
    manifest.seal(folder)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda b: (b / "manifest.json").unlink(), "has no manifest.json, so it is not whole"),
        (lambda b: (b / "config.json").write_text("{}"), "is not what its manifest.json says, such as config.json"),
        (lambda b: (b / "more.json").write_text("{}"), "is not what its manifest.json says, such as more.json"),
        (
            lambda b: (b / "tokenizer_config.json").unlink(),
            "is not what its manifest.json says, such as tokenizer_conf",
        ),
    ],
    ids=["torn", "changed", "more", "less"],
)
def test_a_merged_model_that_is_not_what_a_run_sealed_is_an_error(
    spoil: Callable[[Path], object], told: str, base: Path, cache: paths.Cache
) -> None:
    """Nothing without its manifest is believed, or with another; a model of somebody else has none to be believed."""
    of_a_run(base)
    pull.base(base.as_uri(), cache)
    (base / "README.md").write_text("what its owner says of it")
    pull.base(base.as_uri(), cache)
    spoil(base)

    with pytest.raises(errors.ModelError, match=f"{base.as_uri()} {told}"):
        pull.base(base.as_uri(), cache)

    (base / "training.json").unlink()
    pull.base(base.as_uri(), cache)


def test_names_with_blanks_and_percent_signs_are_found(
    tmp_path: Path, cache: paths.Cache, records: Callable[..., Path], tiny_run: Callable[..., Path]
) -> None:
    """A plain path in a config becomes a URL and finds its file again."""
    (tmp_path / "my data").mkdir()
    path = records("my data/50% of it.jsonl", [{"text": "x"}])

    (url,) = config.read(tiny_run(data={"train": [str(path)]})).data.train

    assert [file.path for file in pull.data([config.Source(url=url)], cache)] == [path]


def test_a_folder_of_data_is_read_in_the_order_of_its_names(
    tmp_path: Path, cache: paths.Cache, records: Callable[..., Path]
) -> None:
    """Several files make one split, the same on every machine."""
    (tmp_path / "many").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.csv", "readme.md"):
        records(f"many/{name}", [{"text": name}])

    got = pull.data([config.Source(url=f"{(tmp_path / 'many').as_uri()}/")], cache)

    assert [file.path.name for file in got] == ["a.jsonl", "b.jsonl", "c.csv"]


def test_an_artefact_that_is_damaged_where_it_lies_is_made_again(cache: paths.Cache, tmp_path: Path) -> None:
    """It loses its seal, so that the next start does not find the same; another owner's is not touched."""
    store = storage.connect((tmp_path / "run").as_uri())
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "adapter_model.safetensors").write_bytes(b"weights")
    storage.push(store, tmp_path / "made", paths.ADAPTER)
    store.put("adapter/adapter_model.safetensors", b"weighTs")

    def refuse() -> None:
        raise errors.FencedError("it belongs to another start")

    with pytest.raises(errors.FencedError):
        pull.artefact(store, paths.ADAPTER, cache, refuse)
    assert storage.sealed(store, paths.ADAPTER)
    with pytest.raises(errors.StoreError, match=r"adapter/ is damaged where it lies: .* Start again to make it anew"):
        pull.artefact(store, paths.ADAPTER, cache, lambda: None)

    assert storage.sealed(store, paths.ADAPTER) is None


@pytest.fixture
def looked(
    s3: S3, bucket: str, base: Path, tiny_run: Callable[..., Path], cache: paths.Cache, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Look whether a disk is large enough for a base that is in a bucket: so many times as large, and as the spare."""
    s3.upload(base, bucket, "base")

    def look(bases: int, less: int = 0, **sections: dict[str, object]) -> None:
        model = {"base": f"s3://{bucket}/base", **sections.pop("model", {})}
        read = config.read(tiny_run(**{"examine": {"minutes": 1}, **sections, "model": model}))
        surveyed, scratch = pull.survey(read), 5000
        free = bases * surveyed.found[0].size + scratch + (1 << 30) - less
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
        with ExitStack() as keep:
            pull.preflight(read, cache, keep, surveyed, scratch=scratch, look=True)

    return look


@pytest.mark.parametrize(
    ("sections", "bases"),
    [
        ({"examine": {"minutes": 0}}, 2),
        ({"model": {"quantization": "none"}}, 2),
        ({"merge": {"enabled": False}}, 1),
        ({"merge": {"dtype": "float32"}, "examine": {"minutes": 0}}, 3),
    ],
)
def test_the_disk_holds_the_base_the_merged_model_and_checkpoints(
    sections: dict[str, dict[str, object]], bases: int, looked: Callable[..., None], said: Callable[[], str]
) -> None:
    """All are there at the end of a run."""
    looked(bases, **sections)
    assert "no room for the model" not in said()
    with pytest.raises(errors.DiskFullError):
        looked(bases, less=1, **sections)


def test_the_disk_holds_the_comparison_model_if_it_can(looked: Callable[..., None], said: Callable[[], str]) -> None:
    """The result is whole without it, so that it is missing is said before the download, and no reason to refuse."""
    looked(3)
    assert "no room for the model" not in said()
    looked(3, less=1)
    assert "the disk has no room for the model that the merged one is to be compared with" in said()
    with pytest.raises(errors.DiskFullError):
        looked(2, less=1)


def test_what_a_killed_merge_left_is_not_needed_again(
    settings: config.Config, cache: paths.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start finds its shards on the disk that they fill."""
    surveyed = pull.survey(settings)
    partial = cache.work("merged-1f.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"x" * surveyed.found[0].size)
    free = (1 << 30) + 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))

    with ExitStack() as keep:
        pull.preflight(settings, cache, keep, surveyed, look=True)
    (partial / "model.safetensors").unlink()
    with pytest.raises(errors.DiskFullError), ExitStack() as keep:
        pull.preflight(settings, cache, keep, surveyed, look=True)
