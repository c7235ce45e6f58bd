"""What the smoke run made, where it is, and what it changed: the base and the merged model answer one question."""

import json
import sys
from pathlib import Path
from typing import Any

BASE = "SmolLM2-135M-Instruct"
QUESTION = "Are you sentient?"
NEW_TOKENS = 40


def main(folder: Path) -> None:
    """Show the results of the finished run in ``folder/run``."""
    run = folder / "run"
    done = json.loads((run / "done.json").read_text(encoding="utf-8"))
    training = done["training"]
    before, after = training["loss_before"], training["loss_after"]
    lines = [
        "",
        f"Made in {run}/:",
        "  adapter/  the LoRA adapter         merged/  the whole model, in bfloat16",
        "  report/   report.md, metrics.jsonl, tensorboard/    done.json  what went in and came out",
        f"Loss on held-out dialogues: {before:.3f} before, {after:.3f} after {training['steps']} steps",
        f"Asked: {QUESTION}",
        f"  base:   {_answer(folder / BASE)}",
        f"  merged: {_answer(run / 'merged')}",
        "Next: copy a preset from configs/, put your bucket, model and data into it, and check it:",
        "  .venv/bin/python entrypoint.py validate my-run.yaml",
    ]
    print("\n".join(lines))  # noqa: T201 - a script for people


def _answer(model: Path) -> str:
    """The model's greedy answer, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    turns = [{"role": "user", "content": QUESTION}]
    asked = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = network.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return " ".join(words.decode(written, skip_special_tokens=True).split())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
