"""Where the frozen base is sharded: over which GPUs, and with offload in which host memory."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import nvml
import pytest
import shapes

import entrypoint
from job import cli, cluster, config, errors, inputs, launch, log, paths, preemption, storage
from job.launch import planning, strategy
from job.launch.strategy import Need
from job.model import measure
from job.model.footprint import Footprint

GIB = 2**30
TWO_NODES = inputs.Team(nodes=2, processes=4, gpus=True)
OFFLOAD = {"strategy": "fsdp", "offload": True}


def measure_70b(
    folder: Path, quantization: str, **sections: dict[str, object]
) -> tuple[config.Config, Footprint, Need]:
    """Return a config, the sizes and the need of Llama 3.1 70B; 141 GB without quantization."""
    settings = shapes.settings(model={"quantization": quantization}, **sections)
    sizes = measure.measure(shapes.outline("Llama-3.1-70B-Instruct", folder), settings)
    return settings, sizes, strategy.estimate(settings, sizes)


@pytest.mark.parametrize(("room", "shards"), [(None, 4), (150e9, 4), (130e9, 8)])
def test_offload_shards_within_a_node_if_its_host_memory_holds_the_base(
    room: float | None, shards: int, tmp_path: Path
) -> None:
    """The GPUs of 24 GB need not hold their shares of 35 GB; only what is gathered counts there."""
    settings, sizes, _ = measure_70b(tmp_path, "none", distributed=OFFLOAD)

    placed = launch.place(settings, sizes, TWO_NODES, 24 * GIB, room)

    assert placed.shards == shards


def test_offload_leaves_a_gpu_what_is_gathered(tmp_path: Path) -> None:
    """Embeddings, head and a layer with the adapter, and the buffer that several gather through."""
    data = {"max_length": 16384}
    _, sizes, need = measure_70b(tmp_path, "nf4", distributed=OFFLOAD, data=data)
    gathered = sizes.ends + sizes.block + sizes.constants + 4 * sizes.trained

    assert need.fixed(1) == pytest.approx(gathered + 4 * sizes.trained)  # gradients, and no buffer
    assert need.fixed(4) == need.fixed(8) == pytest.approx(gathered + sizes.ends)
    # a layer more is gathered early; 1 GB is what CUDA takes
    each = gathered + sizes.block + 4 * sizes.trained + need.optimizer + need.activations + 1e9
    assert need.on_each(4, 8) == pytest.approx(each)
    few = replace(need, activations=0.0)
    assert few.on_each(4, 8) == pytest.approx(gathered + sizes.ends + need.optimizer + 1e9)


def test_offload_is_refused_where_not_even_what_is_gathered_fits(tmp_path: Path) -> None:
    """Before anything is downloaded, with what a GPU still needs."""
    settings, sizes, _ = measure_70b(tmp_path, "none", distributed=OFFLOAD)

    told = r"with distributed\.offload each GPU of 10\.7 GB still needs 10\.9 GB .* use nf4, larger"
    with pytest.raises(errors.ConfigError, match=told):
        launch.choose(settings, sizes, TWO_NODES, 10 * GIB)


def test_offload_is_warned_of_activations_that_hardly_fit(
    tmp_path: Path,
    said: Callable[[], str],
) -> None:
    """They are on the GPU wherever the base is."""
    for length in (1024, 16384):
        data = {"max_length": length}
        settings, sizes, need = measure_70b(tmp_path, "none", distributed=OFFLOAD, data=data)
        launch.choose(settings, sizes, TWO_NODES, 24 * GIB)
        assert ("may be too much" in said()) == (length > 1024)

    assert f"about {log.size(need.on_each(4, 8))} for each GPU of 25.8 GB" in said()


def test_zero2_offloads_no_base(tmp_path: Path) -> None:
    """DeepSpeed moves the optimizer alone to host memory there, and each GPU keeps the base."""
    _, sizes, need = measure_70b(
        tmp_path,
        "nf4",
        distributed={"strategy": "zero2", "offload": True},
        train={"optimizer": "adamw_torch"},
    )

    assert not need.offload
    assert need.fixed(1) > sizes.base


def test_the_log_tells_the_shards_that_are_used(tmp_path: Path, said: Callable[[], str]) -> None:
    """Four on each of two nodes, where the GPUs of a node hold a copy, and not all eight."""
    settings, sizes, need = measure_70b(tmp_path, "nf4")

    placed = launch.place(settings, sizes, TWO_NODES, 24 * GIB)

    assert placed.shards == 4
    each = log.size(need.on_each(4, 8))
    assert f"one of 4 shards of it {each}, so the strategy is fsdp" in said()
    assert each != log.size(need.on_each(8, 8))


class HeardError(Exception):
    """What the first node told the others, which ends it here."""


class Nodes(cluster.Alone):
    """The other nodes for the first one, and the first one for another."""

    def __init__(self, **message: object) -> None:
        self._messages = iter([message])

    def tell(self, **message: object) -> None:
        raise HeardError(message)

    def hear(self) -> dict[str, object]:
        """Return the message, once: who listens again did not end where it should have."""
        return next(self._messages)


def test_each_node_checks_its_own_host_memory(
    tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tells what each node holds of an offloaded base; a node without room ends with 64.

    It ends with 1 where only what is free now is too little.
    """
    settings = config.read(tiny_run(distributed=OFFLOAD))
    nvml.install(monkeypatch, [nvml.Card()])
    monkeypatch.setattr(entrypoint, "check_training_machine", lambda _: None)  # of torch for CPUs

    def machine(node: int, peers: cluster.Alone) -> entrypoint.Here:
        program = cli.Machine(settings, {}, preemption.Notice(), ExitStack(), ())
        cache = paths.Cache(tmp_path / f"cache{node}", "run")
        cache.make()
        team = inputs.Team(nodes=2, node=node, gpus=True)
        return entrypoint.Here(program, storage.connect(settings.run.url), cache, team, peers, None)

    first = machine(0, Nodes())
    with first.machine.after, pytest.raises(HeardError) as told:
        entrypoint.lead(first, restart=False)
    message = told.value.args[0]
    sizes = measure.measure(Path(settings.model.base.removeprefix("file://")), settings)
    need = strategy.estimate(settings, sizes)
    on_gpu = int(need.fixed(2))
    assert message == {"pull": True, "offloaded": sizes.base // 2, "on_gpu": on_gpu}

    total = cluster.total_memory()
    more = f"{log.size(2 * total)} of the model are in host memory"
    with pytest.raises(errors.ConfigError, match=more) as caught:
        entrypoint.help_out(machine(1, Nodes(pull=True, offloaded=2 * total, on_gpu=0)))
    assert caught.value.status == 64
    with pytest.raises(errors.ConfigError, match=r"each GPU needs 99\.0 GB .* one of this machine"):
        entrypoint.help_out(machine(1, Nodes(pull=True, offloaded=0, on_gpu=99 * 10**9)))
    with pytest.raises(errors.HostMemoryError, match=r"free: end what else") as busy:
        launch.check_offloaded(2, 1, 3)
    assert busy.value.status == 1


@pytest.mark.parametrize("wanted", ["zero2", "zero3"])
def test_zero_offload_moves_the_optimizer_from_gpus_to_host_memory(wanted: str, tmp_path: Path) -> None:
    """DeepSpeed keeps float32 weights and both moments of AdamW there, 12 bytes for each."""
    sections = {"train": {"optimizer": "adamw_torch"}, "lora": {"r": 64}}
    needs = {}
    for offload in (False, True):
        distributed = {"strategy": wanted, "offload": offload}
        settings, sizes, needs[offload] = measure_70b(tmp_path, "nf4", distributed=distributed, **sections)
    team = inputs.Team(nodes=2, processes=4, strategy=wanted, gpus=True)
    state, on_host = 12 * sizes.trained, 12 * sizes.trained / 2
    base = needs[True].base / 2 if wanted == "zero3" else 0
    fits = int(3 * state + on_host + base) + 1

    planning.check_host_memory(settings, needs[True], team, fits, fits)
    message = rf"{re.escape(log.size(on_host))} of the optimizer .* more memory"
    with pytest.raises(errors.ConfigError, match=message):
        planning.check_host_memory(settings, needs[True], team, fits - 2, fits - 2)

    if wanted == "zero2":
        saved = needs[False].on_each(1, 8) - needs[True].on_each(1, 8)
        assert saved == pytest.approx(8 * sizes.trained)


@pytest.mark.parametrize(
    ("quantization", "shards", "advice"),
    [
        ("none", 8, "give the job more memory, or set model.quantization to nf4, or use more machines"),
        ("none", 4, "give the job more memory, or set model.quantization to nf4"),
        ("nf4", 8, "give the job more memory, or use more machines"),
    ],
)
def test_an_offloaded_base_that_host_memory_cannot_hold_is_refused_with_what_helps(
    quantization: str, shards: int, advice: str, tmp_path: Path
) -> None:
    """More machines help only where all of them share one copy, and another optimizer never."""
    settings, _, need = measure_70b(tmp_path, quantization, distributed=OFFLOAD)
    team = replace(TWO_NODES, strategy="fsdp", sharded_over=shards)

    with pytest.raises(errors.ConfigError) as caught:
        planning.check_host_memory(settings, need, team, 10**9, 10**9)

    assert str(caught.value).endswith(advice)


def test_dora_under_fsdp_is_refused_where_the_whole_base_cannot_be_loaded(tmp_path: Path) -> None:
    """Each GPU loads all of it first, and PEFT then computes the norms of the largest layer."""
    team = inputs.Team(processes=4, gpus=True)
    a100 = int(39.59 * GIB)
    plain, sizes, _ = measure_70b(tmp_path, "nf4", distributed={"strategy": "fsdp"})
    assert launch.choose(plain, sizes, team, a100) == "fsdp"
    settings, sizes, need = measure_70b(tmp_path, "nf4", distributed={"strategy": "fsdp"}, lora={"dora": True})
    assert sizes.base + sizes.constants < a100 < need.loading

    with pytest.raises(errors.ConfigError, match=r"lora\.dora needs all of it on each GPU of 42\.5"):
        launch.choose(settings, sizes, team, a100)
    assert launch.choose(settings, sizes, team, 48 * GIB) == "fsdp"


def test_only_gpus_that_train_are_looked_at(
    tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller one beside them, which no process uses, refuses nothing."""
    settings = config.read(tiny_run(distributed={"processes_per_node": 1}))
    nvml.install(monkeypatch, [nvml.Card(gigabytes=80), nvml.Card(gigabytes=24)])
    monkeypatch.setattr(entrypoint, "check_training_machine", lambda _: None)  # of torch for CPUs
    memories = []

    def plan(_: object, __: Path, team: inputs.Team, memory: int | None) -> launch.Plan:
        memories.append(memory)
        return launch.Plan(team)

    monkeypatch.setattr(launch, "plan", plan)
    cache = paths.Cache(tmp_path / "cache", "run")
    cache.make()
    program = cli.Machine(settings, {}, preemption.Notice(), ExitStack(), ())
    store = storage.connect(settings.run.url)
    here = inputs.Team(gpus=True)

    with program.after:
        entrypoint.ready(entrypoint.Here(program, store, cache, here, cluster.Alone(), None))

    assert memories == [80 * GIB]
