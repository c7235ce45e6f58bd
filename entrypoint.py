#!/usr/bin/env python3
"""The job: pull, prepare, train, merge, publish. Start it as often as you like; it does what is still missing.

This file knows the order of the steps, reads the environment, and turns errors into exit statuses; nothing else does.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from job import errors, log, preemption

if TYPE_CHECKING:
    from job.config import Config
    from job.paths import Cache
    from job.storage import Store

_PROJECT = "finetune-job"


def story(
    config: "Config", environ: Mapping[str, str], worker: list[str], notice: preemption.Notice, after: ExitStack, *,
    restart: bool,
) -> None:  # fmt: skip
    """Do what is missing of the run, in order; return when all of it is in the store.

    `worker` is the command that trains; what is added to `after` is done at the very end, however it ends.
    """
    from job import attempts, claim, inputs, launch, lease, paths, publish, pull, report, storage

    launch.check(config)
    store, cache = storage.connect(config.run.url), _cache(config, environ)
    if not restart and _over(store, cache, config, claim.agree(store, config), notice):
        return
    store = storage.checked(store, paths.PROBE, required=config.run.conditional_writes == "required")
    pull.preflight(config, cache, after, trained=not restart and publish.trained(store, claim.agree(store, config)))
    owner, attempt = lease.take(store, config.run.lease_seconds, after)
    preemption.watch(preemption.Endpoints.of(environ), notice)
    began = claim.claim(store, config, attempt, owner.confirm, restart=restart)
    if _over(store, cache, config, began, notice):  # by the start that owned it until now
        return
    log_file = log.to_file(cache.log(), anew=True)
    attempts.begin(store, log_file, attempt, publish.progress(store, began), config.run.give_up_after)
    owner.keep(notice.interrupt, attempts.Witness(store, log_file, attempt))
    after.callback(attempts.keep, store, log_file, attempt, owner.confirm)
    log.phase("pull")
    base = pull.base(config, cache)
    if not publish.trained(store, began):
        train, evaluation = pull.data(config.data.train, cache), pull.data(config.data.eval, cache)
        log.phase("prepare")
        from job import prepare

        data = prepare.dataset(config, base, train, evaluation, cache, after)
        log.phase("load")
        start = inputs.Start(attempt, began, owner.token, attempts.between(store, attempt))
        with publish.tidied(store, attempt, notice):
            made = launch.training(worker, launch.task(config, start, base, data, cache), environ, notice)
        log.phase("publish")
        publish.directory(store, made / "report", paths.REPORT, owner.confirm)
        publish.directory(store, made / "adapter", paths.ADAPTER, owner.confirm)
    adapter = pull.artefact(store, paths.ADAPTER, cache, owner.confirm)
    if config.merge.enabled and not publish.merged(store, began):
        log.phase("merge")
        from job import merge

        merged = merge.merged(config, base, adapter, cache)
        log.phase("publish")
        publish.directory(store, merged, paths.MERGED, owner.confirm)
    log.phase("publish")
    spent = attempts.spent(store, log_file, attempt, began)
    facts = json.loads((adapter / paths.TRAINING).read_text(encoding="utf-8"))
    figures = pull.artefact(store, paths.REPORT, cache, owner.confirm)
    written = report.write(config, facts, spent, figures, store.url)
    publish.directory(store, written, paths.REPORT, owner.confirm)
    record = publish.done(store, config, facts, spent, attempt, owner.confirm)
    notice.conclude()
    shutil.rmtree(cache.work(""), ignore_errors=True)
    _say_done("done", config, record)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option("0.1.0", prog_name=_PROJECT)
def cli() -> None:
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


@cli.command()
@_config
@_set
@click.option("--restart", is_flag=True, help="Begin the run anew; what it published stays until it is replaced.")
@_json
@_debug
def run(config: Path, overrides: tuple[str, ...], restart: bool, as_json: bool, debug: bool) -> None:  # noqa: FBT001 - click's flags
    """Do what is still missing of the run in CONFIG; exit 0 at once if nothing is."""

    def job(notice: preemption.Notice, after: ExitStack) -> None:
        worker = [sys.executable, str(Path(__file__).resolve()), "worker", "--parent", str(os.getpid())]
        told = [*worker, *(["--json"] if as_json else [])]
        story(_read(config, overrides), os.environ, told, notice, after, restart=restart)

    _conclude(job, as_json=as_json, debug=debug)


@cli.command()
@_config
@_set
@click.option("--offline", is_flag=True, help="Check the file only, not what it points at.")
@_json
@_debug
def validate(config: Path, overrides: tuple[str, ...], offline: bool, as_json: bool, debug: bool) -> None:  # noqa: FBT001 - click's flags
    """Check CONFIG, and that the base model, the data and the store can be reached; change nothing."""

    def job(_notice: preemption.Notice, _after: ExitStack) -> None:
        from job import launch

        checked = _read(config, overrides)
        try:
            launch.check(checked)
        except errors.ConfigError as e:
            log.warn("validate.later", str(e))
        if not offline:
            _reach(checked)
        if as_json:
            click.echo(json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False))
        else:
            log.event(
                "validate.ok", f"{config} is valid" + ("" if offline else ", and all that it names can be reached")
            )

    _conclude(job, as_json=False, debug=debug)


@cli.command(hidden=True)
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--parent", type=int, required=True)
@_json
@_debug
def worker(task: Path, parent: int, as_json: bool, debug: bool) -> None:  # noqa: FBT001 - click's flags
    """Train, as a process that `run` started."""

    def job(notice: preemption.Notice, _after: ExitStack) -> None:
        from job import inputs, launch

        launch.die_with(parent)
        told = inputs.Task.from_json(task.read_text(encoding="utf-8"))
        log.to_file(told.log)
        from job import train

        train.train(told, notice)

    _conclude(job, as_json=as_json, debug=debug, alone=False)


def _conclude(
    job: Callable[[preemption.Notice, ExitStack], None], *, as_json: bool, debug: bool, alone: bool = True
) -> None:
    """Run `job` and end the process with the status that its outcome stands for.

    A process that is not `alone` leaves it to the one that started it to say that the job was stopped.
    """
    log.to_people(sys.stderr, as_json=as_json)
    notice = preemption.Notice()
    notice.listen()
    with ExitStack() as after:
        try:
            try:
                job(notice, after)
            finally:
                notice.conclude()
            status = errors.DONE
        except (Exception, errors.Preempted) as e:  # noqa: BLE001 - the one place where errors become statuses
            notice.conclude()  # again, if a request came in the moment before the first time
            status, message = errors.explain(e)
            if alone or not isinstance(e, errors.Preempted):
                say = log.warn if status == errors.AGAIN else log.error
                say("run.end", message, status=status, traceback=traceback.format_exc())
            if debug:
                traceback.print_exc()
    sys.exit(status)


def _read(path: Path, overrides: tuple[str, ...]) -> "Config":
    from job import config

    return config.read(path, overrides)


def _reach(config: "Config") -> None:
    from job import claim, paths, pull, storage

    store = storage.connect(config.run.url)
    claim.agree(store, config)
    storage.checked(store, paths.PROBE, required=config.run.conditional_writes == "required")
    with ExitStack() as keep:
        pull.preflight(config, _cache(config, os.environ), keep, look=True)


def _cache(config: "Config", environ: Mapping[str, str]) -> "Cache":
    from job import paths

    default = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _PROJECT
    return paths.Cache.of(Path(config.run.cache).expanduser() if config.run.cache else default, config.run.url)


def _over(store: "Store", cache: "Cache", config: "Config", began: int, notice: preemption.Notice) -> bool:
    """True if all of the run is in the store already; then a request to stop changes nothing any more."""
    from job import publish

    record = publish.finished(store, config, began)
    if record:
        notice.conclude()
        shutil.rmtree(cache.work(""), ignore_errors=True)  # of a start that was killed after it wrote the record
        _say_done("this run is done already", config, record)
    return record is not None


def _say_done(how: str, config: "Config", record: Mapping[str, Any]) -> None:
    from job import report

    places = ", ".join(f"{config.run.url}/{place}" for place in record["artefacts"])
    log.event(
        "run.done",
        f"{how}: {report.summary(record)}; results in {places}",
        status=errors.DONE,
        artefacts=record["artefacts"],
    )


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        sys.exit(errors.PERMANENT)
