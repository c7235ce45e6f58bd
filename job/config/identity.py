"""Are two configs the same run? What is written to the run URL once, and which keys may change afterwards."""

import hashlib
import json
from typing import Any

from job import errors
from job.config.schema import Config

# Keys that do not change what is computed, or only by the rounding of another summation order.
NEUTRAL = frozenset(
    {
        *(
            f"run.{key}"
            for key in ("name", "url", "cache", "cache_limit", "conditional_writes", "lease_seconds", "give_up_after")
        ),
        *(f"train.{key}" for key in ("log_every", "micro_batch_size", "gradient_checkpointing", "deterministic")),
    }
)
BEGAN = "began"  # the section of a kept config that says which attempt began the run
_NEUTRAL_SECTIONS = ("checkpoint", "distributed", "examine", BEGAN)


def claimed(config: Config, began: int, owner: int) -> bytes:
    """The canonical JSON that is kept under the run URL.

    That is the resolved config, the attempt that began the run, and the one that owns it now.
    """
    whose = {BEGAN: {"attempt": began, "owner": owner}}
    return json.dumps(config.model_dump(mode="json") | whose, indent=1, sort_keys=True).encode()


def began(theirs: bytes) -> int:
    """The attempt that began the run of the config kept under the run URL: 0, or a later one that was a restart."""
    return int(json.loads(theirs).get(BEGAN, {}).get("attempt", 0))


def digest(config: Config) -> str:
    """SHA-256 over every key that changes the result and is not at its default.

    So a run that began before a key was there is still the same run.
    """
    usual, given = _defaults(), _flat(config.model_dump(mode="json"))
    flat = {
        key: value for key, value in given.items() if not _neutral(key) and (key not in usual or usual[key] != value)
    }
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def differences(ours: Config, theirs: bytes) -> list[str]:
    """One line for each key that changes the result and differs from the config already kept under the run URL.

    Raises `errors.ConfigError` if `theirs` is no config of this job: what lies there belongs to somebody else.
    """
    try:
        old = _flat(json.loads(theirs))
    except (ValueError, AttributeError) as e:
        raise errors.ConfigError(
            f"run.url: {ours.run.url} holds a config.json that is not of this job: use a place of the run's own"
        ) from e
    new = _flat(ours.model_dump(mode="json"))
    old = _defaults() | old  # a key that was not there yet when the run began
    return [
        f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _neutral(key)
    ]


def _defaults() -> dict[str, Any]:
    least: dict[str, dict[str, Any]] = {
        "run": {"name": "x", "url": "file:///x"},
        "model": {"base": "file:///y"},
        "data": {"train": ["file:///z"]},
    }
    given = {f"{section}.{key}" for section, keys in least.items() for key in keys}
    flat = _flat(Config.model_validate_json(json.dumps(least)).model_dump(mode="json"))
    return {key: value for key, value in flat.items() if key not in given}


def _neutral(key: str) -> bool:
    return key in NEUTRAL or key.partition(".")[0] in _NEUTRAL_SECTIONS


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    if not {"run", "model", "data"} <= tree.keys():
        raise ValueError("not a config")
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
