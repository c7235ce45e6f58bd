"""The command line: what people and the job's own processes may call, and what they are told of it."""

import sys

import click

from job import errors
from job.cli import merge, render, run, talk  # noqa: F401 - each brings its commands
from job.cli.program import Machine, Program, cache, group

__all__ = ["Machine", "Program", "cache", "main"]


def main(program: Program) -> None:
    """Do what the command line says and end the process."""
    try:
        group.main(standalone_mode=False, obj=program)
    except click.ClickException as e:
        e.show()
        sys.exit(errors.PERMANENT)
