"""The program that verifies: what it measures, and what is done where a device was not up to it or the time is over."""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapters
import psutil
import pytest
import torch
from test_families import COMMON, OTHERS
from transformers import AutoConfig, AutoModelForCausalLM

from job import examine
from job.examine import plain
from job.examine.devices import Placement
from job.examine.inquiry import Inquiry
from job.examine.runner import Outcome, Program

GPU, CPU = Placement({"": 0}, "bfloat16", 64, 1), Placement({"": "cpu"}, "float32", 64, 1)
GOOD = {"loss": 1.0}
NAMES = ("merged", "adapted", "trained")


class Scripted(Program):
    """A program that answers as a script says: for each time it is asked, what it says of each model until it ends."""

    def __init__(
        self,
        *rounds: Mapping[str, object],
        why: str = "",
        timed_out: bool = False,
    ) -> None:
        super().__init__({})
        self.rounds, self.why, self.timed_out = list(rounds), why, timed_out
        self.asked: list[dict[str, Placement]] = []
        self.stops = 0

    def ask(
        self,
        models: Sequence[Any],
        examples: Sequence[Any],
        scratch: Path,
        ends: float,
    ) -> Outcome:
        del examples, scratch, ends  # the signature is that of what this stands for
        self.asked.append({each["name"]: each["placement"] for each in models})
        answers: Any = {name: {"name": name, **told} for name, told in self.rounds.pop(0).items()}  # type: ignore[dict-item]
        last = not self.rounds
        whole = len(answers) == len(models) or any("gpu" in each for each in answers.values())
        return Outcome(answers, "" if whole else self.why, timed_out=self.timed_out and last)

    def stop(self) -> None:
        self.stops += 1


def asked(program: Scripted, tmp_path: Path, *, seconds: float = 60) -> Inquiry:
    """An inquiry about three models that may be on a GPU and then on the CPU, after it was made."""
    choices = {name: [GPU, CPU] for name in NAMES}
    pair = frozenset({"merged", "adapted"})
    made = Inquiry(program, tmp_path, 10, time.monotonic() + seconds, choices, pair)
    made.ask(NAMES, lambda name, where: {"name": name, "placement": where}, [])
    return made


def test_a_lack_of_memory_sends_both_models_that_are_compared_to_the_next_device(
    tmp_path: Path,
    said: Callable[[], str],
) -> None:
    """Like with like: the one that did fit is computed again beside the other; it is said, and no error."""
    program = Scripted(
        {"merged": GOOD, "adapted": {"memory": "OutOfMemoryError"}, "trained": GOOD},
        {"merged": {"loss": 2.0}, "adapted": {"loss": 3.0}},
    )

    made = asked(program, tmp_path)

    assert program.asked[1] == {"merged": CPU, "adapted": CPU}
    assert {name: each["loss"] for name, each in made.found.items()} == {
        "trained": 1.0,
        "merged": 2.0,
        "adapted": 3.0,
    }
    assert (made.placement("merged"), made.placement("trained")) == (CPU, GPU)
    (told,) = made.fallbacks
    assert "the original base with the adapter could not be verified on the GPU in bfloat16 (OutOfM" in told
    assert "): trying the CPU in float32" in told
    assert told in said()
    assert not made.left


def test_both_failing_together_skip_no_device(tmp_path: Path) -> None:
    """Two lacks of memory in one round are one step."""
    none = {"memory": "OutOfMemoryError"}
    program = Scripted(
        {"merged": none, "adapted": none, "trained": GOOD},
        {"merged": GOOD, "adapted": GOOD},
    )

    made = asked(program, tmp_path)

    assert program.asked[1] == {"merged": CPU, "adapted": CPU}
    assert made.found.keys() == {*NAMES}


def test_a_fault_of_the_gpu_takes_a_new_process(tmp_path: Path) -> None:
    """CUDA may fail in the old one for ever, so the models behind are asked about again, where they were."""
    program = Scripted(
        {"merged": {"gpu": "CUDA error: an illegal memory access"}},
        dict.fromkeys(NAMES, GOOD),
    )

    made = asked(program, tmp_path)

    assert program.stops == 1
    assert program.asked[1] == {"merged": CPU, "adapted": CPU, "trained": GPU}
    assert made.found.keys() == {*NAMES}


def test_a_process_that_dies_at_a_model_tries_that_one_elsewhere(tmp_path: Path) -> None:
    """Bitsandbytes ends it by exit(1), the kernel by SIGKILL; what came before it stays, what comes behind too."""
    program = Scripted({"merged": GOOD, "adapted": GOOD}, {"trained": GOOD}, why="it ended with -9")

    made = asked(program, tmp_path)

    assert program.asked[1] == {"trained": CPU}
    assert [made.placement(name) for name in NAMES] == [GPU, GPU, CPU]
    assert made.fallbacks[0].count("it ended with -9") == 1


def test_where_no_device_is_left_the_model_is_left_out(
    tmp_path: Path,
    said: Callable[[], str],
) -> None:
    """A good merge does not fail by it."""
    none = {"memory": "MemoryError"}
    program = Scripted(
        {"merged": none, "adapted": GOOD, "trained": GOOD},
        {"merged": none, "adapted": GOOD},
    )

    made = asked(program, tmp_path)

    assert made.found["merged"]["memory"] == "MemoryError"
    assert made.found["adapted"] == {"name": "adapted", **GOOD}
    assert said().count("could not be verified") == 1


def test_a_model_of_which_there_is_no_answer_in_time_is_left_out(
    tmp_path: Path,
    said: Callable[[], str],
) -> None:
    """With the reason, and nobody asks again."""
    program = Scripted({"merged": GOOD}, timed_out=True, why="the time was over")

    made = asked(program, tmp_path)

    assert len(program.asked) == 1
    assert made.left == dict.fromkeys(("adapted", "trained"), "its share of examine.minutes (10) ran out")
    assert "not verified, because its share of examine.minutes (10) ran out" in said()


def question(folder: Path, **more: object) -> dict[str, Any]:
    """What is asked about the model in the folder, on the CPU."""
    return {
        "name": "merged", "path": str(folder), "adapter": None, "words": str(folder), "template": None,
        "quantized": None, "device_map": {"": "cpu"}, "dtype": "float32", "positions": 6, "chunk": 64, "batch": 4,
        "tokens": 12, "before": False, "answers": ["after"], "check_words": False, "trust_remote_code": False,
        "prompts": [{"ids": [3, 4, 5][:length] * 4, "seen": None} for length in (1, 2, 3)],
        "logits": str(folder.parent / "logits"), **more,
    }  # fmt: skip


def examples() -> list[dict[str, Any]]:
    """One with a trained answer at its end, and one with several turns."""
    ids = list(range(5, 45))
    several = [token if token % 3 else plain.IGNORED for token in ids]
    return [
        {"ids": ids, "labels": [plain.IGNORED] * 25 + ids[25:]},
        {"ids": ids[::-1], "labels": several[::-1]},
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_loss_is_that_of_transformers(chunk: int, tiny_model: Path, tmp_path: Path) -> None:
    """However many positions are computed at once, and whichever tokens are trained."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    expected, logits = [], []
    with torch.no_grad():
        for each in examples():
            ids, labels = torch.tensor([each["ids"]]), torch.tensor([each["labels"]])
            whole = network(input_ids=ids, labels=labels)
            count = int((labels[:, 1:] != plain.IGNORED).sum())
            expected.append((pytest.approx(float(whole.loss) * count, rel=1e-6), count))
            logits.append(whole.logits[0, :-1][labels[0, 1:] != plain.IGNORED][:3])
    asked = question(tiny_model, chunk=chunk, logits=str(tmp_path / "logits"))

    losses, kept = plain.losses(network, examples(), asked, math.inf)

    assert losses == expected
    torch.testing.assert_close(torch.cat(kept), torch.cat(logits), rtol=1e-5, atol=1e-5)


def test_a_model_that_runs_out_of_time_reads_the_first_example_at_least(tiny_model: Path) -> None:
    """And gives the logits that a model with more time gives of it, so that both can be compared."""
    network = plain.load(question(tiny_model))

    losses, kept = plain.losses(network, examples(), question(tiny_model), time.monotonic() - 1)

    everything, logits = plain.losses(network, examples(), question(tiny_model), math.inf)
    assert (len(losses), len(everything)) == (1, 2)
    assert losses == everything[:1]
    torch.testing.assert_close(kept, logits[:1])


def test_a_partly_offloaded_model_with_an_adapter_stays_where_it_was_placed(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT alone would place it anew; a device that is no string stands for a GPU here."""
    gpu = torch.device("cpu")  # accelerate takes "cpu" for offloaded, and this for where to compute
    modules = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(modules, gpu), "model.layers.1": "cpu"}
    adapters.adapter(adapters.plain(tiny_model), tmp_path, target_modules=["q_proj", "down_proj"])
    asked = question(tiny_model, adapter=str(tmp_path))

    offloaded = plain.load(asked | {"device_map": device_map})

    weights = {name: weight.device.type for name, weight in offloaded.named_parameters()}
    for layer, device in (("0", "cpu"), ("1", "meta")):
        devices = {each for name, each in weights.items() if f"layers.{layer}.self_attn" in name}
        assert devices == {device}
    whole = plain.load(asked)
    with_adapter, expected = (plain.losses(each, examples(), asked, math.inf)[0] for each in (offloaded, whole))
    assert with_adapter == expected
    with offloaded.disable_adapter(), whole.disable_adapter():
        without, expected = (plain.losses(each, examples(), asked, math.inf)[0] for each in (offloaded, whole))
    assert without == expected
    assert without != with_adapter


@pytest.mark.parametrize(
    "family",
    [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
@torch.no_grad()
def test_logits_at_some_positions_are_those_of_all(family: str) -> None:
    """In every family: most compute no others, by an argument of theirs; of the rest all are computed."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model(family, **{**COMMON, **OTHERS}[family])
    network = AutoModelForCausalLM.from_config(shape).float().eval()
    ids = torch.arange(40)[None]

    found = plain.logits_at(network, ids, [2, 3, 38], {})

    expected = network(input_ids=ids).logits[0, [2, 3, 38]].float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_that_are_answered_together_are_answered_as_alone(tiny_model: Path) -> None:
    """Of different lengths, and as long as asked for unless a model ends by itself."""
    network = plain.load(question(tiny_model))
    ends = time.monotonic() + 100

    together = plain.answers(network, question(tiny_model), ends)
    alone = plain.answers(network, question(tiny_model, batch=1), ends)

    assert together == alone
    assert all(each["tokens"] == 12 for each in together)
    assert not any(each["cut"] for each in together)


def test_answers_end_when_the_time_is_over_with_a_token_at_least(tiny_model: Path) -> None:
    """And each says that it was cut."""
    network = plain.load(question(tiny_model))

    found = plain.answers(network, question(tiny_model, tokens=200), time.monotonic() - 1)

    assert [(each["tokens"], each["cut"]) for each in found] == [(1, True)] * 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "memory",
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "gpu"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "gpu"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("it lacks 1 weights, such as model.norm.weight"), None),
        (RuntimeError("cannot read /home/nvidia/cuda-cache/model.safetensors"), None),
    ],
    ids=str,
)
def test_a_fault_of_a_gpu_says_nothing_about_the_model(
    error: Exception, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at elsewhere then; any other error is the model's, and without a GPU there is no such fault."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plain._kind(error) == kind

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plain._kind(error) == (kind if kind == "memory" else None)


def test_a_program_that_was_killed_is_started_again_when_it_is_asked(
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """What it had not answered is missing, with the reason; nothing runs when it is not needed any more."""
    ends = time.monotonic() + 300
    others = psutil.Process().children()  # of other tests in this process
    with examine.started(os.environ, (), wanted=True) as program:
        (child,) = set(psutil.Process().children()) - set(others)
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
        first = program.ask([question(tiny_model)], examples(), tmp_path, ends)
        second = program.ask(
            [question(tiny_model), question(tiny_model / "no")],
            examples(),
            tmp_path,
            ends,
        )
        left = list(set(psutil.Process().children()) - set(others))

    assert all(total > 0 for total, _ in first.answers["merged"]["losses"])
    assert "error" in second.answers["merged"]
    assert len(left) == 1
    assert not left[0].is_running()
