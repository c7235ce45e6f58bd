"""What training makes of the errors of torch: whose failure each of them is, and what to do about it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from job import config, errors, inputs
from job.train import session
from job.train.ranks import Ranks

HUGE = 1 << 55  # bytes, which no machine has


@pytest.fixture
def task(tiny_run: Callable[..., Path], tmp_path: Path) -> inputs.Task:
    settings, start = config.read(tiny_run()), inputs.Start(1, 0, "token", 60.0)
    team = inputs.Team(nodes=2, processes=2)
    return inputs.Task(settings, start, team, tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, {}, None)


@pytest.fixture
def raised(task: inputs.Task) -> Callable[[Callable[[], object]], BaseException]:
    """What training raises when this happens in the third micro batch of a step."""
    ranks = Ranks(task.team, rank=1)
    ranks.mark("step 7, micro batch 3")

    def run(happens: Callable[[], object]) -> BaseException:
        with (
            pytest.raises(BaseException) as caught,  # noqa: PT011 - which one is what the tests ask
            ranks.together(),
            session._explaining_failures(task, ranks),
            ranks.together(),
        ):
            happens()
        return caught.value

    return run


def throw(error: Exception) -> Callable[[], object]:
    def happens() -> None:
        raise error

    return happens


Raised = Callable[[Callable[[], object]], BaseException]


@pytest.mark.parametrize(
    "happens",
    [lambda: torch.empty(HUGE, dtype=torch.uint8), lambda: bytearray(HUGE)],
    ids=["torch", "python"],
)
def test_memory_of_the_host_that_is_not_there_is_called_so(happens: Callable[[], object], raised: Raised) -> None:
    """Really asked for."""
    error = raised(happens)

    assert isinstance(error, errors.HostMemoryError)
    assert str(error).startswith("the host's memory is used up at step 7, micro batch 3: ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError("Allocation on device would exceed allowed memory"),  # backend:cudaMallocAsync
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        distributed.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_memory_of_the_gpu_that_is_not_there_is_permanent(error: Exception, raised: Raised) -> None:
    """Whichever library says it, and in whichever class of error."""
    made = raised(throw(error))

    assert isinstance(made, errors.GpuMemoryError)
    assert made.status == 64
    assert "at step 7, micro batch 3" in str(made)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 719 'unspecified launch failure'"),
    ],
)
def test_a_fault_of_this_processs_gpu_is_not_the_loss_of_another(error: Exception, raised: Raised) -> None:
    """NCCL raises both in one class."""
    made = raised(throw(error))

    assert isinstance(made, errors.GpuError)
    assert made.status == 1


@pytest.mark.parametrize(
    "error",
    [
        distributed.DistBackendError("NCCL error: remote process exited or there was a network error, ncclRemoteError"),
        RuntimeError("[/pytorch/third_party/gloo/pair.cc:538] Connection closed by peer [10.0.0.2]:1234 gloo"),
    ],
)
def test_another_process_that_is_gone_is_a_loss(error: Exception, raised: Raised) -> None:
    """Not this one's failure: 75."""
    assert isinstance(raised(throw(error)), errors.PeerError)


def test_any_other_error_stays_what_it_is(raised: Raised) -> None:
    """A wrong shape is nobody's hardware."""
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    assert raised(throw(error)) is error
