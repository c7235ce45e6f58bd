"""Which models are looked at, and with which examples, by a program that has nothing but transformers and PEFT."""

import base64
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from job import config, log, paths
from job.card import CALLED
from job.examine import judge, means
from job.examine.means import Means
from job.model import tokenizer, vision, weights

_PROGRAM = Path(__file__).with_name("plain.py")
_POSITIONS = 64  # at which logits are compared


@dataclass(frozen=True)
class Models:
    """What is to be looked at, as folders."""

    base: Path
    adapter: Path
    merged: Path | None
    other: Callable[[], Path | None]
    """Makes what the merge into the other base would have given (see ``merge.base``), if there is one."""


def results(
    models: Models, settings: config.Config | config.Merging, figures: Path | None, scratch: Path, gpus: tuple[str, ...]
) -> dict[str, Any]:
    """Look at the `models` with the examples that lie in the folder `figures`, on the `gpus` if there are any.

    What is to be told of them is returned, and put there too. Raises `errors.ModelError` if the merged model cannot be
    opened, or is not what the base with the adapter is.
    """
    wanted, adapted = settings.examine, _with_adapter(models.base, settings.model)
    weighed = models.merged or models.base  # which may be packed, and the merged model is not
    had = means.of(weighed, wanted, gpus, 2 + len(adapted)) if wanted.minutes else None
    told: dict[str, Any] = {"left": {}}
    if models.merged and not had:
        told["left"]["merged"] = "there was not enough memory" if wanted.minutes else "examine.minutes is 0"
    if had and (models.merged or adapted):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        told = _looked(models, settings, _held(figures), adapted, had, scratch)
        shutil.rmtree(scratch)
    if figures:
        (figures / paths.SEEN).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    return told


def _looked(
    models: Models, settings: config.Config | config.Merging, held: Mapping[str, Any] | None, adapted: Sequence[str],
    had: Means, scratch: Path,
) -> dict[str, Any]:  # fmt: skip
    folders = {"merged": models.merged, "other": models.other() if models.merged and held else None}
    like = "trained" if settings.merge.base == "dequantized" else "adapted"  # what the merged model should be like
    first = [name for name in ("merged", like) if name in adapted or folders.get(name)]
    names = [*first, *(name for name in ("other", *adapted) if name not in first and folders.get(name, models.base))]
    examples = list(_read(held, had.read))
    if any("images" in each for each in examples):
        _show(examples, models, settings, scratch)
    prompts = [each for each in examples if each["asked"]][: settings.examine.prompts]
    asked = [
        {
            **_how(name, models.base, settings.model, had),
            "path": str(folders.get(name) or models.base),
            "adapter": None if name in folders else str(models.adapter),
            **_words(models, folders.get(name)),
            "prompts": [{"ids": each["ids"][: each["asked"]], "seen": each.get("seen")} for each in prompts],
            "logits": str(scratch / f"{name}.safetensors"),
        }
        for name in names
    ]
    plain = [{key: each.get(key) for key in ("ids", "labels", "seen")} for each in examples]
    asking = {"examples": plain, "models": asked}
    found, left = _answers(asking, scratch, settings.examine.minutes)
    told = judge.judged(found, had.dtype, held, prompts, scratch, _standard(like, had.dtype, models, settings.model))
    told["left"] |= left
    if models.merged and "adapted" not in adapted:
        told["left"]["adapted"] = "the base comes quantized, and transformers alone cannot load it with an adapter"
        log.warn("examine.left", f"{CALLED['adapted']}: not looked at: {told['left']['adapted']}")
    if models.merged and held and "trained" in adapted and not folders["other"]:
        told["left"]["other"] = "there is no room for it on the disk"
        log.warn("examine.left", f"{CALLED['other']}: not looked at: {told['left']['other']}")
    if folders["other"]:
        other = "original" if settings.merge.base == "dequantized" else "dequantized"
        told["bases"] = {"merged": settings.merge.base, "other": other}
    return told


def _words(models: Models, folder: Path | None) -> dict[str, str | None]:
    """Where the tokenizer of a whole model or of the adapter on the base is, and its template if that lies apart."""
    home = folder or tokenizer.home(models.adapter, models.base)
    return {"words": str(home), "template": tokenizer.template(models.adapter) if home == models.base else None}


def _standard(like: str, dtype: str, models: Models, settings: config.Model) -> judge.Standard:
    """What the merged model should be like: the base with the adapter, by its tokenizer."""
    described, _ = weights.describe(models.base, settings)
    tokens = tokenizer.count(tokenizer.home(models.adapter, models.base), trust_remote_code=settings.trust_remote_code)
    rows = getattr(described.get_text_config(), "vocab_size", None)
    numbers = "int8" if like == "trained" and settings.quantization == "int8" else dtype
    return judge.Standard(like, numbers, short=rows is not None and tokens > rows)


def _show(
    examples: Sequence[dict[str, Any]], models: Models, settings: config.Config | config.Merging, scratch: Path
) -> None:
    """Put what the model gets of the images of each example into a file, whose path is added to it."""
    trusted = settings.model.trust_remote_code
    words = tokenizer.trained_with(models.adapter, models.base, trust_remote_code=trusted)
    tokenizer.pad(words, tokenizer.rows(models.base, trust_remote_code=trusted))
    seeing = vision.Vision(
        models.base, words, settings.data.max_pixels if isinstance(settings, config.Config) else None
    )
    for number, each in enumerate(examples):
        if "images" in each:
            made = seeing.batch([each["text"]], [[base64.b64decode(image) for image in each["images"]]])
            ids, count = made.pop("input_ids"), len(each["ids"])
            made.pop("attention_mask")
            held = {
                f"{'token' if value.shape == ids.shape else 'image'}.{name}": (
                    value[:, :count] if value.shape == ids.shape else value
                ).contiguous()
                for name, value in made.items()
            }
            each["seen"] = str(scratch / f"seen-{number}.safetensors")
            save_file(held, each["seen"])


def _held(figures: Path | None) -> dict[str, Any] | None:
    """The examples that were kept; None of a run that an older version trained, or if there are none."""
    path = figures / paths.HELD_OUT if figures else None
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return told if told.get("examples") else None


def _with_adapter(base: Path, model: config.Model) -> list[str]:
    """How the adapter can be looked at on the base: one that comes quantized, transformers cannot load alone."""
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if told.get("quantization_config"):
        return []
    return ["adapted"] if model.quantization == "none" else ["adapted", "trained"]


def _read(held: Mapping[str, Any] | None, tokens: int) -> Iterator[dict[str, Any]]:
    """As many examples as there is time for, and one at least."""
    count = 0
    for each in held["examples"] if held else ():
        if count and count + len(each["ids"]) > tokens:
            return
        count += len(each["ids"])
        yield each


def _how(name: str, base: Path, model: config.Model, had: Means) -> dict[str, Any]:
    """How the model called `name` is loaded, and how much of it is wanted."""
    quantized: dict[str, Any] | None = None
    if name == "trained" and model.quantization == "int8":
        quantized = {"load_in_8bit": True}
    elif name == "trained":
        quantized = {
            "load_in_4bit": True, "bnb_4bit_quant_type": model.quantization, "bnb_4bit_compute_dtype": had.dtype,
            "bnb_4bit_use_double_quant": model.double_quant,
        }  # fmt: skip
    if quantized and (kept := weights.kept_whole(weights.describe(base, model)[0], getattr(torch, had.dtype))):
        quantized["llm_int8_skip_modules"] = kept
    return {
        "name": name, "quantized": quantized, "device": had.device, "dtype": had.dtype, "positions": _POSITIONS,
        "tokens": had.answered, "trust_remote_code": model.trust_remote_code,
    }  # fmt: skip


def _answers(
    asked: Mapping[str, Any], scratch: Path, minutes: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What the program tells of each model, as far as it came, and why it did not come to the others."""
    question, answer, said = (scratch / name for name in ("asked.json", "told.jsonl", "said.txt"))
    question.write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, "-P", str(_PROGRAM), str(question), str(answer)]
    with (
        said.open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors) as program,  # noqa: S603 - ours
    ):
        try:
            ended = program.wait(minutes * 60)
            why = said.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            why = f"the program that looks at it ended with {ended}: {why}"
        except subprocess.TimeoutExpired:
            why = f"examine.minutes ({minutes:g}) were over"
        finally:
            program.kill()
    there = answer.read_text(encoding="utf-8").splitlines() if answer.exists() else []
    found = {}
    for line in there:
        with contextlib.suppress(ValueError):  # the last one may be torn
            told = json.loads(line)
            found[told["name"]] = told
    left = [model["name"] for model in asked["models"] if model["name"] not in found]
    if left:
        log.warn("examine.left", f"{', '.join(CALLED[name] for name in left)}: not looked at, because {why}")
    return found, dict.fromkeys(left, why)
