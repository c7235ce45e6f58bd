"""Opens models with nothing but transformers and PEFT, as their users do, and tells what they compute.

A program of its own that imports nothing of the job. What it is asked is a JSON file, and what it tells is one: a line
for each model, as soon as it is known. It ends when the process that started it does.
"""

import errno
import gc
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

IGNORED = -100  # the label of a token without loss
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # 12345678",
    "你好，世界。 Grüße aus München! Привет, мир 🙂",
)
_OFFLINE = {"local_files_only": True}
Network: TypeAlias = Any  # each family has a class of its own


def main() -> None:
    """Answer what the file named first asks, in the file named second."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(sys.argv[2]).open("w", encoding="utf-8") as told:
        for model in asked["models"]:
            found: dict[str, Any] = {}
            kind = "error"  # it cannot be opened
            try:
                found["tokenizer"] = words(model)
                network = load(model)
                found["class"], found["rows"] = type(network).__name__, _rows(network)
                kind = "failed"  # it can, and what is asked of it is too much here
                found |= look(network, model, asked["examples"] or by_itself(model))
            except Exception as e:  # noqa: BLE001 - whatever a library raises is the answer
                found["memory" if _of_memory(e) else kind] = f"{type(e).__name__}: {e}"
            network = None
            told.write(json.dumps({"name": model["name"], **found}) + "\n")
            told.flush()
            gc.collect()
            torch.cuda.empty_cache()


def by_itself(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Examples for a model of which none are known: some text, all of it with loss."""
    tokenizer = _tokenizer(model)
    return [{"ids": ids, "labels": ids} for text in SENTENCES if len(ids := tokenizer(text)["input_ids"]) > 1]


def look(network: Network, model: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What there is to be known of one model."""
    found: dict[str, Any] = {}
    found["loss"], logits = losses(network, examples, model["positions"])
    found["answers"] = answers(network, model)
    if model["adapter"]:
        with network.disable_adapter():
            found["loss_before"], before = losses(network, examples, model["positions"])
            found["answers_before"] = answers(network, model)
        save_file({"logits": logits, "before": before}, model["logits"])
    else:
        save_file({"logits": logits}, model["logits"])
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
    found: Any = transformers.AutoTokenizer.from_pretrained(model["words"], **_how(model))
    if model["template"]:
        found.chat_template = model["template"]
    return found


def load(model: dict[str, Any]) -> Network:
    """The model, with the adapter if one is named, on the GPUs that there are or on the CPU."""
    described = transformers.AutoConfig.from_pretrained(model["path"], **_how(model))
    kind: Any = transformers.AutoModelForCausalLM
    if getattr(described, "vision_config", None) is not None:
        kind = transformers.AutoModelForImageTextToText
    more: dict[str, Any] = {}
    if model["quantized"]:
        more["quantization_config"] = transformers.BitsAndBytesConfig(**model["quantized"])  # type: ignore[no-untyped-call]
    network, loading = kind.from_pretrained(
        model["path"], dtype=getattr(torch, model["dtype"]), output_loading_info=True, use_safetensors=True,
        device_map="auto" if model["device"] == "cuda" else "cpu", **more, **_how(model),
    )  # fmt: skip
    if loading["missing_keys"]:
        raise ValueError(f"it lacks {len(loading['missing_keys'])} weights, such as {min(loading['missing_keys'])}")
    if model["adapter"]:
        from peft import PeftModel

        _resize(network, model["adapter"])
        network = PeftModel.from_pretrained(network, model["adapter"])
    return network.eval()


@torch.no_grad()
def losses(network: Network, examples: Sequence[dict[str, Any]], positions: int) -> tuple[float, torch.Tensor]:
    """The mean loss of a trained token, and the logits at up to `positions` of them, [positions, vocabulary]."""
    total, count, kept = 0.0, 0, []
    each = -(-positions // len(examples))
    for example in examples:
        ids = torch.tensor([example["ids"]], device=network.device)
        labels = torch.tensor(example["labels"][1:], device=network.device)
        logits = (
            network(input_ids=ids, **seen(network, example)).logits[0, :-1].to(labels.device)[labels != IGNORED].float()
        )
        total += float(torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED], reduction="sum"))
        count += len(logits)
        kept.append(logits[:each].cpu())
    return total / count, torch.cat(kept)


@torch.no_grad()
def answers(network: Network, model: dict[str, Any]) -> list[str]:
    """The most likely answer to each prompt."""
    tokenizer = _tokenizer(model)
    made = []
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for prompt in model["prompts"]:
        if not (room := min(model["tokens"], longest - len(prompt["ids"]))) > 0:
            made.append("")
            continue
        ids = torch.tensor([prompt["ids"]], device=network.device)
        given: Any = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=room,
            temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.eos_token_id,
            **seen(network, prompt),
        )  # fmt: skip
        given = getattr(given, "sequences", given)  # some bases ask for more than that
        made.append(str(tokenizer.decode(given[0, len(prompt["ids"]) :], skip_special_tokens=True)))
    return made


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
    ours = re.compile(rf"(.*\.)?({called})(\.base_layer|\.token_adapter|\.modules_to_save)*\.weight")
    with safe_open(str(Path(adapter, "adapter_model.safetensors")), "pt") as file:
        rows = {file.get_slice(key).get_shape()[0] for key in file.keys() if ours.fullmatch(key)}  # noqa: SIM118 - no dict
    if rows and rows != {_rows(network)}:
        network.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _rows(network: Network) -> int:
    return int(network.get_input_embeddings().weight.shape[0])


def _of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    told = str(error).lower()  # torch has no kind of its own for the CPU, and none for some libraries of CUDA
    return any(each in told for each in ("can't allocate memory", "cannot allocate memory", "out of memory"))


def _how(model: dict[str, Any]) -> dict[str, Any]:
    return {"trust_remote_code": model["trust_remote_code"], **_OFFLINE}


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
