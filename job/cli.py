"""The command line: what people and the job's own processes may call, and what they are told of it."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from job import errors, log

if TYPE_CHECKING:
    from job.config import Config
    from job.preemption import Notice


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


def main(program: Program) -> None:
    """Do what the command line says and end the process."""
    try:
        _group.main(standalone_mode=False, obj=program)
    except click.ClickException as e:
        e.show()
        sys.exit(errors.PERMANENT)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option("0.1.0", prog_name="finetune-job")
def _group() -> None:
    """Fine-tune a language model with LoRA or QLoRA as a batch job that survives preemption.

    Exit statuses: 0 done; 64 permanent, change something first; 75 stopped on request, start me again; 1 anything
    else, may work next time.
    """


_config = click.argument("config", type=click.Path(path_type=Path))
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the config, for example train.epochs=1.",
)
_debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@_group.command()
@_config
@_set
@click.option("--restart", is_flag=True, help="Begin the run anew; what it published stays until it is replaced.")
@_json
@_debug
@click.pass_obj
def run(
    program: Program, config: Path, overrides: tuple[str, ...], restart: bool, as_json: bool, debug: bool  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Do what is still missing of the run in CONFIG; exit 0 at once if nothing is."""
    from job import outcome

    def job(notice: "Notice", after: ExitStack) -> None:
        command = [*program.command, "worker", *(["--json"] if as_json else []), *(["--debug"] if debug else [])]
        program.story(Machine(_read(config, overrides), program.environ, notice, after, command), restart=restart)

    outcome.conclude(job, as_json=as_json, debug=debug)


@_group.command()
@_config
@_set
@click.option("--offline", is_flag=True, help="Check the file only, not what it points at.")
@_json
@_debug
@click.pass_obj
def validate(
    program: Program, config: Path, overrides: tuple[str, ...], offline: bool, as_json: bool, debug: bool  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Check CONFIG, and that the base model, the data and the store can be reached; change nothing."""
    from job import outcome

    def job(notice: "Notice", after: ExitStack) -> None:
        checked = _read(config, overrides)
        if not offline:
            program.look(Machine(checked, program.environ, notice, after, ()))
        if as_json:
            click.echo(json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False))
        else:
            more = "" if offline else ", and all that it names can be reached"
            log.event("validate.ok", f"{config} is valid{more}")

    outcome.conclude(job, as_json=False, debug=debug)


@_group.group()
def render() -> None:
    """Print the files that start CONFIG on a cluster, ready to submit."""


_nodes = click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
_gpus = click.option("--gpus", type=click.IntRange(0), default=1, show_default=True, help="On each node; 0: CPUs.")


@render.command("slurm")
@_config
@_nodes
@_gpus
@click.option(
    "--time", help="The longest that one start may take, such as 24:00:00; as the template has it if not given."
)
@click.option("--containers", type=click.Choice(["venv", "pyxis", "apptainer", "charliecloud"]), default="venv")
@click.option("--image", help="Where the image lies: a .sqsh or .sif file, or a folder for charliecloud.")
@click.pass_obj
def _slurm(
    program: Program, config: Path, nodes: int, gpus: int, time: str | None, containers: str, image: str | None
) -> None:
    """Print a batch script, to be submitted with sbatch in the folder of the checkout."""

    def text(settings: "Config", templates: Path) -> str:
        from job import render

        machines = render.Machines(nodes, gpus)
        return render.slurm(settings, config, templates, machines, time=time, containers=containers, image=image)

    _rendered(program, config, nodes, gpus, text)


@render.command("k8s")
@_config
@_nodes
@_gpus
@click.option("--image", required=True, help="Where you pushed the image to, with its tag or digest.")
@click.option("--with", "components", multiple=True, metavar="NAME", help="A folder of k8s/components, such as spot.")
@click.pass_obj
def _k8s(program: Program, config: Path, nodes: int, gpus: int, image: str, components: tuple[str, ...]) -> None:
    """Print the objects for kubectl apply -f -."""

    def text(settings: "Config", templates: Path) -> str:
        from job import render

        machines = render.Machines(nodes, gpus)
        return render.kubernetes(settings, config, templates, machines, image=image, components=components)

    _rendered(program, config, nodes, gpus, text)


def _rendered(program: Program, path: Path, nodes: int, gpus: int, text: Callable[["Config", Path], str]) -> None:
    """Print what `text` makes of the config and the templates, if so many GPUs can share the run's batch."""
    from job import cluster, launch, outcome

    def job(_notice: "Notice", _after: ExitStack) -> None:
        settings = _read(path, ())
        launch.team(settings, cluster.Node(count=nodes), gpus)
        click.echo(text(settings, Path(program.command[-1]).parent), nl=False)

    outcome.conclude(job, as_json=False, debug=False)


@_group.command(hidden=True)
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--parent", type=int, required=True)
@click.option("--listening", type=int)
@_json
@_debug
@click.pass_obj
def worker(
    program: Program, task: Path, parent: int, listening: int | None, as_json: bool, debug: bool  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Train, as one of the processes that `run` started; rank 0 is given the socket at which the others find it."""
    from job import inputs, launch, outcome

    rank = int(program.environ.get("RANK", "0"))
    told = inputs.Task.from_json(task.read_text(encoding="utf-8"))
    if rank == 0:
        log.to_people(sys.stderr, as_json=as_json)
    log.to_file(told.log_of(rank))

    def job(notice: "Notice") -> None:
        launch.die_with(parent)
        from job import train

        train.train(told, notice, outcome.stuck(told, rank), rank, listening)

    outcome.tell(job, told, rank, debug=debug)


def _read(path: Path, overrides: tuple[str, ...]) -> "Config":
    from job import config

    return config.read(path, overrides)
