"""Bases that come quantized, by GPTQ or AWQ: they are trained on as they are, and merged into unpacked."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import quantized
import seeing
import torch
from conftest import take_back
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_families import random_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from job import config, errors, inputs, merge, pull
from job.launch import strategy
from job.model import lora, measure, weights
from job.model.prequantized import PACKED, linear

Job = Callable[..., subprocess.CompletedProcess[str]]
IDS = torch.arange(40)[None] * 7 % 300
WAYS = {
    "gptq": quantized.gptq,
    "gptq-v2": functools.partial(quantized.gptq, version="gptq_v2"),
    "gptq-8-bit": functools.partial(quantized.gptq, bits=8),
    "gptq-2-bit": functools.partial(quantized.gptq, bits=2),
    "gptq-desc-act": functools.partial(quantized.gptq, ordered=False),
    "awq": quantized.awq,
}


def plain(tiny_model: Path, meant: quantized.Weights) -> PreTrainedModel:
    """A model of plain layers with the weights that the packed ones stand for."""
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    network.load_state_dict(meant, strict=False)
    return network


def settings(base: Path, **model: object) -> config.Model:
    return config.Model.model_validate({"base": base.as_uri(), **model})


def adapted(network: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter on every layer of it, with random weights, saved in the `folder`."""
    made = lora.adapted(network, config.Lora(dropout=0.0))
    lora.draw(made, 0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    made.save_pretrained(str(folder))
    return made


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_base_computes_what_its_weights_stand_for(way: str, tiny_model: Path, tmp_path: Path) -> None:
    """Logits, and the gradients of an adapter on every layer, are those of plain layers with the unpacked weights."""
    meant = WAYS[way](tiny_model, tmp_path / "base")
    shape = config.Lora(dropout=0.0)
    both = [weights.for_training(tmp_path / "base", settings(tmp_path / "base")), plain(tiny_model, meant)]

    outcomes = []
    for network in both:
        adapted = lora.adapted(network, shape)
        lora.draw(adapted, 0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        made = adapted(IDS, labels=IDS)
        made.loss.backward()
        outcomes.append((made.logits, {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}))

    assert len(outcomes[0][1]) == 2 * 7 * 2  # layers, linear layers in each, factors
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_base_is_merged_into_unpacked(way: str, tiny_model: Path, tmp_path: Path) -> None:
    """Plain layers, whose weights are rounded once, to the number format of the merge."""
    meant = WAYS[way](tiny_model, tmp_path / "base")

    adapter = adapted(plain(tiny_model, meant), tmp_path / "adapter")

    made = merge.folder(
        inputs.Base("file:///base", tmp_path / "base", "its digest"), tmp_path / "adapter",
        settings(tmp_path / "base"), config.Merge(), tmp_path / "made" / "merged",
    )  # fmt: skip

    whole = AutoModelForCausalLM.from_pretrained(made)
    assert not hasattr(whole.config, "quantization_config")
    wanted = adapter.merge_and_unload().to(torch.bfloat16)
    torch.testing.assert_close(dict(whole.state_dict()), dict(wanted.state_dict()), rtol=2**-8, atol=1e-6)
    untouched = [name for name in meant if "norm" in name or "embed" in name]
    assert all(torch.equal(whole.state_dict()[name], meant[name].to(torch.bfloat16)) for name in untouched)


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("gptq", marks=pytest.mark.every_commit), "awq"])
def test_a_run_on_a_packed_base_goes_on_exactly_and_ends_in_a_plain_model(
    way: str, tiny_model: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Two steps done again after a stop give the same adapter, and the merged folder needs no library of its own."""
    WAYS[way](tiny_model, tmp_path / "base")
    described = tiny_run(model={"base": str(tmp_path / "base")}, merge={"dtype": "float32"})

    first = job("run", described)
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    take_back(tmp_path / "run", 6)
    second = job("run", described)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"the base is quantized already ({way}, 4 bits, groups of 32)" in first.stderr
    torch.testing.assert_close(
        load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), before, rtol=0, atol=0
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    base = weights.for_training(tmp_path / "base", settings(tmp_path / "base", compute_dtype="float32"))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(whole(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"quant_method": "fp8"}, "is quantized already (fp8), where gptq and awq can be trained on: use the original"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "by gptq with 3 bits, where 2, 4, 8 can be read"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "by gptq with group_size 0, which is no size"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "by gptq with format marlin, where gptq and gptq_v2 can be read",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*mlp.*": {}}},
            "by gptq with layers that are quantized in different ways (dynamic)",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "by awq with version gemv"),
        (
            {"quant_method": "awq", "bits": "4", "group_size": 32, "checkpoint_format": "gemv_fast"},
            "by awq with version gemv_fast",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True},
            "by gptq with format marlin, where gptq and gptq_v2 can be read",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_it_is_fetched(
    told: dict[str, object], message: str, tiny_model: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """The first command says so, from config.json alone."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**described, "quantization_config": told}), encoding="utf-8")

    outcome = job("validate", tiny_run(model={"base": str(base)}))

    assert outcome.returncode == 64
    assert message in outcome.stderr


@pytest.mark.parametrize("shared", ["fsdp", "zero1", "zero2", "zero3"])
def test_packed_weights_are_not_shared_out(
    shared: str, tiny_model: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Refused at once, with what works instead."""
    quantized.gptq(tiny_model, tmp_path / "base")

    outcome = job(
        "validate",
        tiny_run(
            model={"base": str(tmp_path / "base")},
            distributed={"strategy": shared},
            train={"optimizer": "adamw_torch"},
        ),
    )

    assert outcome.returncode == 64
    assert f"distributed.strategy {shared} cannot share out a base that is quantized already" in outcome.stderr
    assert "use ddp, or the original weights" in outcome.stderr


def damaged(folder: Path, change: Callable[[quantized.Weights], object]) -> Path:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(f"{_Q}.scales"), rf"{_Q} is .* and should be "),
        (lambda held: held.update({f"{_Q}.qweight": held[f"{_Q}.qweight"][:-1].contiguous()}), rf"{_Q} is .* \(gptq"),
        (lambda held: held.update({f"{_Q}.bias": torch.ones(64)}), f"{_Q} has a bias in its files, and none in"),
        (lambda held: held[f"{_Q}.scales"][0].fill_(torch.nan), f"{_Q}.scales holds NaN or infinity: the model is dam"),
        (lambda held: held[f"{_Q}.g_idx"].fill_(-1), f"{_Q}.g_idx names a group that there is not"),
        (lambda held: held[f"{_Q}.g_idx"].fill_(9), f"{_Q}.g_idx names a group that there is not"),
        (
            lambda held: held.update({f"{_Q}.qweight": held[f"{_Q}.qweight"].long()}),
            f"{_Q}.qweight is of torch.int64 in its files, which no known format has there",
        ),
        (
            lambda held: held.update({f"{_Q}.scales": held[f"{_Q}.scales"].int()}),
            f"{_Q}.scales is of torch.int32 in its files",
        ),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(1)}),
            r"model.norm.weight has the shape \[1\] in its files, and \[64\] in the model that config.json tells of",
        ),
        (lambda held: held.pop("model.norm.weight"), "1 weights lack or have no place in it, the first is model.norm"),
        (lambda held: held.update({f"{_Q}.perm": torch.ones(64)}), f"the first is {_Q}.perm: use the original weights"),
        (
            lambda held: held.update({"model.norm.qweight": torch.ones(8, 8, dtype=torch.int32)}),
            "model.norm is quantized in its files, and no linear layer of the model",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(
    change: Callable[[quantized.Weights], object], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    """A weight that lacks, has another shape or no place would be left out in silence, and another model be trained."""
    quantized.gptq(tiny_model, tmp_path / "base")
    base = damaged(tmp_path / "base", change)

    with pytest.raises(errors.ModelError, match=message):
        weights.for_training(base, settings(base))


def test_a_bias_that_the_model_wants_is_not_left_out(tmp_path: Path) -> None:
    """Qwen2 adds one to its queries, and would answer something else without it."""
    quantized.gptq(random_model("qwen2", tmp_path / "plain"), tmp_path / "base")
    base = damaged(tmp_path / "base", lambda held: held.pop(f"{_Q}.bias"))

    with pytest.raises(errors.ModelError, match=rf"{_Q} is .* and should be .*'bias': \(64,\)"):
        weights.for_training(base, settings(base))


def test_a_packed_head_is_not_that_of_the_embeddings(tiny_model: Path, tmp_path: Path) -> None:
    """As a config.json that says so asks for."""
    quantized.gptq(tiny_model, tmp_path / "base")
    base = damaged(
        tmp_path / "base",
        lambda held: [held.update({f"lm_head.{leaf}": held[f"{_Q}.{leaf}"].clone()}) for leaf in PACKED],
    )
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))

    with pytest.raises(errors.ModelError, match="lm_head is quantized in its files, and shared with the embeddings"):
        weights.for_training(base, settings(base))


def test_a_base_that_sees_images_may_be_packed_too(tmp_path: Path) -> None:
    """Its files name their parts as older versions of transformers did; what sees is not packed, as people do it."""
    plain_base = seeing.base("qwen2_5_vl", tmp_path / "plain")
    meant = quantized.gptq(plain_base, tmp_path / "base")

    network = weights.for_training(tmp_path / "base", settings(tmp_path / "base"))

    assert sum(isinstance(module, linear.QuantizedLinear) for module in network.modules()) == 2 * 7
    save_file(meant, plain_base / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForImageTextToText.from_pretrained(plain_base, dtype=torch.float32)
    torch.testing.assert_close(network(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


def test_how_the_base_answers_stays_with_it(tiny_model: Path, tmp_path: Path) -> None:
    """Several tokens that end an answer, and how to draw the next one, are in a file of their own."""
    quantized.gptq(tiny_model, tmp_path / "base")
    told = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 1]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(told))

    loaded = weights.for_training(tmp_path / "base", settings(tmp_path / "base"))

    assert loaded.generation_config
    assert loaded.generation_config.to_diff_dict().items() >= told.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.update({"layers.0.experts.3.up_proj.qweight": torch.ones(8, 8)}), "the experts of"),
        (lambda held: [held.pop(name) for name in list(held) if name.endswith(".qweight")], "and its files hold none:"),
    ],
)
def test_what_the_names_in_the_files_tell_is_said_before_they_are_fetched(
    change: Callable[[quantized.Weights], object],
    message: str,
    job: Job,
    tiny_model: Path,
    tiny_run: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """They stand at the beginning of each file."""
    quantized.gptq(tiny_model, tmp_path / "base")
    base = damaged(tmp_path / "base", change)

    outcome = job("validate", tiny_run(model={"base": str(base)}))

    assert outcome.returncode == 64
    assert message in outcome.stderr


def test_an_old_base_that_tells_so_in_another_file_is_refused_at_once(
    job: Job, tiny_model: Path, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """With what to change in it."""
    quantized.gptq(tiny_model, tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "quantize_config.json").write_text(json.dumps(told.pop("quantization_config")))
    (tmp_path / "base" / "config.json").write_text(json.dumps(told))

    outcome = job("validate", tiny_run(model={"base": str(tmp_path / "base")}))

    assert outcome.returncode == 64
    assert "has quantize_config.json beside a config.json that says nothing of it" in outcome.stderr


def test_a_file_that_is_broken_is_explained(tiny_model: Path, tmp_path: Path) -> None:
    """With the folder's name."""
    quantized.gptq(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"not weights")

    with pytest.raises(errors.ModelError, match=r"base/model\.safetensors is no safetensors file"):
        weights.for_training(tmp_path / "base", settings(tmp_path / "base"))


@pytest.mark.parametrize("way", ["gptq", "awq"])
def test_a_packed_base_is_estimated_at_what_its_files_hold(
    way: str, tiny_model: Path, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Each of several GPUs gets all of it; where it is too large for one, that is said before it is loaded."""
    WAYS[way](tiny_model, tmp_path / "base")
    read = config.read(tiny_run(model={"base": str(tmp_path / "base")}))
    team = inputs.Team(processes=2, gpus=True)

    pull.survey(read).outline(tmp_path, code=False)
    sizes = measure.measure(tmp_path, read)
    need = strategy.estimate(read, sizes)

    layers = lora.adapted(weights.for_training(tmp_path / "base", read.model), read.lora)
    held = load_file(tmp_path / "base" / "model.safetensors")
    bits = {name: tensor.nbytes for name, tensor in held.items() if name.endswith((".qweight", ".qzeros", ".scales"))}
    rest = sum(tensor.nbytes for name, tensor in held.items() if "norm" in name or "embed" in name or "lm_head" in name)
    assert need.base + need.constants == pytest.approx(sum(bits.values()) + rest, rel=0.05)
    assert sizes.trained == sum(held.numel() for held in layers.parameters() if held.requires_grad)
    assert strategy.choose(read, sizes, team, 10**12) == "ddp"
    with pytest.raises(errors.ConfigError, match=r"the base, which is quantized already .*, takes .* larger GPUs"):
        strategy.choose(read, sizes, team, 10**4)
