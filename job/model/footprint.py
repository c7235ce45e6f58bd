"""What a base model and its adapter consist of, counted from its config.json alone.

Counting imports torch and transformers, which takes seconds and a gigabyte that the job itself does
not want: `ask` does it in a process of its own.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import errors, log
from job.config import Config

SETTINGS, TENSORS = "settings.json", "tensors.json"  # beside the config.json
_RESULT = "footprint.json"
_ROOT = Path(__file__).parents[2]
_PROGRAM = """
import logging, os, sys
os.environ["HF_MODULES_CACHE"] = os.path.join(sys.argv[1], "modules")  # code of the base leaves nothing behind
logging.disable(logging.WARNING)  # what there is to warn of is said again when the model is loaded
from job.model.measure import main
main(sys.argv[1])
"""
_SHOWN = 4  # kinds of weights in a message
_SMALL = 10**7  # weights that are told one by one


@dataclass(frozen=True)
class Footprint:
    """Sizes of a base as `model.quantization` holds it, and of its adapter; bytes, if not counts."""

    weights: int
    """How many the base has."""
    unquantized: Mapping[str, int]
    """How many of them stay in 16 bits (or as compute_dtype says), by their kind of module."""
    scheme: str
    """How the base comes quantized, if it does."""
    blocks: int
    """The decoder layers, with packed weights as they are packed."""
    block: int
    """The largest of them."""
    ends: int
    """What lies outside of them: embeddings, head, last norm."""
    constants: int
    """Scales, zero points and tables that packed weights are unpacked with."""
    unpacked: int
    """The largest packed weight once it is unpacked to be computed with."""
    trained: int
    """How many weights the adapter has."""
    inputs: float
    """Inputs of the layers with an adapter: of all in one decoder layer, on average."""
    outputs: float
    """Their outputs, likewise."""
    adapted: float
    """Their weights in the base, likewise."""
    dora_inputs: int
    """Inputs of the one for which DoRA makes the largest matrices; 0 if there is none."""
    dora_outputs: int
    """Its outputs."""
    layers: int
    hidden: int
    """Width of the hidden states."""
    wide: int
    """Width inside the MLP; in a mixture, of all experts together that one token goes to."""
    experts: int
    """How many experts one token goes to; 0 in a dense model."""
    vocabulary: int
    width: int
    """Bytes of a number in the compute dtype."""

    @property
    def base(self) -> int:
        """The frozen base without the constants."""
        return self.blocks + self.ends


def describe_unquantized(weights: int, unquantized: Mapping[str, int]) -> str:
    """Return how many weights of a quantized model are not quantized, and the largest kinds."""
    largest = sorted(unquantized.items(), key=lambda item: -item[1])[:_SHOWN]
    kinds = ", ".join(f"{kind} {_in_billions(count)}" for kind, count in largest)
    count = _in_billions(sum(unquantized.values()))
    return f"{count} of {_in_billions(weights)} weights are not quantized: {kinds}"


def count_dora_matrices(inputs: int, outputs: int, width: int) -> int:
    """Return the bytes of DoRA's temporary matrices for one layer, numbers having `width` bytes.

    PEFT multiplies the adapter's matrices by sending an identity [inputs, inputs] in float32
    through them. Under autocast to 16 bits a copy of it is made, which autograd keeps while the
    product lives. The norm of W + BA then needs W, BA, the scaled BA and the sum in float32, the
    number format of the adapter's input.
    """
    identity, matrix = inputs * inputs, inputs * outputs
    if width == 4:  # noqa: PLR2004 - bytes of float32: no autocast, no copy
        return 4 * identity + 16 * matrix
    product = (4 + width) * identity + width * matrix
    norm = width * identity + 16 * matrix
    return max(product, norm)


def ask(settings: Config, folder: Path) -> Footprint | None:
    """Count in another process what the model would consist of whose config.json is in `folder`.

    If the base comes quantized, `tensors.json` there has the dtype and shape of every tensor in its
    files. With ``trust_remote_code`` the Python files of the base are there too. Raises
    `errors.ModelError` if transformers does not know the model, or lora.targets does not fit it,
    and `errors.JobError` if the process dies.
    """
    (folder / SETTINGS).write_text(settings.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-c", _PROGRAM, str(folder)]
    # A request to stop is ours to hear: the process is killed when we are interrupted.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        _, output = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        raise errors.JobError(f"the process that sizes the model up ended with {process.returncode}: {last}")
    return read(folder)


def read(folder: Path) -> Footprint | None:
    """Return what `write` has written, None with a warning if the model could not be sized up.

    Raises `errors.ModelError` if the model or its targets cannot be used.
    """
    result: dict[str, Any] = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    if "error" in result:
        raise errors.ModelError(result["error"])
    if "unknown" in result:
        log.warn(
            "model.unsized",
            f"cannot estimate the memory of this model from its config.json ({result['unknown']}): whether it fits "
            "shows when it is loaded",
        )
        return None
    return Footprint(**result)


def write(folder: Path, result: Footprint | errors.PermanentError | str) -> None:
    """Write for the process that asked: a footprint, an error of the user's, or why there is no estimate."""
    if isinstance(result, Footprint):
        answer: dict[str, Any] = dataclasses.asdict(result)
    elif isinstance(result, str):
        answer = {"unknown": result}
    else:
        answer = {"error": str(result)}
    (folder / _RESULT).write_text(json.dumps(answer), encoding="utf-8")


def _in_billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= _SMALL else f"{count:,}"
