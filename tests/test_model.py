"""Loading a base for training and merging, and finding the layers that get an adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from job import config, errors
from job.model import lora, tokenizer, weights


@pytest.fixture
def settings(tiny_run: Callable[..., Path]) -> Callable[..., config.Config]:
    def read(**changes: dict[str, object]) -> config.Config:
        return config.read(tiny_run(**changes))

    return read


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_every_quantization_trains_the_adapter_and_nothing_else(
    quantization: str, tiny_model: Path, settings: Callable[..., config.Config]
) -> None:
    """The base is frozen; the adapter is float32 and gets a gradient in every layer."""
    read = settings(model={"quantization": quantization})
    network = lora.adapted(weights.for_training(tiny_model, read.model), read.lora)

    network(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()

    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    assert len(trained) == 2 * 2 * 7


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
FAMILIES = {
    "plain": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "with-buffers": Gemma4TextConfig(
        **SMALL, head_dim=16, global_head_dim=16, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
    ),
}  # fmt: skip


def made(described: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """A random model, whose buffers are none that a fresh one has."""
    network = AutoModelForCausalLM.from_config(described)
    for name, buffer in network.named_buffers():
        if name in network.state_dict():
            buffer.fill_(0.37)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_loaded_in_pieces_is_the_same(
    family: str, quantization: str, tmp_path: Path, settings: Callable[..., config.Config]
) -> None:
    """Tied embeddings and buffers that are in the files included."""
    network = made(FAMILIES[family], tmp_path / "base")
    asked = settings(model={"quantization": quantization, "compute_dtype": "float32"}).model
    tokens = torch.arange(10)[None]

    found = weights.outline(tmp_path / "base", asked)
    assert found
    outline, pieces = found
    assert all(parameter.is_meta for parameter in outline.parameters())
    pieces.fill(outline, "")
    outline.tie_weights()

    whole = weights.for_training(tmp_path / "base", asked)
    assert torch.equal(outline(tokens).logits, whole(tokens).logits)
    if quantization == "none":
        assert torch.equal(outline(tokens).logits, network.eval()(tokens).logits)


@pytest.mark.parametrize("equal", [True, False])
def test_a_base_whose_tied_weights_are_stored_twice_is_loaded_in_pieces_only_if_they_are_equal(
    tmp_path: Path, settings: Callable[..., config.Config], *, equal: bool
) -> None:
    """Where they differ, transformers does not tie them."""
    network = made(LlamaConfig(**SMALL), tmp_path / "base")
    network.config.tie_word_embeddings = True
    network.config.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})

    assert bool(weights.outline(tmp_path / "base", settings().model)) == equal


@pytest.mark.parametrize("indexed", ["by an index", ""])
def test_only_the_files_that_transformers_reads_are_read(
    indexed: str,
    tmp_path: Path,
    settings: Callable[..., config.Config],
) -> None:
    """Beside them may lie others with the same weights, under other names or as they were before."""
    network = made(FAMILIES["plain"], tmp_path / "base")
    network.save_pretrained(tmp_path / "base", max_shard_size="20kB" if indexed else "1GB")
    if indexed:
        (tmp_path / "base" / "model.safetensors").unlink()
    save_file({"norm.weight": torch.full((32,), 7.0)}, tmp_path / "base" / "original.safetensors")

    found = weights.outline(tmp_path / "base", settings(model={"quantization": "none"}).model)

    assert found
    outline, pieces = found
    pieces.fill(outline, "")
    assert torch.equal(outline.model.norm.weight, network.model.norm.weight.to(outline.dtype))


def test_a_weight_that_is_there_under_two_names_is_refused(
    tmp_path: Path, settings: Callable[..., config.Config]
) -> None:
    """Nobody could say which is meant."""
    made(FAMILIES["plain"], tmp_path / "base")
    twice = {**load_file(tmp_path / "base" / "model.safetensors"), "norm.weight": torch.full((32,), 7.0)}
    save_file(twice, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(errors.ModelError, match=r"model.norm.weight is in the files twice, as .* and as .*: take"):
        weights.outline(tmp_path / "base", settings(model={"quantization": "none"}).model)


def test_an_evaluation_leaves_the_gradients_as_they_were(
    tiny_model: Path, settings: Callable[..., config.Config]
) -> None:
    """Bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs; training must not notice."""
    read = settings(model={"quantization": "nf4"}, lora={"dropout": 0.0})
    network = lora.adapted(weights.for_training(tiny_model, read.model), read.lora)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}

    def gradients() -> dict[str, torch.Tensor]:
        network.train()
        network.zero_grad()
        network(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}

    before = gradients()
    network.eval()
    with torch.no_grad():
        network(**batch)
    after = gradients()

    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("auto", 14), ("all-linear", 14), ("attention", 8), (["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1)],
)
def test_targets_are_found_in_the_loaded_model(
    targets: object, layers: int, tiny_model: Path, settings: Callable[..., config.Config]
) -> None:
    """All linear layers but the head, those of the attention, or those named."""
    read = settings(lora={"targets": targets}, model={"quantization": "none"})

    network = lora.adapted(weights.for_training(tiny_model, read.model), read.lora)

    adapted = {name.rpartition(".lora_A")[0] for name, _ in network.named_parameters() if "lora_A" in name}
    assert len(adapted) == layers
    assert not [name for name in adapted if "lm_head" in name]


@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "c_attn"]])
def test_a_target_that_matches_nothing_is_an_error(
    targets: list[str], tiny_model: Path, settings: Callable[..., config.Config]
) -> None:
    """With the names that there are; a part that matches does not excuse the part that does not."""
    read = settings(lora={"targets": targets}, model={"quantization": "none"})
    network = weights.for_training(tiny_model, read.model)

    with pytest.raises(errors.ModelError, match="c_attn matches no linear layer of the model; it has: down_proj, gate"):
        lora.adapted(network, read.lora)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("config.json", '{"model_type": "never-heard-of"}'), ("model.safetensors", "not weights")],
)
def test_a_base_that_cannot_be_loaded_is_explained(
    name: str, content: str, tiny_model: Path, tmp_path: Path, settings: Callable[..., config.Config]
) -> None:
    """Broken or unknown configs and damaged weights are permanent errors that name the folder."""
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    (broken / name).write_text(content, encoding="utf-8")

    with pytest.raises(errors.ModelError, match=r"model\.base: the model in .*broken cannot be loaded"):
        weights.for_training(broken, settings().model)


def test_a_base_that_bitsandbytes_quantized_is_refused(
    tiny_model: Path, tmp_path: Path, settings: Callable[..., config.Config]
) -> None:
    """The original weights are better to train on and to merge into, and are as small while training."""
    packed = tmp_path / "packed"
    weights.for_training(tiny_model, settings(model={"quantization": "nf4"}).model).save_pretrained(packed)

    with pytest.raises(errors.ModelError, match=r"is quantized already \(bitsandbytes\)"):
        weights.for_training(packed, settings().model)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]")])
def test_a_broken_tokenizer_is_explained(name: str, content: str, tiny_model: Path, tmp_path: Path) -> None:
    """A permanent error that names the folder."""
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    (broken / name).write_text(content, encoding="utf-8")

    with pytest.raises(errors.ModelError, match=r"model\.base: the tokenizer in .*broken cannot be loaded"):
        tokenizer.load(broken)


def test_a_base_model_without_a_template_gets_the_instruction_template(tiny_model: Path, tmp_path: Path) -> None:
    """It is a chat template like any other, so the tuned model can be talked to with it."""
    plain = Path(shutil.copytree(tiny_model, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()

    words = tokenizer.load(plain)

    asked = words.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert asked == "### Instruction\nWhy?\n\n### Response\n"
    with pytest.raises(errors.ModelError, match="has no chat template: use instruction-en or instruction-zh"):
        tokenizer.load(plain, "chat")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_short_examples_are_filled_up_with_a_token_that_the_model_has(
    method: str, tiny_model: Path, tiny_run: Callable[..., Path], job: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    """To the same loss as with a tokenizer whose own such token is not behind the last row of the embedding."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    words = AutoTokenizer.from_pretrained(base)
    rows = len(words)
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(base)
    data = []
    for name, numbers in (("train", range(8)), ("eval", range(8, 12))):
        answers = [{"chosen": "It is" + " so" * number, "rejected": "No"} for number in numbers]
        told = [{"completion": each["chosen"]} if method == "sft" else each for each in answers]
        data.append(tmp_path / f"{name}-made.jsonl")
        data[-1].write_text("".join(json.dumps({"prompt": "Why?", **each}) + "\n" for each in told))
    losses = []
    for model in (tiny_model, base):
        described = tiny_run(
            run={"url": (tmp_path / f"run-{model.name}").as_uri()},
            model={"base": str(model), "quantization": "none"},
            data={"train": [str(data[0])], "eval": [str(data[1])]},
            train={"method": method, "max_steps": 2, "warmup": 0},
            merge={"enabled": False},
        )
        outcome = job("run", described)
        assert outcome.returncode == 0, outcome.stderr
        losses.append(json.loads((tmp_path / f"run-{model.name}" / "done.json").read_text())["training"]["loss_after"])

    assert words.pad_token_id == rows
    assert losses[0] == losses[1]
