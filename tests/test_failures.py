"""A failed GPU, a used-up memory or a lost process, told from what torch, CUDA and their libraries say of it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from job import config, errors, failures

GIB = 2**30
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.21 GiB is "
    "free. Including non-PyTorch memory, this process has 22.42 GiB memory in use. Of the allocated memory 21.50 GiB "
    "is allocated by PyTorch, and {} is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
WATCHDOG = (
    "[rank1]:[E409 05:10:01.930967482 ProcessGroupNCCL.cpp:2068] [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group "
    "watchdog thread terminated with exception: {}\n"
    "Exception raised from c10_cuda_check_implementation at /pytorch/c10/cuda/CUDAException.cpp:42 (most recent call "
    "first):\nframe #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80\n\n"
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.28.9\n{}: Call to a library "
    "failed.\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (FULL.format("0.40 GiB"), "gpu memory", "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("CUDA error: out of memory\nCUDA kernel errors might be", "gpu memory", "out of memory"),
        ("CUDA driver error: out of memory", "gpu memory", "out of memory"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "gpu memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "gpu memory", "CUDNN_STATUS_ALLOC_FAILED"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "host memory", "HOST_ALLOCATION"),
        (
            NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"),
            "gpu memory", "NCCL: out of memory",
        ),
        (
            NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 'out of memory'"), "gpu memory",
            "NCCL: out of memory",
        ),
        ("Triton Error [CUDA]: out of memory", "gpu memory", "Triton: out of memory"),
        (
            "Error out of memory at line 559 in file /src/csrc/pythonInterface.cpp\n", "gpu memory",
            "bitsandbytes: out of memory",
        ),
        ("Error invalid argument at line 89 in file /src/csrc/ops.cu\n", "gpu", "bitsandbytes: invalid argument"),
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12", "host memory",
            "you tried to allocate 8 bytes",
        ),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "host memory", "std::bad_alloc"),
        (
            NCCL.format(
                "unhandled system error", "ncclSystemError",
                "Error while creating shared memory segment /dev/shm/nccl-a (size 9637888), error: No space left",
            ),
            "shared memory", "creating shared memory segment",
        ),
        (WATCHDOG.format("CUDA error: an illegal memory access was encountered"), "gpu", "an illegal memory access"),
        (WATCHDOG.format("CUDA error: uncorrectable ECC error encountered"), "gpu", "uncorrectable ECC error"),
        (WATCHDOG.format("CUDA error: unspecified launch failure"), "gpu", "unspecified launch failure"),
        (WATCHDOG.format("CUDA error: device-side assert triggered"), "gpu", "device-side assert triggered"),
        (
            WATCHDOG.format("NCCL error: remote process exited or there was a network error, NCCL version 2.28.9"),
            "peer", "remote process exited",
        ),
        (
            WATCHDOG.format("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4)"), "peer",
            "Watchdog caught",
        ),
    ],
)  # fmt: skip
def test_each_library_has_its_own_words_for_it(text: str, kind: str, said: str) -> None:
    """The texts are those of the sources of torch, NCCL and Triton, and of bitsandbytes' CUDA library."""
    found = failures.find(text)

    assert found
    assert found.kind == kind
    assert said in found.said


def test_what_nobody_knows_is_nothing() -> None:
    """A process that ends while the driver does, and every other error."""
    assert failures.find("CUDA error: driver shutting down") is None
    assert failures.find("KeyError: 'labels'") is None


def test_the_first_failure_is_the_reason() -> None:
    """A process whose GPU failed loses the others, and one that lost the others may end with any CUDA error."""
    own, lost = (
        "CUDA error: unspecified launch failure\n",
        "ncclRemoteError: remote process exited\n",
    )

    assert getattr(failures.find(own + lost), "kind", None) == "gpu"
    assert getattr(failures.find(lost + own), "kind", None) == "peer"


@pytest.mark.parametrize(
    ("text", "free", "kind"),
    [
        (
            "CUDA error: out of memory",
            8 * GIB,
            "host memory",
        ),  # it could not pin memory of the host
        ("CUDA error: out of memory", GIB // 4, "gpu memory"),
        (
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            GIB // 4,
            "gpu memory",
        ),
        (
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            8 * GIB,
            "gpu",
        ),
        (FULL.format("0.40 GiB"), 8 * GIB, "gpu memory"),
    ],
)
def test_what_is_free_on_the_gpu_tells_which_memory_ran_out(text: str, free: int, kind: str) -> None:
    """CUDA has the same words for both, and cuBLAS the same for a missing workspace and a broken driver."""
    found = failures.find(text, free)

    assert found
    assert found.kind == kind


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (WATCHDOG.format("CUDA error: an illegal memory access was encountered"), False),
        (WATCHDOG.format("NCCL error: remote process exited or there was a network error"), True),
        (
            WATCHDOG.format("NCCL error: unhandled system error, ncclSystemError: System call failed"),
            True,
        ),
        ("terminate called after throwing an instance of 'gloo::IoException'", True),
        ("free(): invalid pointer\n", False),
        ("", False),
    ],
)
def test_an_abort_is_the_loss_of_another_only_if_it_says_so(text: str, lost: bool) -> None:  # noqa: FBT001 - pytest's parameters
    """Any other counts as a failure, so that a broken GPU or library is not started on for ever."""
    assert failures.lost_another(text) is lost


def explained(text: str, settings: config.Config) -> errors.JobError:
    found = failures.find(text)
    assert found
    return failures.explain(found, settings, " at step 7")


def test_too_little_memory_on_the_gpu_is_permanent_and_says_what_to_change(
    tiny_run: Callable[..., Path],
) -> None:
    """Every start would come to the same step; the keys that leave the result as it is stand first."""
    settings = config.read(tiny_run(train={"micro_batch_size": 2, "gradient_checkpointing": False}))

    error = explained(FULL.format("0.40 GiB"), settings)

    assert error.status == 64
    assert error.fault == "gpu memory"
    assert re.fullmatch(
        r"the GPU's memory is too small at step 7: CUDA out of memory\. .* reserved by PyTorch but unallocated\. "
        r"Change one of these: lower train\.micro_batch_size \(2; .* same.*\); set train\.gradient_checkpointing.*; "
        r"(set model\.quantization to nf4; )?lower data\.max_length \(\d+\); use more GPUs with .* fsdp",
        str(error),
    ), error


def test_what_cannot_be_lowered_is_not_proposed(tiny_run: Callable[..., Path]) -> None:
    """A micro batch of one is as small as it gets."""
    settings = config.read(tiny_run(train={"micro_batch_size": 1, "gradient_checkpointing": True}))

    assert "train." not in str(explained(FULL.format("0.40 GiB"), settings))


def test_memory_that_only_lay_in_pieces_is_worth_another_start(
    tiny_run: Callable[..., Path],
) -> None:
    """The allocator had as much as it asked for, which a new process finds in one piece."""
    assert explained(FULL.format("2.50 GiB"), config.read(tiny_run())).status == 1
    assert explained(FULL.format("900.00 MiB"), config.read(tiny_run())).status == 64


@pytest.mark.parametrize(
    ("said", "status", "advice"),
    [
        ("uncorrectable ECC error encountered", 1, "is broken: take the node out of service"),
        (
            "uncorrectable NVLink error detected during the execution",
            1,
            "is broken: take the node out of service",
        ),
        ("an illegal memory access was encountered", 1, "If this happens again on the same node"),
        ("device-side assert triggered", 1, "CUDA_LAUNCH_BLOCKING=1"),
        (
            "no kernel image is available for execution on the device",
            64,
            "older than this build of torch supports",
        ),
    ],
)
def test_a_fault_of_the_gpu_says_where_to_look(
    said: str, status: int, advice: str, tiny_run: Callable[..., Path]
) -> None:
    """It is counted; only one that no other start can avoid is permanent."""
    error = explained(f"CUDA error: {said}", config.read(tiny_run()))

    assert error.status == status
    assert str(error).startswith(f"CUDA error at step 7: {said}. ")
    assert advice in str(error)


def test_too_little_memory_on_the_host_is_worth_another_start(
    tiny_run: Callable[..., Path],
) -> None:
    """On a machine that has more, or when others have ended there."""
    offloading = {"distributed": {"strategy": "fsdp", "offload": True}}
    error = explained("DefaultCPUAllocator: can't allocate memory: 8 bytes", config.read(tiny_run(**offloading)))

    assert error.status == 1
    assert error.fault == "host memory"
    assert "set distributed.offload to false" in str(error)
