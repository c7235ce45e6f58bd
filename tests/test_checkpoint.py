"""Which training steps are safe: what is kept, what is skipped, what is forgotten, and what comes back."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from conftest import files
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from job import checkpoint, errors, storage
from job.checkpoint import state as states

INPUTS = {"base": "b1", "data": "d1"}


def loop(kind: type[torch.optim.Optimizer]) -> states.Loop:
    """A network with one trained layer, large enough for 8-bit states, after a step."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    network[0].requires_grad_(requires_grad=False)
    optimizer = kind([p for p in network.parameters() if p.requires_grad], lr=0.1)
    return states.Loop(network, optimizer, LambdaLR(optimizer, lambda step: 1 / (step + 1)), None)


def step(made: states.Loop, seed: int) -> None:
    torch.manual_seed(seed)
    made.optimizer.zero_grad()
    made.network(torch.randn(4, 64)).square().mean().backward()
    made.optimizer.step()
    made.scheduler.step()  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class ScaledLoop(states.Loop):
    """A loop with torch's scaler: accelerate makes one on a GPU only, but it works on a CPU too."""

    scaler: torch.amp.GradScaler


def scaled_loop() -> ScaledLoop:
    plain = loop(torch.optim.AdamW)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    return ScaledLoop(plain.network, plain.optimizer, plain.scheduler, scaler)


def step_scaled(made: ScaledLoop, seed: int, factor: float = 1.0) -> None:
    """Do a step whose loss is multiplied by `factor`; the scaler skips an infinite one."""
    torch.manual_seed(seed)
    made.optimizer.zero_grad()
    loss = made.network(torch.randn(4, 64)).square().mean() * factor
    made.scaler.scale(loss).backward()
    made.scaler.step(made.optimizer)
    made.scaler.update()
    made.scheduler.step()  # type: ignore[attr-defined]


@pytest.fixture
def store(tmp_path: Path) -> storage.Store:
    return storage.connect((tmp_path / "store").as_uri())


@pytest.fixture
def checkpoints(store: storage.Store, tmp_path: Path) -> Callable[..., checkpoint.Checkpoints]:
    def of(attempt: int = 1, keep: int = 2, inputs: dict[str, str] = INPUTS) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(store, attempt, inputs, keep, tmp_path / f"scratch-{attempt}")

    return of


def state(number: int) -> states.State:
    return states.capture(number, loop(torch.optim.AdamW), "{}", {})


def names(store: storage.Store) -> set[str]:
    return {e.key.split("/")[1] for e in store.list("checkpoints/")}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit])
def test_training_goes_on_bitwise_where_it_stopped(
    kind: type[torch.optim.Optimizer], checkpoints: Callable[..., checkpoint.Checkpoints]
) -> None:
    """Weights, optimizer states of every kind, learning rate and schedule come back exactly."""
    whole, broken, resumed = loop(kind), loop(kind), loop(kind)
    for seed in range(4):
        step(whole, seed)
    for seed in range(2):
        step(broken, seed)
    checkpoints().save(states.capture(2, broken, "{}", {}), None)

    found = checkpoints(attempt=2).latest()
    assert found
    states.restore_adapter(found.path, resumed.network)
    states.restore_optimizer(found.path, resumed)
    for seed in range(2, 4):
        step(resumed, seed)

    assert all(map(torch.equal, resumed.network.parameters(), whole.network.parameters()))
    assert resumed.scheduler.state_dict()["last_epoch"] == 4


def test_the_loss_scale_of_float16_comes_back(
    checkpoints: Callable[..., checkpoint.Checkpoints],
) -> None:
    """The halved scale and the count of good steps: the resumed scaler grows at the same step."""
    stopped, resumed = scaled_loop(), scaled_loop()
    before = stopped.scaler.state_dict()
    for seed, factor in enumerate((1.0, math.inf, 1.0, 1.0)):
        step_scaled(stopped, seed, factor)
    expected = {**before, "scale": before["scale"] / 2, "_growth_tracker": 2}
    checkpoints().save(states.capture(4, stopped, "{}", {}), None)

    found = checkpoints(attempt=2).latest()
    assert found
    states.restore_adapter(found.path, resumed.network)
    states.restore_optimizer(found.path, resumed)

    assert resumed.scaler.state_dict() == expected
    for each in (stopped, resumed):
        step_scaled(each, 4)  # the third good step in a row
    assert resumed.scaler.state_dict() == {**before, "_growth_tracker": 0}
    assert all(map(torch.equal, resumed.network.parameters(), stopped.network.parameters()))


def test_a_checkpoint_holds_no_pickle(checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store) -> None:
    """Safetensors and JSON only: who can write the bucket cannot run code in the job."""
    checkpoints().save(state(5), None)

    assert {e.key.rpartition(".")[2] for e in store.list("checkpoints/")} == {"safetensors", "json"}


def test_the_newest_complete_checkpoint_is_the_latest(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store
) -> None:
    """By step, then by attempt; one without a manifest does not count."""
    for attempt, number in ((1, 10), (2, 9), (2, 20)):
        checkpoints(attempt, keep=9).save(state(number), None)
    store.delete("checkpoints/00000020-2/manifest.json")

    found = checkpoints(3).latest()

    assert found
    assert found.step == 10


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_skipped_and_said(
    damage: str,
    checkpoints: Callable[..., checkpoint.Checkpoints],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one before it stands in."""
    for number in (10, 20):
        checkpoints().save(state(number), None)
    path = tmp_path / "store" / "checkpoints" / "00000020-1" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-1])
    shutil.rmtree(tmp_path / "checkpoints")  # another machine

    found = checkpoints(2).latest()

    assert found
    assert found.step == 10
    assert "00000020-1/ is" in caplog.text


def test_retention_keeps_the_newest_and_the_best(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store
) -> None:
    """Older ones go only after a newer one is sealed, and what earlier attempts left incomplete goes too."""
    checkpoints(1).save(state(10), None)
    store.put("checkpoints/00000015-1/adapter.safetensors", b"half")
    for number in (20, 30, 40):
        checkpoints(2).save(state(number), best_step=20)

    assert names(store) == {"00000020-2", "00000030-2", "00000040-2"}
    assert checkpoints(3).at(20).step == 20


def test_a_best_checkpoint_that_is_lost_ends_the_run(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store
) -> None:
    """Nothing could take its place but another result, and every start would find the same; what helps is said."""
    for number in (10, 20):
        checkpoints(1).save(state(number), best_step=10)
    store.put("checkpoints/00000010-1/state.json", b"{}")

    with pytest.raises(errors.PermanentError, match=r"step 10, which had the best .* train anew with `--restart`"):
        checkpoints(2).at(10)
    with pytest.raises(errors.PermanentError):
        checkpoints(3).at(15)


def test_what_others_put_beside_the_checkpoints_stays(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store
) -> None:
    """It is neither gone on with nor removed."""
    store.put("checkpoints/best/manifest.json", b"{}")
    for number in (10, 20, 30):
        checkpoints(1).save(state(number), None)

    found = checkpoints(2).latest()

    assert found
    assert found.step == 30
    assert names(store) == {"best", "00000020-1", "00000030-1"}


def test_a_checkpoint_is_what_it_was_when_it_was_taken(checkpoints: Callable[..., checkpoint.Checkpoints]) -> None:
    """Training goes on while it waits to be written, and changes weights, states and the sums of the log in place."""
    made, sums = loop(torch.optim.AdamW), {"metrics": {"accuracy": [0.5]}}
    step(made, 1)
    taken = states.capture(1, made, "{}", sums)
    weights = {name: tensor.clone() for name, tensor in taken.adapter.items()}

    step(made, 2)
    sums["metrics"]["accuracy"].append(0.75)
    checkpoints().save(taken, None)
    before = {name: tensor.data_ptr() for name, tensor in (taken.adapter | taken.optimizer).items()}
    again = states.capture(2, made, "{}", sums, taken)

    found = checkpoints(2).latest()
    assert found
    assert states.unlogged(found.path) == {"metrics": {"accuracy": [0.5]}}
    kept = load_file(found.path / "adapter.safetensors")
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert {name: tensor.data_ptr() for name, tensor in (again.adapter | again.optimizer).items()} == before
    assert all(torch.equal(again.adapter[name], parameter) for parameter, name in made.names.items())
    assert not all(torch.equal(again.adapter[name], weights[name]) for name in weights)


def test_a_checkpoint_of_other_inputs_is_refused(checkpoints: Callable[..., checkpoint.Checkpoints]) -> None:
    """Resuming on another base or other data would be another training."""
    checkpoints().save(state(10), None)

    with pytest.raises(errors.ModelError, match="was trained with another data"):
        checkpoints(2, inputs={**INPUTS, "data": "d2"}).latest()


def test_a_broken_adapter_is_never_kept(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store, tmp_path: Path
) -> None:
    """NaN in the weights ends the run before anything is written."""
    broken = state(10)
    name = next(iter(broken.adapter))
    broken = dataclasses.replace(broken, adapter={**broken.adapter, name: torch.full((2,), float("nan"))})

    with pytest.raises(errors.ModelError, match="step 10: the adapter holds NaN or Inf"):
        checkpoints().save(broken, None)

    assert store.list() == []
    assert files(tmp_path) == set()


def test_an_adapter_of_another_shape_is_refused(checkpoints: Callable[..., checkpoint.Checkpoints]) -> None:
    """Names and shapes must be those of the model."""
    checkpoints().save(state(10), None)
    found = checkpoints(2).latest()
    assert found

    with pytest.raises(errors.ModelError, match="does not fit the model"):
        states.restore_adapter(found.path, torch.nn.Linear(2, 2))


def test_without_checkpoints_training_starts_anew(checkpoints: Callable[..., checkpoint.Checkpoints]) -> None:
    """An empty store has no latest checkpoint."""
    assert checkpoints().latest() is None


def test_a_machine_that_helps_keeps_one_checkpoint(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store, tmp_path: Path
) -> None:
    """The one that the first machine named; a long run would fill its disk."""
    made = checkpoints()
    made.save(state(1), None)
    made.save(state(2), None)
    helper = checkpoint.Checkpoints(store, 2, INPUTS, 2, tmp_path / "helper" / "scratch")
    assert helper.named("checkpoints/00000001-1/").step == 1

    found = helper.named("checkpoints/00000002-1/")

    assert found.step == 2
    assert [path.name for path in found.path.parent.iterdir() if path.is_dir()] == [found.path.name]


def test_checkpoints_of_before_a_restart_are_not_gone_on_with(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store
) -> None:
    """They go when the new run has a checkpoint of its own."""
    checkpoints(attempt=1).save(state(10), None)
    restarted = checkpoints(attempt=2, inputs=INPUTS | {"began": "2"})

    assert restarted.latest() is None
    assert names(store) == {"00000010-1"}
    restarted.save(state(2), None)

    found = restarted.latest()
    assert found
    assert found.step == 2
    assert names(store) == {"00000002-2"}


def test_a_damaged_checkpoint_is_believed_by_nobody_any_more(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store, said: Callable[[], str]
) -> None:
    """An older one takes its place; what is there of it stays until retention removes it."""
    made = checkpoints()
    made.save(state(1), None)
    made.save(state(2), None)
    store.put("checkpoints/00000002-1/state.json", b"{}")

    found = checkpoints(attempt=2).latest()

    assert found
    assert found.step == 1
    assert "00000002-1/ is incomplete. It is skipped and quarantined" in said()
    left = {entry.key for entry in store.list("checkpoints/00000002-1/")}
    assert "checkpoints/00000002-1/manifest.json" not in left
    assert "checkpoints/00000002-1/quarantined-manifest.json" in left


def test_the_newest_checkpoint_is_here_already_after_a_restart_of_the_job(
    checkpoints: Callable[..., checkpoint.Checkpoints], store: storage.Store, tmp_path: Path
) -> None:
    """On the same machine nothing is fetched; older ones do not fill its disk."""
    made = checkpoints()
    made.save(state(1), None)
    made.save(state(2), None)
    for entry in store.list("checkpoints/00000002-1/"):
        if not entry.key.endswith("manifest.json"):
            (tmp_path / "store" / entry.key).write_bytes(bytes(entry.size))  # whoever fetches them would notice

    found = made.latest()

    assert found
    assert found.step == 2
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {"00000002-1"}
