"""What verifying a merged model costs, beside an older version of this job: seconds, processor time, memory.

    git worktree add /tmp/before 9e0b97c
    python benchmarks/verification.py --before /tmp/before [--rounds 3] [--keep benchmarks/results/verification.md]

The model is that of `make smoke` (fetched into .smoke), with a random LoRA adapter on all linear layers over an NF4
base. Each side merges it and verifies it as a run does, with held-out dialogues and answers; then the command `merge`
does it alone. Both sides take turns, each in a process of its own, with one thread. Processor time counts where others
use the machine too: the seconds are theirs as well. Memory is the largest sum over all processes of a command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lab
import psutil

ROOT = Path(__file__).parent.parent
MODEL, DATA = ROOT / ".smoke" / "SmolLM2-135M-Instruct", ROOT / ".smoke" / "data" / "eval.jsonl"
MINUTES, PROMPTS, TOKENS = 10, 4, 128
STEP = """
import json, os, shutil, sys, time
from pathlib import Path
from job import config, examine, inputs, merge, paths
base, adapter, figures, out = map(Path, sys.argv[1:5])
minutes, prompts, tokens = map(int, sys.argv[5:8])
model = {"base": base.as_uri(), "quantization": "nf4"}
order = config.check({
    "run": {"name": "b", "url": out.as_uri(), "cache": str(out / "cache")}, "model": model,
    "data": {"train": ["file:///x.jsonl"]}, "examine": {"minutes": minutes, "prompts": prompts, "tokens": tokens},
}, config.Places("b", {}))
cache = paths.Cache(out / "cache", "b")
given = inputs.Base(base.as_uri(), base, "digest")
def models(merged):
    return examine.Models(base, adapter, merged, lambda: merge.other(order, given, adapter, cache))
def merged():
    return merge.folder(given, adapter, order.model, order.merge, cache.work("merged"))
started = time.monotonic()
if hasattr(examine, "started"):
    with examine.started(os.environ, (), wanted=True) as program:
        made = merged()
        middle = time.monotonic()
        seen = examine.results(models(made), order, figures, cache.work("seen"), (), program)
else:
    made = merged()
    middle = time.monotonic()
    seen = examine.results(models(made), order, figures, cache.work("seen"), ())
seen["seconds"] = {"merge": middle - started, "verify": time.monotonic() - middle}
(out / "seen.json").write_text(json.dumps(seen))
"""
ADAPTER = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
made = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in made.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(0, 0.003)
made.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    """Of one command and all of its processes."""

    seconds: float
    processor: float
    resident: int
    """Bytes, pages of files that are mapped included; those that two processes share count twice."""
    own: int
    """Bytes that no file backs."""


def main() -> None:
    """Measure both sides in turns, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": ROOT}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        costs: dict[str, list[Cost]] = {}
        facts: dict[str, list[dict[str, object]]] = {side: [] for side in sides}
        for number in range(options.rounds):
            for side, root in sides.items():
                out = folder / f"{side}-{number}"
                out.mkdir()
                costs.setdefault(f"run, {side}", []).append(run_step(root, folder, out))
                facts[side].append(json.loads((out / "seen.json").read_text()))
            commands = [
                ("merge", sides["before"], ()),
                ("merge", ROOT, ()),
                ("merge --verify sums", ROOT, ("--verify", "sums")),
            ]
            for name, root, more in commands:
                label = f"{name}, {'after' if root == ROOT else 'before'}"
                out = folder / f"alone-{label.replace(' ', '-')}-{number}"
                costs.setdefault(label, []).append(run_merge(root, folder, out, more))
    lab.tell(report(options, costs, facts), options.keep)


def make(folder: Path) -> None:
    """Put an adapter and held-out examples into the `folder`."""
    run([sys.executable, "-c", ADAPTER, str(MODEL), str(folder / "adapter")], ROOT, {})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    examples = []
    for line in DATA.read_text(encoding="utf-8").splitlines()[:12]:
        record = json.loads(line)
        turns = [{"role": "user", "content": record["instruction"]}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(asked)["input_ids"]
        answer = tokenizer(record["output"] + tokenizer.eos_token)["input_ids"]
        labels = [-100] * len(prompt) + answer
        texts = {"prompt": record["instruction"], "answer": record["output"]}
        examples.append({"ids": prompt + answer, "labels": labels, "asked": len(prompt), **texts})
    (folder / "figures").mkdir()
    held_out = json.dumps({"split": "eval", "examples": examples})
    (folder / "figures" / "held-out.json").write_text(held_out, encoding="utf-8")


def run_step(root: Path, folder: Path, out: Path) -> Cost:
    """Merge and verify as a run does."""
    paths = [MODEL, folder / "adapter", folder / "figures", out]
    numbers = [MINUTES, PROMPTS, TOKENS]
    return run([sys.executable, "-c", STEP, *map(str, (*paths, *numbers))], root, {})


def run_merge(root: Path, folder: Path, out: Path, more: Sequence[str]) -> Cost:
    """Merge by the command, into a folder."""
    command = [sys.executable, str(root / "entrypoint.py"), "merge", "--base", str(MODEL)]
    command += ["--adapter", str(folder / "adapter"), "--out", str(out), *more]
    return run([*command, "--set", f"run.cache={out}-cache"], root, {})


def run(command: Sequence[str], root: Path, environ: Mapping[str, str]) -> Cost:
    """Run it in the checkout `root` with one thread, and watch the memory of all of its processes."""
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TRANSFORMERS_VERBOSITY": "error"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=root, env={**usual, **environ}, stdout=output, stderr=output)
        most = [0, 0]
        over = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, most, over))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        over.set()
        watcher.join()
        if process.returncode:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace"))
    return Cost(seconds, usage.ru_utime + usage.ru_stime, most[0], most[1])


def watch(pid: int, most: list[int], over: threading.Event) -> None:
    """Keep in `most` the largest sums over the processes of the command, until it is `over`."""
    while not over.wait(0.05):
        try:
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.Error:  # it has just ended
            return
        sums = [0, 0]
        for each in tree:
            for place, count in enumerate(lab.read_memory(each.pid)):
                sums[place] += count
        most[:] = [max(pair) for pair in zip(most, sums, strict=True)]


def report(
    options: argparse.Namespace, costs: Mapping[str, Sequence[Cost]], facts: Mapping[str, Sequence[dict[str, object]]]
) -> list[str]:
    """Return the result in Markdown."""
    processor = {name: lab.take_median(costs[name], "processor") for name in costs}
    rows = [
        f"| {name} | {lab.take_median(costs[name], 'seconds'):.1f} s | {processor[name]:.1f} s | "
        f"{lab.format_memory(costs[name])} |"
        for name in costs
    ]
    ratios = []
    for name in ("run", "merge"):
        ratio = processor[f"{name}, before"] / processor[f"{name}, after"]
        ratios.append(f"{name}: {ratio:.2f}")
    return [
        "# What verifying a merged model costs",
        "",
        (
            "SmolLM2-135M-Instruct (270 MB), NF4, a random LoRA of rank 16, one thread; "
            f"{options.rounds} round(s) in turns, medians."
        ),
        (
            "`run` merges and verifies with 12 held-out dialogues and answers to "
            f"{PROMPTS} of them of up to {TOKENS} tokens; "
            "`merge` is the command alone, without examples."
        ),
        "",
        "| | seconds | processor time | memory | without mapped files |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Processor time before / after: {', '.join(ratios)}.",
        "",
        *(f"- {side}: {describe(seen[-1])}" for side, seen in facts.items()),
        "",
        f"{lab.format_rounds(costs, digits=0)} Other programs used the machine at the same time.",
        "",
        f"`python benchmarks/verification.py --before CHECKOUT --rounds {options.rounds}` on "
        + lab.machine("torch", "transformers", "peft", "bitsandbytes"),
    ]


def describe(seen: Mapping[str, object]) -> str:
    """What one side found, and how long its answers were."""
    losses = seen["loss"]
    assert isinstance(losses, dict)
    answers = seen.get("answers") or []
    assert isinstance(answers, list)
    words = [len(str(each[key]).split()) for each in answers for key in ("base", "tuned")]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(losses.items()))
    return (
        f"logits off by {float(str(seen['off'])):.3%} of an effect of "
        f"{float(str(seen['effect'])):.2%}; losses {shown}; "
        f"{len(words)} answers with {sum(words)} words"
    )


if __name__ == "__main__":
    main()
