"""Whose run a URL is."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from job import config, errors, lease, storage


@pytest.fixture
def store(tmp_path: Path) -> storage.Store:
    return storage.connect((tmp_path / "store").as_uri())


@pytest.fixture
def settings(tiny_run: Callable[..., Path]) -> Callable[..., config.Config]:
    def read(**changes: dict[str, object]) -> config.Config:
        return config.read(tiny_run(**changes))

    return read


def test_every_start_gets_a_number_of_its_own(store: storage.Store, settings: Callable[..., config.Config]) -> None:
    """Also when several begin at the same time."""
    numbers: list[int] = []
    ours = settings()
    starts = [threading.Thread(target=lambda: numbers.append(lease.begin(store, ours))) for _ in range(8)]

    for start in starts:
        start.start()
    for start in starts:
        start.join()

    assert sorted(numbers) == list(range(1, 9))


def test_a_changed_config_is_refused_with_the_difference(
    store: storage.Store, settings: Callable[..., config.Config]
) -> None:
    """Once something was made under a URL, only keys that do not change the result may change."""
    lease.begin(store, settings())
    store.put("checkpoints/00000010-1/manifest.json", b"{}")

    with pytest.raises(errors.ConfigError) as caught:
        lease.agree(store, settings(train={"learning_rate": 0.5}, lora={"r": 4}))

    assert "lora.r: 16 there, 4 here" in str(caught.value)
    assert "train.learning_rate: 0.01 there, 0.5 here" in str(caught.value)
    lease.agree(store, settings(train={"learning_rate": 1e-2, "log_every": 7}, lora={"r": 16}))


def test_a_config_of_somebody_else_is_not_touched(store: storage.Store, settings: Callable[..., config.Config]) -> None:
    """A run URL that points at a model's folder would otherwise cost the model its config.json."""
    store.put("config.json", b'{"model_type": "llama"}')

    for attempt in (lease.agree, lease.begin):
        with pytest.raises(errors.ConfigError, match="that is not of this job"):
            attempt(store, settings())

    kept = store.read("config.json")
    assert kept
    assert kept.data == b'{"model_type": "llama"}'


def test_a_config_that_made_nothing_yet_may_be_corrected(
    store: storage.Store, settings: Callable[..., config.Config]
) -> None:
    """Who mistyped a key needs no new URL."""
    lease.begin(store, settings(train={"learning_rate": 0.5}))
    corrected = settings(train={"learning_rate": 0.1})

    lease.agree(store, corrected)
    lease.begin(store, corrected)

    kept = store.read("config.json")
    assert kept
    assert config.differences(corrected, kept.data) == []
