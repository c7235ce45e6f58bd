"""Which config a run URL belongs to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from job import claim, config, errors, storage


@pytest.fixture
def store(tmp_path: Path) -> storage.Store:
    return storage.connect((tmp_path / "store").as_uri())


@pytest.fixture
def settings(tiny_run: Callable[..., Path]) -> Callable[..., config.Config]:
    def read(**changes: dict[str, object]) -> config.Config:
        return config.read(tiny_run(**changes))

    return read


def test_a_changed_config_is_refused_with_the_difference(
    store: storage.Store, settings: Callable[..., config.Config]
) -> None:
    """Once something was made under a URL, only keys that do not change the result may change."""
    claim.claim(store, settings(), 1, lambda: None, restart=False)
    store.put("checkpoints/00000010-1/manifest.json", b"{}")

    with pytest.raises(errors.ConfigError) as caught:
        claim.agree(store, settings(train={"learning_rate": 0.5}, lora={"r": 4}))

    assert "lora.r: 16 there, 4 here" in str(caught.value)
    assert "train.learning_rate: 0.01 there, 0.5 here" in str(caught.value)
    claim.agree(store, settings(train={"learning_rate": 1e-2, "log_every": 7}, lora={"r": 16}))


def test_a_config_of_somebody_else_is_not_touched(store: storage.Store, settings: Callable[..., config.Config]) -> None:
    """A run URL that points at a model's folder would otherwise cost the model its config.json."""
    store.put("config.json", b'{"model_type": "llama"}')

    for attempt in (claim.agree, lambda *given: claim.claim(*given, 1, lambda: None, restart=False)):
        with pytest.raises(errors.ConfigError, match="that is not of this job"):
            attempt(store, settings())

    kept = store.read("config.json")
    assert kept
    assert kept.data == b'{"model_type": "llama"}'


def test_a_config_that_made_nothing_yet_may_be_corrected(
    store: storage.Store, settings: Callable[..., config.Config]
) -> None:
    """Who mistyped a key needs no new URL."""
    claim.claim(store, settings(train={"learning_rate": 0.5}), 1, lambda: None, restart=False)
    corrected = settings(train={"learning_rate": 0.1})

    claim.agree(store, corrected)
    claim.claim(store, corrected, 2, lambda: None, restart=False)

    kept = store.read("config.json")
    assert kept
    assert config.differences(corrected, kept.data) == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_late_claim_loses_against_that_of_the_next_owner(
    *, restart: bool, store: storage.Store, settings: Callable[..., config.Config]
) -> None:
    """Each owner writes the config anew, also if it is the same: who was cut off before its write finds another."""
    claim.claim(store, settings(), 1, lambda: None, restart=False)

    def next_owner() -> None:
        claim.claim(store, settings(), 3, lambda: None, restart=False)

    with pytest.raises(errors.ConflictError):
        claim.claim(store, settings(train={"learning_rate": 0.5}), 2, next_owner, restart=restart)

    assert claim.agree(store, settings()) == 0


def test_a_restart_begins_anew_with_any_config(store: storage.Store, settings: Callable[..., config.Config]) -> None:
    """On purpose, under the same URL; starts after it belong to the new run."""
    claim.claim(store, settings(), 1, lambda: None, restart=False)
    store.put("checkpoints/00000010-1/manifest.json", b"{}")
    other = settings(train={"learning_rate": 0.5})

    assert claim.claim(store, other, 3, lambda: None, restart=True) == 3

    assert claim.agree(store, other) == 3
    assert claim.claim(store, other, 4, lambda: None, restart=False) == 3
    with pytest.raises(errors.ConfigError, match="`--restart` begins the run under this one anew"):
        claim.agree(store, settings())
