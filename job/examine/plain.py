"""Opens models with nothing but transformers and PEFT, and tells what they compute.

A program of its own that imports nothing of the job. It may be started long before it is needed,
because its imports take most of its time on a small model. Each line on its standard input names
two files: one with questions about some models, as JSON, and one for the answers, which gets a line
of JSON for each model as soon as it is known, and at last an empty one. The program ends when its
standard input does, so with the process that started it.
"""

import queue
import sys
import threading

LINES: "queue.SimpleQueue[str]" = queue.SimpleQueue()


def _listen() -> None:
    import os

    for line in sys.stdin:
        LINES.put(line)
    os._exit(0)  # whatever it is at


if __name__ == "__main__":  # before the imports, in which it may be left alone already
    threading.Thread(target=_listen, daemon=True).start()

import errno
import gc
import inspect
import json
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria, StoppingCriteriaList

IGNORED = -100  # the label of a token without loss
READING = 0.5  # of the time that is left: after that no further example is read
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # 12345678",
    "你好，世界。 Grüße aus München! Привет, мир 🙂",
)
_OFFLINE = {"local_files_only": True}
# What libraries begin their errors with, and not any mention: a path may have "cuda" in it.
_OF_GPU = re.compile(
    r"AcceleratorError|CUDA(?: driver)? error|CU(?:BLAS|DNN|SOLVER)_STATUS|cuDNN error|cusolver error"
    r"|Cuda failure|NCCL error|Triton Error|nvrtc: error|device-side assert"
)
Network: TypeAlias = Any  # each family has a class of its own


class Deadline(StoppingCriteria):
    """Ends all answers when their time is over, each with one token at least."""

    def __init__(self, ends: float) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        over = time.monotonic() >= self._ends
        return torch.full((len(input_ids),), over, device=input_ids.device)


def main() -> None:
    """Answer one file of questions after the other."""
    from peft import PeftModel  # noqa: F401 - as early as the others

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    while True:
        names = json.loads(LINES.get())
        asked = json.loads(Path(names["questions"]).read_text(encoding="utf-8"))
        with Path(names["answers"]).open("w", encoding="utf-8") as file:
            for number, model in enumerate(asked["models"]):
                left = len(asked["models"]) - number
                ends = time.monotonic() + (asked["ends"] - time.monotonic()) / left
                found = examine(model, asked["examples"], ends)
                file.write(json.dumps(found) + "\n")
                file.flush()
                if "gpu" in found:  # CUDA may fail in this process for good
                    break
                gc.collect()
                torch.cuda.empty_cache()
            file.write("\n")


def examine(
    model: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    ends: float,
) -> dict[str, Any]:
    """Return what there is to be known of one model, as far as it can be opened and used."""
    found: dict[str, Any] = {"name": model["name"]}
    kind = "error"  # it cannot be opened
    try:
        if model["check_words"]:
            found["tokenizer"] = words(model)
        network = load(model)
        found["class"], found["rows"] = type(network).__name__, _rows(network)
        kind = "failed"  # it can, and what is asked of it is too much here
        found |= look(network, model, examples or by_itself(model), ends)
    except Exception as e:  # noqa: BLE001 - whatever a library raises is the answer
        found[_kind(e) or kind] = f"{type(e).__name__}: {e}"
    return found


def by_itself(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Examples for a model of which none are known: some text, all of it with loss."""
    tokenizer = _tokenizer(model)
    return [{"ids": ids, "labels": ids} for text in SENTENCES if len(ids := tokenizer(text)["input_ids"]) > 1]


def look(
    network: Network,
    model: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    ends: float,
) -> dict[str, Any]:
    """Return losses, logits and answers of a model, with the adapter and, if asked, without.

    All models are asked about the same examples in the same order. One that runs out of time reads
    only the first of them, so the first ones are what all models have in common.
    """
    found: dict[str, Any] = {}
    found["losses"], logits = losses(network, examples, model, ends)
    found["positions"] = [len(each) for each in logits]
    tensors = {"logits": torch.cat(logits)}
    if model["before"]:
        with network.disable_adapter():
            found["losses_before"], before = losses(network, examples, model, ends)
        tensors["before"] = torch.cat(before)
    save_file(tensors, model["logits"])
    # Answers before and after share the time; those that need less leave more to the others.
    for place, kind in enumerate(model["answers"]):
        until = time.monotonic() + (ends - time.monotonic()) / (len(model["answers"]) - place)
        if kind == "after":
            found["answers"] = answers(network, model, until)
        else:
            with network.disable_adapter():
                found["answers_before"] = answers(network, model, until)
    return found


def words(model: dict[str, Any]) -> dict[str, Any]:
    """What the tokenizer makes of some text, and of a question."""
    tokenizer = _tokenizer(model)
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES]
    roles = ("user", "assistant")
    asked = [{"role": roles[place % 2], "content": text} for place, text in enumerate(SENTENCES)]
    chat = ""
    if tokenizer.chat_template:
        chat = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    return {"ids": ids, "texts": texts, "chat": chat, "tokens": len(tokenizer)}


def _tokenizer(model: dict[str, Any]) -> Any:  # noqa: ANN401 - each family has a class of its own
    return _load_tokenizer(model["words"], model["template"], model["trust_remote_code"])


@cache
def _load_tokenizer(folder: str, template: str | None, trust_remote_code: bool) -> Any:  # noqa: ANN401, FBT001 - same
    found: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **_OFFLINE)
    if template:
        found.chat_template = template
    return found


def load(model: dict[str, Any]) -> Network:
    """The model, with the adapter if one is named, on the devices of its ``device_map``."""
    described = transformers.AutoConfig.from_pretrained(model["path"], **_how(model))
    kind: Any = transformers.AutoModelForCausalLM
    if getattr(described, "vision_config", None) is not None:
        kind = transformers.AutoModelForImageTextToText
    more: dict[str, Any] = {}
    if model["quantized"]:
        more["quantization_config"] = transformers.BitsAndBytesConfig(**model["quantized"])  # type: ignore[no-untyped-call]
    network, loading = kind.from_pretrained(
        model["path"], dtype=getattr(torch, model["dtype"]), output_loading_info=True, use_safetensors=True,
        device_map=model["device_map"], **more, **_how(model),
    )  # fmt: skip
    if loading["missing_keys"]:
        raise ValueError(
            f"it lacks {len(loading['missing_keys'])} weights, such as {min(loading['missing_keys'])}",
        )
    if model["adapter"]:
        from peft import PeftModel

        _resize(network, model["adapter"])
        # On the CPU first: PEFT would load all of it on the first GPU, which may be full.
        network = PeftModel.from_pretrained(
            network, model["adapter"], torch_device="cpu", **_offloading(model["device_map"])
        )
    return network.eval()


def _offloading(device_map: dict[str, int | str]) -> dict[str, Any]:
    """Return PEFT's arguments to leave a partly offloaded model where it is.

    PEFT 0.21 removes the hooks of such a model and distributes it anew, by a device map of its own
    that knows nothing of our limits (peft_model.py, `load_adapter`). It calls the base
    ``base_model.model``.
    """
    if "cpu" not in device_map.values() or len(set(device_map.values())) == 1:
        return {}
    prefix = "base_model.model"
    return {"device_map": {f"{prefix}.{name}": device for name, device in device_map.items()}}


@torch.no_grad()
def losses(
    network: Network,
    examples: Sequence[dict[str, Any]],
    model: dict[str, Any],
    ends: float,
) -> tuple[list[tuple[float, int]], list[torch.Tensor]]:
    """Return of each example sum and count of the trained tokens' losses, and logits at some.

    The logits are [positions, vocabulary], of about as many positions of each example. No further
    example is begun when half of the time to `ends` is over.
    """
    deadline = time.monotonic() + (ends - time.monotonic()) * READING
    found: list[tuple[float, int]] = []
    kept: list[torch.Tensor] = []
    each = -(-model["positions"] // len(examples))
    for number, example in enumerate(examples):
        if number and time.monotonic() >= deadline:
            break
        total, count, logits = _measure_example(network, example, model["chunk"], each)
        found.append((total, count))
        kept.append(torch.cat(logits) if logits else torch.empty(0))
    return found, kept


def _measure_example(
    network: Network, example: dict[str, Any], chunk: int, wanted: int
) -> tuple[float, int, list[torch.Tensor]]:
    """Return sum and count of the losses of one example, and the first `wanted` logits.

    Each `chunk` of positions takes a forward pass of its own: the logits of a long example, all at
    once, would need more memory than the model.
    """
    ids = torch.tensor([example["ids"]], device=network.device)
    images = seen(network, example)
    # The logits at a token tell of the next one, whose label counts.
    labels = example["labels"]
    trained = [place - 1 for place in range(1, len(labels)) if labels[place] != IGNORED]
    total, kept = 0.0, []
    for start in range(0, len(trained), chunk):
        places = trained[start : start + chunk]
        logits = logits_at(network, ids, places, images)
        targets = torch.tensor([labels[place + 1] for place in places], device=logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        if start < wanted:
            kept.append(logits[: wanted - start].cpu())
    return total, len(trained), kept


def logits_at(
    network: Network,
    ids: torch.Tensor,
    places: Sequence[int],
    extra: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return the logits at `places` of `ids`, [places, vocabulary], in float32; few others are computed."""
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        some: torch.Tensor = network(input_ids=ids, **extra).logits[0, list(places)]
        return some.float()
    # A list: accelerate would move a tensor to the first GPU, and the last layer may be elsewhere.
    logits: torch.Tensor = network(input_ids=ids, logits_to_keep=list(places), **extra).logits[0]
    if len(logits) != len(places):  # a family that takes the argument and computes all of them
        logits = logits[list(places)]
    return logits.float()


def answers(network: Network, model: dict[str, Any], ends: float) -> list[dict[str, Any]]:
    """Return the most likely answer to each prompt, as long as asked for, or until it `ends`."""
    text = network.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or sys.maxsize
    empty = {"text": "", "tokens": 0, "cut": False}
    found: list[dict[str, Any]] = [dict(empty) for _ in model["prompts"]]
    rooms = [min(model["tokens"], longest - len(prompt["ids"])) for prompt in model["prompts"]]
    # Together are prompts without images that all have room for an answer; others are alone.
    open_ends = [place for place, room in enumerate(rooms) if room > 0]
    roomy = [place for place in open_ends if rooms[place] == model["tokens"]]
    usual = [place for place in roomy if not model["prompts"][place]["seen"]]
    starts = range(0, len(usual), model["batch"])
    batches = [usual[start : start + model["batch"]] for start in starts]
    batches += [[place] for place in open_ends if place not in usual]
    for number, batch in enumerate(batches):
        until = time.monotonic() + (ends - time.monotonic()) / (len(batches) - number)
        prompts = [model["prompts"][place] for place in batch]
        written = _answer(network, model, prompts, rooms[batch[0]], until)
        for place, answer in zip(batch, written, strict=True):
            found[place] = answer
    return found


@torch.no_grad()
def _answer(
    network: Network,
    model: dict[str, Any],
    prompts: Sequence[dict[str, Any]],
    room: int,
    ends: float,
) -> list[dict[str, Any]]:
    """The answers to `prompts`, which are filled up on the left to the longest of them."""
    tokenizer = _tokenizer(model)
    stops, padding = _ends(network, tokenizer), tokenizer.eos_token_id or 0
    width = max(len(prompt["ids"]) for prompt in prompts)
    ids = torch.tensor(
        [[padding] * (width - len(prompt["ids"])) + prompt["ids"] for prompt in prompts],
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt["ids"])) + [1] * len(prompt["ids"]) for prompt in prompts],
    )
    given: Any = network.generate(
        input_ids=ids.to(network.device), attention_mask=mask.to(network.device), do_sample=False, max_new_tokens=room,
        temperature=None, top_p=None, top_k=None, pad_token_id=padding,
        stopping_criteria=StoppingCriteriaList([Deadline(ends)]), **seen(network, prompts[0]),
    )  # fmt: skip
    given = getattr(given, "sequences", given)  # some bases ask for more than that
    made = []
    for row in given[:, width:].tolist():
        said = next((place for place, token in enumerate(row) if token in stops), None)
        text = str(tokenizer.decode(row[:said], skip_special_tokens=True))
        count = len(row) if said is None else said
        made.append({"text": text, "tokens": count, "cut": said is None and count < room})
    return made


def _ends(network: Network, tokenizer: Any) -> set[int]:  # noqa: ANN401 - same
    """The tokens at which an answer ends."""
    named = network.generation_config.eos_token_id
    told = named if isinstance(named, list) else [named]
    return {int(token) for token in (*told, tokenizer.eos_token_id) if token is not None}


def seen(network: Network, example: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the model gets of the images in an example, if there are any: of each of its tokens, and of the images."""
    made = {}
    for key, value in load_file(example["seen"]).items() if example.get("seen") else ():
        kind, _, name = key.partition(".")
        cut = value[:, : len(example["ids"])] if kind == "token" else value
        made[name] = cut.to(network.device, network.dtype if cut.is_floating_point() else None)
    return made


def _resize(network: Network, adapter: str) -> None:
    """Give the vocabulary as many rows as the adapter's has, if it holds one: PEFT wants that done before."""
    held = network.get_input_embeddings(), network.get_output_embeddings()
    called = "|".join(re.escape(name.rpartition(".")[2]) for name, module in network.named_modules() if module in held)
    ours = re.compile(
        rf"(.*\.)?({called})(\.base_layer|\.token_adapter|\.modules_to_save)*\.weight",
    )
    with safe_open(str(Path(adapter, "adapter_model.safetensors")), "pt") as file:
        rows = {file.get_slice(key).get_shape()[0] for key in file.keys() if ours.fullmatch(key)}  # noqa: SIM118 - no dict
    if rows and rows != {_rows(network)}:
        network.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _rows(network: Network) -> int:
    return int(network.get_input_embeddings().weight.shape[0])


def _kind(error: Exception) -> str | None:
    """Return ``memory`` or ``gpu`` for faults that say nothing about the model; else None."""
    if _of_memory(error):
        return "memory"
    if not torch.cuda.is_available() or not isinstance(error, RuntimeError):
        return None
    return "gpu" if _OF_GPU.search(f"{type(error).__name__}: {error}") else None


def _of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch has no kind of its own for the CPU, and none for some libraries of CUDA.
    told = str(error).lower()
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")
    return any(each in told for each in words)


def _how(model: dict[str, Any]) -> dict[str, Any]:
    return {"trust_remote_code": model["trust_remote_code"], **_OFFLINE}


if __name__ == "__main__":
    main()
