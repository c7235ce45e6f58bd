"""Compile and launch TRL's loss for GPUs that are not there: `launch_loss_kernels.py 75 80`.

Everything is the real thing down to libcuda, which is the stand-in of `drivers.py` (its folder is
in TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH): TRL's fused LM head calls its kernels, Triton
specializes and compiles them, ptxas makes machine code, and the compiled launcher hands it to
libcuda. Nothing is computed. Prints a line of JSON for each kernel that was compiled.
"""

import ctypes
import itertools
import json
import re
import sys
from collections.abc import Iterator

import torch
import triton
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from trl.kernels import chunked_logprob
from trl.trainer import utils

KERNELS = (chunked_logprob._forward_kernel, chunked_logprob._backward_kernel)
VOCABULARIES = (
    128_256,  # Llama 3: its last tile has a multiple of 16 columns, which Triton specializes on
    32_003,  # one tile, of an odd number of columns
    32_769,  # the last tile has one column: Triton makes a constant of 1
)


class Card(CudaDriver):  # type: ignore[misc]  # triton has no types
    """Triton's own driver on a machine with one GPU of the compute capability `number`."""

    def __init__(self, number: int) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device = lambda: number  # Triton caches by device
        self.get_device_capability = lambda _: divmod(number, 10)
        self.get_current_stream = lambda _: 0


def model_of(vocabulary: int, dtype: torch.dtype, **scaling: float) -> LlamaForCausalLM:
    """A small model whose LM head is fused as TRL's trainer does it for SFT, and for our DPO."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, **scaling,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def train_once(model: LlamaForCausalLM, vocabulary: int) -> None:
    """The losses of SFT and DPO need the same: with gradients, and without for the reference."""
    rows = torch.randint(0, vocabulary, (2, 5))
    model(input_ids=rows, labels=rows, fused_lm_head=True).log_probs.sum().backward()
    with torch.no_grad():
        model(input_ids=rows, labels=rows, fused_lm_head=True)


def compiled(number: int) -> Iterator[dict[str, object]]:
    """Describe each variant that was compiled for this compute capability."""
    for kernel in KERNELS:
        for variant in kernel.device_caches[number][0].values():
            named = variant.src.constants.items()
            constants = {kernel.arg_names[place]: value for (place,), value in named}
            (target,) = re.findall(r"^\.target sm_(\d+)", variant.asm["ptx"], re.MULTILINE)
            yield {
                "kernel": kernel.fn.__name__,
                "card": target,
                "elf": variant.asm["cubin"].startswith(b"\x7fELF"),
                "bytes": len(variant.asm["cubin"]),
                "dtype": variant.src.signature["mm_ptr"],
                "softcap": constants["HAS_SOFTCAP"],
                "constants": constants,
            }


def main(numbers: list[int]) -> None:
    chunked_logprob._use_triton = utils._use_triton = lambda _: True  # else only on a GPU
    scalings: list[dict[str, float]] = [{}, {"final_logit_softcapping": 30.0, "logit_scale": 0.5}]
    for number in numbers:
        triton.runtime.driver.set_active(Card(number))
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for vocabulary, dtype, scaling in itertools.product(VOCABULARIES, dtypes, scalings):
            train_once(model_of(vocabulary, dtype, **scaling), vocabulary)
        for found in compiled(number):
            sys.stdout.write(json.dumps(found) + "\n")
    libcuda = ctypes.CDLL("libcuda.so.1")
    counted = {"modules": libcuda.standin_modules(), "launches": libcuda.standin_launches()}
    sys.stdout.write(json.dumps(counted) + "\n")


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
