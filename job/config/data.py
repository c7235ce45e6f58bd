"""The data of a run: where they are, how they are mixed, and how records become text."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from job.config import urls
from job.config.section import Section, Share

_HUB = "hf://datasets/"
Format = Literal["auto", "instruction", "conversations", "messages", "prompt-completion", "text", "preference"]


class Source(Section):
    """A place of data, with more to say of it than where it is."""

    url: str
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each record is trained on in an epoch: 2 is twice, 0.5 a half of them, drawn by the seed."""
    format: Format | None = None
    """As data.format, for these files."""

    @field_validator("url")
    @classmethod
    def sound(cls, url: str) -> str:
        """Return `url`; raise `ValueError` if no data can be there."""
        if not url.startswith(("s3://", "file:///", _HUB)):
            raise ValueError(
                f"{url!r} must be s3://bucket/key, file:///absolute/path, {_HUB}org/name@revision/file or a path"
            )
        if url.startswith("s3://") and "/" not in url.removeprefix("s3://"):
            raise ValueError(f"{url} names a bucket only: add the file's key, or / for every data file in it")
        if url.startswith(_HUB) and len(url.removeprefix(_HUB).split("/")) < 3:  # noqa: PLR2004 - org, name, file
            raise ValueError(f"{url} names no files: add /file, /folder/ or /data/train-*.parquet, after @revision")
        return urls.sound(url)


def _arm(given: object) -> str:
    return "path" if isinstance(given, str) else "source"


Place = Annotated[Annotated[str, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_arm)]


class Data(Section):
    """What is trained on and how records become text."""

    train: Annotated[tuple[Place, ...], Field(min_length=1)]
    """Files (jsonl, json, csv, parquet; plain, .gz or .zst), with * for a part of their names, or folders ending in / :
    s3://, file:///, hf://datasets/ or paths; or {url, weight, format}, to mix them."""
    eval: tuple[Place, ...] = ()
    eval_fraction: Share = 0.0
    """Hold out this share of the training records instead of naming eval files."""
    format: Format = "auto"
    """auto: recognised for each file by the keys of its first record."""
    images: str | None = None
    """The folder of the images that records name by their paths in it; by default that of each data file."""
    max_pixels: Annotated[int, Field(ge=256)] | None = None
    """Larger images are made smaller, to so many pixels, before the model's own processor sees them."""
    template: Literal["auto", "chat", "instruction-en", "instruction-zh"] = "auto"
    """auto: the model's own chat template if it has one, else instruction-en."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per example; longer ones are cut at the end, counted and said."""
    packing: bool = False
    """Put several short examples into one sequence of max_length; batch sizes then count sequences, not examples."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """assistant: every answer; last: the last one of each conversation; all: prompts too."""
    deduplicate: bool = False
    """Train on the first of equal examples only; their number is said anyway."""
    leaks: Literal["refuse", "drop", "allow"] = "refuse"
    """Of eval examples that are trained on too: stop, leave them out of training, or only say how many there are."""
    skip_bad_share: Share = 0.0
    """Share of unusable records that is skipped (and said) instead of stopping the run."""

    def sources(self, split: Literal["train", "eval"]) -> tuple[Source, ...]:
        """The places of a split."""
        given = self.train if split == "train" else self.eval
        return tuple(Source(url=each) if isinstance(each, str) else each for each in given)

    @field_validator("train", "eval")
    @classmethod
    def _are_readable(cls, given: tuple[str | Source, ...]) -> tuple[str | Source, ...]:
        for each in given:
            if isinstance(each, str):
                Source.sound(each)
        return given

    @field_validator("images")
    @classmethod
    def _is_folder(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("s3://", "file:///", _HUB)):
            raise ValueError(f"must be s3://bucket/prefix, file:///absolute/path, {_HUB}org/name@revision or a path")
        return None if url is None else urls.sound(url).rstrip("/")

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("eval and eval_fraction exclude each other: name files or hold out a share")
        if any(source.weight != 1 for source in self.sources("eval")):
            raise ValueError("eval sources have no weight: every example is evaluated once")
        return self
