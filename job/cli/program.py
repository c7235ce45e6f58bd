"""What all commands have in common: the program that was started, its options, and the config that it was given."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from job.config import Config, Merging
    from job.paths import Cache
    from job.preemption import Notice

_PROJECT = "finetune-job"


@dataclass(frozen=True)
class Machine:
    """One start of the job on one machine: what it was told, and the command that starts a process of its own."""

    config: "Config"
    environ: Mapping[str, str]
    notice: "Notice"
    after: ExitStack
    """What is done at the very end, however it ends."""
    command: Sequence[str]
    """What starts one of the processes that train."""


class Story(Protocol):
    """What a command does with the machine that it is started on."""

    def __call__(self, machine: Machine, *, restart: bool = False) -> None:
        """Do it; what it raises becomes the exit status."""


@dataclass(frozen=True)
class Program:
    """What the commands need of the file that was started: what to do, the environment, and how to start it again."""

    story: Story
    look: Story
    environ: Mapping[str, str]
    command: Sequence[str]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option("0.1.0", prog_name="finetune-job")
def group() -> None:
    """Fine-tune a language model with LoRA or QLoRA as a batch job that survives preemption.

    Exit statuses: 0 done; 64 permanent, change something first; 75 stopped on request, start me again; 1 anything
    else, may work next time.
    """


config_file = click.argument("config", type=click.Path(path_type=Path))
overriding = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the config, for example train.epochs=1.",
)
debugging = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
in_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def read(path: Path, overrides: tuple[str, ...]) -> "Config":
    """The config in the file at `path`, with the `overrides` of the command line."""
    from job import config

    return config.read(path, overrides)


def found(place: str) -> "Config":
    """The config in a file, or that of the run at a URL."""
    from job import claim, config, storage

    return claim.kept(storage.connect(place)) if "://" in place else config.read(Path(place))


def cache(config: "Config | Merging", environ: Mapping[str, str], node: int = 0) -> "Cache":
    """The local disk as the config says, or where such things are kept by convention."""
    from job import paths

    root = Path(config.run.cache).expanduser() if config.run.cache else default_cache(environ)
    return paths.Cache.of(root, config.run.url, node)


def default_cache(environ: Mapping[str, str]) -> Path:
    """Where programs keep what they can do without, by the XDG base directory specification."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _PROJECT
