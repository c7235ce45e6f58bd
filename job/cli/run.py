"""The commands that do the run, or a part of it: `run`, `validate`, and `worker`, which `run` calls itself."""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from job import log
from job.cli.program import Machine, Program, config_file, debugging, group, in_json, overriding, read

if TYPE_CHECKING:
    from job.preemption import Notice


@group.command()
@config_file
@overriding
@click.option("--restart", is_flag=True, help="Begin the run anew; what it published stays until it is replaced.")
@in_json
@debugging
@click.pass_obj
def run(
    program: Program, config: Path, overrides: tuple[str, ...], restart: bool, as_json: bool, debug: bool  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Do what is still missing of the run in CONFIG; exit 0 at once if nothing is."""
    from job import outcome

    def job(notice: "Notice", after: ExitStack) -> None:
        command = [*program.command, "worker", *(["--json"] if as_json else []), *(["--debug"] if debug else [])]
        program.story(Machine(read(config, overrides), program.environ, notice, after, command), restart=restart)

    outcome.conclude(job, as_json=as_json, debug=debug)


@group.command()
@config_file
@overriding
@click.option("--offline", is_flag=True, help="Check the file only, not what it points at.")
@in_json
@debugging
@click.pass_obj
def validate(
    program: Program, config: Path, overrides: tuple[str, ...], offline: bool, as_json: bool, debug: bool  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Check CONFIG, and that the base model, the data and the store can be reached; change nothing."""
    from job import outcome

    def job(notice: "Notice", after: ExitStack) -> None:
        checked = read(config, overrides)
        if not offline:
            program.look(Machine(checked, program.environ, notice, after, ()))
        if as_json:
            click.echo(json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False))
        else:
            more = "" if offline else ", and all that it names can be reached"
            log.event("validate.ok", f"{config} is valid{more}")

    outcome.conclude(job, as_json=False, debug=debug)


@group.command(hidden=True)
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--parent", type=int, required=True)
@click.option("--listening", type=int)
@click.option("--terminal", type=int)
@in_json
@debugging
@click.pass_obj
def worker(
    program: Program, task: Path, parent: int, listening: int | None, terminal: int | None,
    as_json: bool, debug: bool,  # noqa: FBT001 - click's flags
) -> None:  # fmt: skip
    """Train, as one of the processes that `run` started; rank 0 is given the meeting socket.

    `terminal` is the open file that is the stderr of the job; our own is a pipe on which the
    libraries are listened to.
    """
    from job import inputs, launch, outcome

    if terminal is not None:
        sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
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
