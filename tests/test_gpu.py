"""What only a GPU can show: kernels, paged memory, and a stopped run that ends in the same bits.

Without a GPU only the tests run of the examples that those runs learn from.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from test_elastic import EXACT, LOSS, STEPS, adapter, go, losses
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from job.checkpoint import state
from job.train.order import Order

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MICRO_BATCH = 4  # with one there would be nothing to pad
SHARES = (1.0, 0.6, 0.4, 0.7, 0.3)
"""Lengths of the examples as shares of max_length: one fills a packed sequence, or two do."""
WORDS = ["and", "is", "It", *map(str, range(15))]
"""After a space each is one token of the tiny tokenizer."""
FRAME = 23  # tokens of the template, three digits and a question mark
TRAIN, EVAL = range(195), range(900, 915)  # the questions of the examples
QLORA = {
    **EXACT,
    "train": {
        **EXACT["train"],
        "optimizer": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "micro_batch_size": MICRO_BATCH,
    },
    "lora": {"r": 1024, "dropout": 0.05},  # so wide that the optimizer's state of some layers is paged
    "model": {"quantization": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
}


@pytest.fixture(scope="session")
def long_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama that takes 4096 tokens, with attention heads as wide as those of real models."""
    folder = tmp_path_factory.mktemp("models") / "long"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig.from_pretrained(
        tiny_model, hidden_size=256, head_dim=64, intermediate_size=512, max_position_embeddings=4096
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


def run(
    folder: Path, model: Path, strategy: str, stops: Sequence[int], *, tokens: int = 0, packing: bool = False
) -> Path:
    """Start a run with QLoRA's settings, stop it after some steps, and start it again.

    With `tokens` it learns from examples of up to so many, else from those of the tiny run.
    """
    folder.mkdir()
    data: dict[str, object] = {"max_length": tokens, "packing": packing}
    made = tiny_config(folder, model, **QLORA, **({"data": data} if tokens else {}))
    if tokens:
        write_examples(folder / "train.jsonl", TRAIN, tokens)
        write_examples(folder / "eval.jsonl", EVAL, tokens)
    for stop in stops:
        go(made, (1, strategy), stop)
    return made


def write_examples(path: Path, numbers: range, tokens: int) -> None:
    """Write an example for each number, whose lengths are the shares of `tokens`, in turns."""
    lines = []
    for number, length in zip(numbers, lengths_of(len(numbers), tokens), strict=True):
        answer = " ".join(random.Random(number).choices(WORDS, k=length - FRAME - 1))
        record = {"instruction": f"{number:03}?", "output": f"is {answer}"}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))


def lengths_of(count: int, tokens: int) -> list[int]:
    """Return the number of tokens of each example."""
    return [int(SHARES[number % len(SHARES)] * tokens) for number in range(count)]


def check_layout(prepared: Path, tokens: int, *, packing: bool) -> None:
    """Assert that no example was cut, and that packing or padding have something to do."""
    rows = Dataset.from_file(str(prepared / "train.arrow"))
    lengths = [len(ids) for ids in rows["input_ids"]]
    if packing:
        examples = [length for row in rows["seq_lengths"] for length in row]
        assert sum(len(row) >= 2 for row in rows["seq_lengths"]) > len(rows) / 2
        assert max(lengths) == tokens
    else:
        examples = lengths
        order = list(Order(len(rows), len(rows), seed=42))
        batches = [order[at : at + MICRO_BATCH] for at in range(0, len(order), MICRO_BATCH)]
        padded = sum(len({lengths[index] for index in batch}) > 1 for batch in batches)
        assert padded > 0.9 * len(batches)
    assert sorted(examples) == sorted(lengths_of(len(examples), tokens))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("tokens", [512, 2048])
def test_the_examples_for_a_gpu_are_as_long_as_they_say(
    tokens: int, layout: str, prepared: Callable[..., Path], long_model: Path, tmp_path: Path
) -> None:
    """None is cut, most batches have padding, and most packed sequences hold several examples."""
    path, packing = tmp_path / "train.jsonl", layout == "packed"
    write_examples(path, TRAIN, tokens)

    data = prepared(path, model=long_model, max_length=tokens, packing=packing)

    check_layout(data, tokens, packing=packing)


@needs_gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_qlora_ends_in_the_same_bits_however_often_it_was_stopped(
    strategy: str, tokens: int, layout: str, long_model: Path, tmp_path: Path
) -> None:
    """With paged 8-bit AdamW, bfloat16, dropout and gradient checkpointing, on one GPU.

    The sequences are so long that attention's backward pass splits them among blocks, which add up in any order
    unless deterministic kernels are used: at 60 tokens there is one block, and nothing to go wrong.
    """
    how = {"tokens": tokens, "packing": layout == "packed"}
    whole = run(tmp_path / "whole", long_model, strategy, [STEPS], **how)
    stopped = run(tmp_path / "stopped", long_model, strategy, [7, 13, STEPS], **how)

    assert losses(whole) == losses(stopped)
    for made in (whole, stopped):
        (data,) = (made.parent / "cache").glob("**/train.arrow")
        check_layout(data.parent, tokens, packing=layout == "packed")
    one, other = adapter(whole), adapter(stopped)
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, last = (losses(whole)[step, "eval_loss"] for step in (0, STEPS))
    assert last < first


@needs_gpu
def test_fsdp_on_one_gpu_is_ddp(tiny_model: Path, tmp_path: Path) -> None:
    """What is shared out among one is the whole."""
    ddp, fsdp = (run(tmp_path / strategy, tiny_model, strategy, [STEPS]) for strategy in ("ddp", "fsdp"))

    mine, theirs = losses(ddp), losses(fsdp)
    assert max(abs(mine[at] - theirs[at]) for at in mine) < 10 * LOSS  # bfloat16


@needs_gpu
def test_a_four_bit_layer_computes_what_its_weights_say() -> None:
    """The kernel and the plain product with the unpacked weights agree, forwards and backwards."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
    given = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    same = given.detach().clone().requires_grad_()

    made, expected = layer(given), same @ plain.T
    made.float().square().sum().backward()
    expected.float().square().sum().backward()

    torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(given.grad, same.grad, rtol=2e-2, atol=2e-1)


@needs_gpu
def test_a_restored_optimizer_is_paged_as_a_fresh_one_is(tmp_path: Path) -> None:
    """Else a run that fitted would run out of memory after its first preemption."""
    torch.manual_seed(0)
    network = torch.nn.Linear(512, 512, bias=False, device="cuda")

    def loop() -> state.Loop:
        optimizer = bnb.optim.PagedAdamW8bit(network.parameters(), lr=1e-3)
        return state.Loop(network, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), None)

    fresh = loop()
    network(torch.randn(8, 512, device="cuda")).sum().backward()
    fresh.optimizer.step()
    kept = state.capture(1, fresh, "{}", {})
    kept.write({}, tmp_path)
    restored = loop()

    state.restore_optimizer(tmp_path, restored)

    mine, theirs = (each.optimizer.state[network.weight] for each in (fresh, restored))
    assert all(getattr(mine[what], "is_paged", False) for what in ("state1", "state2"))
    assert all(getattr(theirs[what], "is_paged", False) for what in ("state1", "state2"))
    torch.cuda.synchronize()
    assert all(torch.equal(mine[what].cpu(), theirs[what].cpu()) for what in ("state1", "state2"))


@needs_gpu
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "PagedAdamW8bit"])
def test_what_is_captured_is_the_state_of_that_moment(optimizer: str) -> None:
    """Although the next step changes it while the copy to the host may still be on its way."""
    torch.manual_seed(0)
    network = torch.nn.Linear(2048, 2048, bias=False, device="cuda")
    made: Callable[..., torch.optim.Optimizer] = getattr(bnb.optim, optimizer)
    loop = state.Loop(network, (taken := made(network.parameters(), lr=1e-3)), _Constant(), None)
    spare = None

    for step in range(1, 4):
        network(torch.randn(8, 2048, device="cuda")).square().sum().backward()
        taken.step()
        torch.cuda.synchronize()
        expected = network.weight.detach().cpu().clone()
        spare = state.capture(step, loop, "{}", {}, spare)
        with torch.no_grad():
            network.weight.zero_().add_(expected.to("cuda"), alpha=0.5)
        assert torch.equal(spare.adapter["weight"], expected)


class _Constant:
    """A schedule with nothing to keep."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        assert not state_dict
