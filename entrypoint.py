#!/usr/bin/env python3
"""The job: pull, prepare, train, merge, publish. Start it as often as you like; it does what is still missing.

This file knows the order of the steps, reads the environment, and is the command line; nothing else does.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # a request to stop waits until it is listened for: imports may take seconds on a cluster
    signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPWR]
    )

from job import alive, cli, errors, log, preemption

if TYPE_CHECKING:
    from job import cluster
    from job.config import Config
    from job.inputs import Base, Start, Team
    from job.lease import Lease
    from job.paths import Cache
    from job.storage import Store


@dataclasses.dataclass(frozen=True)
class Here:
    """What this machine works with: what it was told, the run's store, its own disk, and those that train with it."""

    machine: cli.Machine
    store: "Store"
    cache: "Cache"
    team: "Team"
    peers: "cluster.Alone"
    ends: float | None
    """When the scheduler ends this start, if it says so."""
    offloaded: int = 0
    """Bytes that each machine of the team keeps in host memory with distributed.offload."""
    on_gpu: int = 0
    """Bytes that each GPU of the team needs whatever the examples are."""


def story(machine: cli.Machine, *, restart: bool = False) -> None:
    """Do what is missing of the run; return when all of it is in the store."""
    from job import claim, cluster, config, launch, storage

    settings, notice = machine.config, machine.notice
    if sign := machine.environ.get("FINETUNE_ALIVE"):
        machine.after.callback(alive.keep(Path(sign)))
    where, gpus = cluster.discover(machine.environ), cluster.gpus(machine.environ)
    if where.spare:
        log.event("cluster.spare", "another process of this machine does the work, and starts those it needs")
        return
    team = launch.team(settings, where, len(gpus))
    store, cache = storage.connect(settings.run.url), cli.cache(settings, machine.environ, where.rank)
    if not restart and _over(store, cache, settings, claim.agree(store, settings), notice):
        return
    preemption.watch(preemption.Endpoints.of(machine.environ), notice)
    if where.ends:
        preemption.limit(where.ends, settings.checkpoint.grace_seconds, notice)

    def asked(why: str) -> None:
        notice.request(why, settings.checkpoint.grace_seconds)

    digest = config.digest(settings)
    with cluster.join(where, settings.run.url, digest, len(gpus), asked, notice.interrupt) as peers:
        cache.make()
        if where.rank:
            help_out(Here(machine, store, cache, team, peers, where.ends))
        else:
            lead(Here(machine, store, cache, team, peers, where.ends), restart=restart)


def lead(here: Here, *, restart: bool) -> None:
    """Do it in order, as the machine that owns the run; the others train with it."""
    from job import attempts, claim, convert, inputs, lease, paths, publish, pull, report, storage

    config, notice, after = here.machine.config, here.machine.notice, here.machine.after
    cache = here.cache
    store = storage.checked(here.store, paths.PROBE, required=config.run.conditional_writes == "required")
    here = ready(here, trained=not restart and publish.trained(store, claim.agree(store, config)))
    owner, attempt = lease.take(store, config.run.lease_seconds, after)
    began = claim.claim(store, config, attempt, owner.confirm, restart=restart)
    if _over(store, cache, config, began, notice):  # by the start that owned it until now
        return
    log_file = log.to_file(cache.log(), anew=True)
    attempts.begin(store, log_file, attempt, publish.progress(store, began), config.run.give_up_after, here.ends)
    owner.keep(notice.interrupt, attempts.Witness(store, log_file, attempt))
    after.callback(attempts.keep, store, log_file, paths.attempt(attempt), owner.confirm)
    log.phase("pull")
    trained = publish.trained(store, began)
    if trained:
        here.peers.release()
    else:
        here.peers.tell(pull=True, offloaded=here.offloaded, on_gpu=here.on_gpu)
    base = convert.native(pull.base(config.model.base, cache), cache, after)
    if not trained:
        start = inputs.Start(attempt, began, owner.token, attempts.between(store, attempt))
        made = train(dataclasses.replace(here, store=store), owner, start, base)
        here.peers.release()
        log.phase("publish")
        publish.directory(store, made / "report", paths.REPORT, owner.confirm)
        publish.directory(store, made / "adapter", paths.ADAPTER, owner.confirm)
    adapter = pull.artefact(store, paths.ADAPTER, cache, owner.confirm)
    figures = pull.artefact(store, paths.REPORT, cache, owner.confirm)
    if not (publish.merged(store, began) if config.merge.enabled else (figures / paths.SEEN).exists()):
        merged = combine(here, base, adapter, figures)
        log.phase("publish")
        publish.directory(store, figures, paths.REPORT, owner.confirm)
        if merged:
            publish.directory(store, merged, paths.MERGED, owner.confirm)
    log.phase("publish")
    spent = attempts.spent(store, log_file, attempt, began)
    facts = json.loads((adapter / paths.TRAINING).read_text(encoding="utf-8"))
    written = report.write(config, facts, spent, figures, store.url)
    publish.directory(store, written, paths.REPORT, owner.confirm)
    record = publish.done(store, config, facts, spent, attempt, owner.confirm)
    notice.conclude()
    shutil.rmtree(cache.work(""), ignore_errors=True)
    _say_done("done", config, record)


def ready(here: Here, *, trained: bool = False, helps: bool = False, look: bool = False) -> Here:
    """Refuse what this machine cannot run before anything large is downloaded; choose the strategy.

    Only where there are GPUs is the model sized up, which takes seconds.
    """
    from job import cluster, launch, pull

    config, gpus = here.machine.config, cluster.gpus(here.machine.environ)
    trains = not trained and not helps  # a node that helps hears later whether there is training to do
    if trains:
        check_training_machine(here)
    found = pull.survey(config, trained=trained, helps=helps)
    plan = launch.Plan(here.team)
    if trains and gpus:
        with tempfile.TemporaryDirectory() as folder:
            found.outline(Path(folder), code=config.model.trust_remote_code)
            memory = cluster.memory(gpus[: here.team.processes])
            plan = launch.plan(config, Path(folder), here.team, memory)
    elif trains:
        plan = launch.Plan(launch.place(config, None, here.team, None))
    pull.preflight(config, here.cache, here.machine.after, found, scratch=plan.scratch, look=look, helps=helps)
    return dataclasses.replace(here, team=plan.team, offloaded=plan.offloaded, on_gpu=plan.on_gpu)


def check_training_machine(here: Here) -> None:
    """Raise if training cannot run on this machine: its GPUs, its driver, its compiler, its environment."""
    from job import cluster, launch

    config, environ = here.machine.config, here.machine.environ
    gpus = cluster.gpus(environ)
    if gpus:
        launch.check_environment(config, environ)
    launch.check_hardware(config, gpus, environ)
    launch.check_machine(environ, here.cache.kernels())


def train(here: Here, owner: "Lease", start: "Start", base: "Base") -> Path:
    """Train as the first of the machines, from the latest checkpoint on; returns the folder of the result."""
    from job import checkpoint, cluster, launch, paths, publish, pull

    config, machine, store, cache, peers = here.machine.config, here.machine, here.store, here.cache, here.peers
    seeing = base if config.train.method == "sft" else None  # pairs of answers are compared on text only
    files = pull.data(config.data.sources("train"), cache, seeing, config.data.images)
    held_out = pull.data(config.data.sources("eval"), cache, seeing, config.data.images)
    log.phase("prepare")
    from job import prepare

    data = prepare.dataset(config, base, files, held_out, cache, machine.after)
    log.phase("load")
    gpus, team = cluster.gpus(machine.environ), here.team
    meeting = machine.after.enter_context(cluster.listen(here=team.nodes == 1)) if team.grouped else None
    if meeting:
        team = dataclasses.replace(team, port=meeting.getsockname()[1])
    made_from = launch.digests(config, start, base, data)
    kept = checkpoint.Checkpoints(
        store, start.attempt, made_from, config.checkpoint.keep, cache.work("attempt"), owner.confirm
    )
    resumed = kept.latest()
    task = launch.task(config, start, team, base, data, resumed.path if resumed else None, cache)
    if launch.over(task):
        return task.out
    if team.nodes > 1:
        publish.directory(store, data.path, paths.PREPARED, owner.confirm)
    peers.gather()
    name = resumed.name if resumed else None
    peers.tell(start=dataclasses.asdict(start), team=dataclasses.asdict(team), inputs=made_from, resumed=name)
    peers.await_ready()
    environ = launch.environment(
        machine.environ,
        team,
        gpus,
        peers.address,
        kernel_cache=cache.kernels(),
        deterministic=config.train.deterministic,
        offload=config.distributed.offload,
    )
    with publish.tidied(store, start.attempt, machine.notice):
        launch.training(machine.command, task, environ, machine.notice, meeting)
    return task.out


def combine(here: Here, base: "Base", adapter: Path, figures: Path) -> Path | None:
    """Merge, if that is wanted, and look at the result; what is seen of it lies beside the `figures` then."""
    from job import card, cluster, examine, inputs

    config, cache, environ = here.machine.config, here.cache, here.machine.environ
    gpus = cluster.gpus(environ)
    log.phase("merge")
    wanted = config.examine.minutes > 0
    with examine.started(environ, gpus, wanted=wanted) as program:  # it imports while we do
        from job import merge

        merged = merge.merged(config, base, adapter, cache) if config.merge.enabled else None
        log.phase("examine")
        other = functools.partial(merge.other, config, base, adapter, cache)
        models = examine.Models(base.path, adapter, merged, other)
        seen = examine.results(models, config, figures, cache.work("seen"), gpus, program)
    if merged:
        merge.tell(merged, card.merged(config, base.path, inputs.facts(merged), seen))
    return merged


def help_out(here: Here) -> None:
    """Train with the first machine when it says so, and stay until it has published: to be needed again is possible."""
    from job import attempts, checkpoint, cluster, convert, inputs, launch, paths, pull

    machine, config, store, cache, first = here.machine, here.machine.config, here.store, here.cache, here.peers
    ready(here, helps=True)
    log_file = log.to_file(cache.log(), anew=True)
    told = first.hear()
    if "pull" in told:
        check_training_machine(here)
        # only the first node sizes the model up, but each has its own host memory and GPUs
        launch.check_offloaded(told["offloaded"], cluster.free_memory(), cluster.total_memory())
        gpus = cluster.gpus(machine.environ)[: here.team.processes]
        launch.check_gpu_memory(told["on_gpu"], cluster.memory(gpus))
        log.phase("pull")
        base = convert.native(pull.base(config.model.base, cache), cache, machine.after)
        told = first.hear()
    if "start" in told:
        start = inputs.Start(**told["start"])
        place = paths.attempt(start.attempt, here.team.node)
        machine.after.callback(attempts.keep, store, log_file, place, lambda: None)
        data = pull.prepared(store, told["inputs"]["data"], cache)
        if launch.digests(config, start, base, data) != told["inputs"]:
            raise errors.ModelError(
                f"model.base {base.url} is not on this node what it is on the first: pin its revision"
            )
        kept = checkpoint.Checkpoints(
            store, start.attempt, told["inputs"], config.checkpoint.keep, cache.work("attempt")
        )
        resumed = kept.named(told["resumed"]).path if told["resumed"] else None
        team = dataclasses.replace(inputs.Team(**told["team"]), node=here.team.node)
        task = launch.task(config, start, team, base, data, resumed, cache)
        environ = launch.environment(
            machine.environ,
            team,
            cluster.gpus(machine.environ),
            first.address,
            kernel_cache=cache.kernels(),
            deterministic=config.train.deterministic,
            offload=config.distributed.offload,
        )
        log.event(
            "node.train", f"training as node {here.team.node} of {here.team.nodes}; the first one tells how it goes"
        )
        first.ready()
        launch.training(machine.command, task, environ, machine.notice)
    while "done" not in told:
        told = first.hear()
    machine.notice.conclude()
    shutil.rmtree(cache.work(""), ignore_errors=True)
    log.event("run.done", f"done: the results are in {store.url}", status=errors.DONE)


def look(machine: cli.Machine, *, restart: bool = False) -> None:
    """See whether the run could begin, and change nothing."""
    from job import claim, cluster, launch, paths, publish, storage

    config = machine.config
    gpus = cluster.gpus(machine.environ)
    team = launch.team(config, cluster.discover(machine.environ), len(gpus))
    store = storage.connect(config.run.url)
    trained = not restart and publish.trained(store, claim.agree(store, config))
    storage.checked(store, paths.PROBE, required=config.run.conditional_writes == "required")
    cache = cli.cache(config, machine.environ)
    cache.check()
    ready(Here(machine, store, cache, team, cluster.Alone(), None), trained=trained, look=True)


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
    message = f"{how}: {report.summary(record)}; results in {places}"
    log.event("run.done", message, status=errors.DONE, artefacts=record["artefacts"])


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainer would tell the hub of every start
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as the driver and `nvidia-smi` count GPUs
    cli.main(cli.Program(story, look, os.environ, (sys.executable, str(Path(__file__).resolve()))))
