"""How an answer is drawn."""

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from job import errors
from job.config.section import Section

_LEAST = 0.01  # below, what is divided by it overflows


def _warm(temperature: float) -> float:
    if 0 < temperature < _LEAST:
        raise ValueError(f"must be 0, which is always the likeliest token, or at least {_LEAST}")
    return temperature


class Sampling(Section):
    """How each next token is chosen, and when an answer is over; the defaults are those of the QLoRA tutorial."""

    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_warm)] = 0.7
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Among the likeliest tokens that have this share of the probability together."""
    top_k: Annotated[int, Field(ge=0)] = 20
    """Among so many of the likeliest; 0: among all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.1
    """What is there already is so much less likely (CTRL, arXiv 1909.05858); 1: no less."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings at which an answer is over; they are not part of it."""


def sampling(given: Mapping[str, object]) -> Sampling:
    """What is `given`, and the rest by default; raises `errors.ConfigError` for a value that makes no sense."""
    try:
        return Sampling.model_validate_json(json.dumps(given))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise errors.ConfigError(f"--{option} {first['input']}: {first['msg'].lower()}") from e
