"""The command `render`: a run's files for a cluster."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from job.cli.program import Program, config_file, group, read

if TYPE_CHECKING:
    from job.config import Config
    from job.preemption import Notice


@group.group()
def render() -> None:
    """Print the files that start CONFIG on a cluster, ready to submit."""


_nodes = click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
_gpus = click.option("--gpus", type=click.IntRange(0), default=1, show_default=True, help="On each node; 0: CPUs.")


@render.command("slurm")
@config_file
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
@config_file
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
        settings = read(path, ())
        launch.team(settings, cluster.Node(count=nodes), gpus)
        click.echo(text(settings, Path(program.command[-1]).parent), nl=False)

    outcome.conclude(job, as_json=False, debug=False)
