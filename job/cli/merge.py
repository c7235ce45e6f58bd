"""The command `merge`: an adapter that is in a store already, wherever it was made."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from job import errors, log
from job.cli.program import Program, cache, debugging, found, group, in_json, overriding

if TYPE_CHECKING:
    from job.config import Merging
    from job.preemption import Notice


@group.command()
@click.argument("run", required=False, metavar="[CONFIG|RUN_URL]")
@click.option("--base", metavar="URL", help="The base model; by default that of the run.")
@click.option("--adapter", metavar="URL", help="A folder that PEFT wrote; by default that of the run.")
@click.option("--out", metavar="URL", help="Where the merged model goes: a place of its own.")
@click.option(
    "--verify",
    type=click.Choice(["full", "sums"]),
    help="full: open the result and compare it with the base and the adapter. sums: check its weights only, which "
    "opens no model (as examine.minutes 0 does).  [default: full]",
)
@overriding
@in_json
@debugging
@click.pass_obj
def merge(
    program: Program, /, run: str | None, overrides: tuple[str, ...], as_json: bool, debug: bool, verify: str | None,  # noqa: FBT001 - click's flags
    **given: str | None,
) -> None:  # fmt: skip
    """Add an adapter to a base model, wherever it was trained, and put the whole model into a store.

    Base, adapter and settings are those of a run, if one is given; keys of model, merge and run can be --set.
    """
    from job import outcome

    def job(_notice: "Notice", after: ExitStack) -> None:
        from job import config

        order = config.merging(found(run) if run else None, given, overrides, verify)
        _merge(order, program.environ, after)

    outcome.conclude(job, as_json=as_json, debug=debug)


def _merge(order: "Merging", environ: Mapping[str, str], after: ExitStack) -> None:
    from job import card, cluster, examine, inputs, paths, publish, pull, storage

    store, disk = storage.connect(order.run.url), cache(order, environ)
    disk.make()
    after.enter_context(storage.alone(disk.work("")))  # two starts of one merge would write the same files
    what = f"{pull.both(order, disk, after)} {order.model.model_dump_json()} {order.merge.model_dump_json()}"
    claim = {"made_of": paths.digest(what), "base": order.model.base, "adapter_url": order.adapter.url}
    store = storage.checked(store, paths.PROBE, required=order.run.conditional_writes == "required")
    with publish.claimed(store, claim) as put:
        if put:  # it is not there yet
            gpus = cluster.gpus(environ)
            program = after.enter_context(examine.started(environ, gpus, wanted=order.examine.minutes > 0))
            from job import convert, merge  # late: it imports while the program does
            from job.convert import adapters

            given = pull.adapter(order.adapter.url, disk)
            merge.readable(given)  # before gigabytes move
            original = pull.base(order.model.base, disk)
            base = convert.native(original, disk, after)
            adapter = adapters.translated(given, original, disk, after)
            merged = merge.folder(base, adapter, order.model, order.merge, disk.work("merged"), claim)
            models = examine.Models(base.path, adapter, merged, lambda: None)
            seen = examine.results(models, order, None, disk.work("seen"), gpus, program)
            merge.tell(merged, card.alone(order, base.path, inputs.facts(merged), seen))
            put(merged)
    shutil.rmtree(disk.work(""), ignore_errors=True)
    log.event("merge.end", f"done: the merged model is in {store.url}", status=errors.DONE)
