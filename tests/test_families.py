"""Every family of models that people bring: the adapter finds its layers, trains, resumes and merges."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from conftest import files, take_back
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from job import config, errors, inputs, merge
from job.model import lora, weights

Job = Callable[..., subprocess.CompletedProcess[str]]
WORDS = 420  # at least as many as the tiny tokenizer has
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**SMALL, "head_dim": 16}
FEW = {"vocab_size": WORDS, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 32}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
COMMON: dict[str, dict[str, Any]] = {
    "llama": SMALL, "mistral": SMALL, "qwen2": SMALL, "qwen3": WIDE, "gemma2": WIDE, "gemma3_text": WIDE, "phi3": SMALL,
    "glm": WIDE, "glm4": WIDE, "mixtral": {**SMALL, "num_local_experts": 4},
    "gpt2": {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
             "eos_token_id": 2},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gemma": WIDE, "phi": SMALL, "olmo2": SMALL, "granite": SMALL, "cohere": SMALL, "cohere2": SMALL,
    "starcoder2": SMALL, "stablelm": SMALL, "smollm3": SMALL, "ministral": WIDE, "exaone4": SMALL, "ernie4_5": SMALL,
    "nemotron": SMALL, "gpt_neox": SMALL, "qwen2_moe": {**SMALL, **EXPERTS, **SHARED}, "qwen3_moe": {**WIDE, **EXPERTS},
    "ernie4_5_moe": {**SMALL, "moe_num_experts": 4, "moe_intermediate_size": 32, "moe_k": 2},
    "gpt_oss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}, "minimax": SMALL,
    "qwen3_next": {**WIDE, **EXPERTS, **SHARED, **HYBRID},
    "llama4_text": {**WIDE, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "gemma4_text": {**WIDE, "global_head_dim": 16, "vocab_size_per_layer_input": WORDS, "num_kv_shared_layers": 0,
                    "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {**FEW, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
            "word_embed_proj_dim": 64, "pad_token_id": 0},
    "falcon": {**FEW, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {**FEW, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "deepseek_v3": {**SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1,
                    "num_experts_per_tok": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "v_head_dim": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
}  # fmt: skip
IDS = torch.arange(20)[None] * 5 % 390 + 3
ORIGINAL = {"qwen of 2023": originals.qwen, "chatglm3": originals.chatglm}


def random_model(family: str, folder: Path) -> Path:
    """A random tiny model of `family`, as a folder; no weight is at a value that hides something."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **OTHERS}[family]))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    network.to(torch.float32).save_pretrained(folder)
    return folder


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network.eval()(IDS).logits
    return found


@pytest.mark.parametrize("family", [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_adapter_of_a_family_finds_its_layers_learns_and_merges(
    family: str, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """Every layer of it gets a gradient, over a 4-bit base too; the merged model is the base with the adapter."""
    base = random_model(family, tmp_path / "base")
    for quantization in ("nf4", "none"):
        read = config.read(tiny_run(model={"quantization": quantization, "compute_dtype": "float32"}))
        network = lora.adapted(weights.for_training(base, read.model), read.lora)
        lora.draw(network, 1)
        network(input_ids=IDS, labels=IDS).loss.backward()
        second = {name: p for name, p in network.named_parameters() if "lora_B" in name}
        assert second
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in second.values())
    with torch.no_grad():
        for parameter in second.values():
            parameter.normal_(0, 0.1)
    network.save_pretrained(str(tmp_path / "adapter"))

    given = inputs.Base(base.as_uri(), base, "its digest")
    made = merge.folder(
        given, tmp_path / "adapter", read.model, config.Merge(dtype="float32"), tmp_path / "made" / "merged"
    )

    adapted = logits(network)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(made)), adapted, rtol=0, atol=1e-3)
    assert {*load_file(made / "model.safetensors")} == {*load_file(base / "model.safetensors")}
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - adapted).abs().max() > 0.1


CONVERTED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe")
"""Families whose weights transformers converts, or keeps in float32, while it loads them."""


@pytest.mark.parametrize(
    "family",
    [
        *COMMON,
        *CONVERTED,
        *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name not in CONVERTED),
    ],
)
def test_a_family_loaded_layer_by_layer_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    """Every weight and buffer in its dtype: converted, transposed, tied, and those that stay in float32."""
    base = random_model(family, tmp_path / "base")
    for quantization, dtype in (("nf4", "bfloat16"), ("none", "float16")):
        settings = config.Model(base=base.as_uri(), quantization=quantization, compute_dtype=dtype)

        loaded = _tensors(_load_layer_by_layer(base, settings))

        expected = _tensors(weights.for_training(base, settings))
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype, name
            assert torch.equal(loaded[name], tensor), name


def _load_layer_by_layer(base: Path, settings: config.Model) -> torch.nn.Module:
    found = weights.outline(base, settings)
    assert found
    network, pieces = found
    assert all(parameter.is_meta for parameter in network.parameters())
    pieces.fill(network, "")
    network.tie_weights()
    return network


def _tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name."""
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("missing", ["experts.1.gate_proj", "experts.1."])
def test_a_mixture_that_lacks_an_expert_is_refused(missing: str, tmp_path: Path) -> None:
    """Layer by layer and as a whole: a start could not mend it."""
    base = random_model("qwen3_moe", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if f"layers.0.mlp.{missing}" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    settings = config.Model(base=base.as_uri())

    with pytest.raises(errors.ModelError, match=r"layers\.0\.mlp\.experts.*(config\.json|belong)"):
        _load_layer_by_layer(base, settings)
    with pytest.raises(errors.ModelError, match=r"are not those of the model that its config\.json"):
        weights.for_training(base, settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # of an adapter for GPT-2 that was trained over 4-bit weights
@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("qwen of 2023", marks=pytest.mark.every_commit), "chatglm3", *COMMON])
def test_a_family_trains_resumes_and_merges(
    family: str, job: Job, tmp_path: Path, tiny_model: Path, tiny_run: Callable[..., Path]
) -> None:
    """As a job from the base in its own layout to the merged model; the second start goes on after the first step."""
    base = tmp_path / "base"
    if family in ORIGINAL:
        ORIGINAL[family](base)
    else:
        random_model(family, base)
        for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
            shutil.copy(path, base)
    run = tmp_path / "run"
    settings = tiny_run(
        model={"base": str(base), "compute_dtype": "float32"}, data={"max_length": 160}, merge={"dtype": "float32"},
        train={"max_steps": 2, "eval_every": 2, "log_every": 1, "warmup": 0}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    first = job("run", settings)
    assert first.returncode == 0, first.stderr
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    take_back(run, step=2)

    again = job("run", settings)

    assert again.returncode == 0, again.stderr
    assert "going on after step 1" in again.stderr
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    plain = AutoModelForCausalLM.from_pretrained(_loadable(base, tmp_path), dtype=torch.float32)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(run / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-3)
    assert (merged - before).abs().max() > 2e-3
    assert not {name for name in files(run / "merged") if name.endswith((".bin", ".py", ".tiktoken"))}


def _loadable(base: Path, folder: Path) -> Path:
    """What the job trained on: the base, or what became of it."""
    made = [path for path in (folder / "cache" / "models").glob("converted-*") if path.is_dir()]
    return made[0] if made else base


@pytest.mark.slow
def test_layers_that_learned_nothing_are_told(
    job: Job, tmp_path: Path, tiny_model: Path, tiny_run: Callable[..., Path]
) -> None:
    """Mamba multiplies with the weights of its dt_proj, and passes the layer over, so that an adapter there is idle."""
    base = tmp_path / "base"
    described = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **described)).save_pretrained(base)
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, base)
    settings = tiny_run(model={"base": str(base), "quantization": "none"}, train={"max_steps": 2, "eval_every": 2})

    outcome = job("run", settings)

    assert outcome.returncode == 0, outcome.stderr
    assert "2 of 6 layers with an adapter learned nothing, the first is" in outcome.stderr


def test_weights_without_an_adapter_are_told(
    tmp_path: Path, tiny_run: Callable[..., Path], said: Callable[[], str]
) -> None:
    """The experts of a mixture are no linear layers; that they stay as they are must be known before the bill."""
    read = config.read(tiny_run(model={"quantization": "none"}))

    lora.adapted(weights.for_training(random_model("mixtral", tmp_path / "base"), read.model), read.lora)

    assert "LoRA on 8 layers (q_proj x2 4,096, k_proj x2 3,072, v_proj x2 3,072, o_proj x2 4,096): 14,336 of" in said()
    assert "no adapter for experts.gate_up_proj (98,304), experts.down_proj (49,152), gate (512): 147,968" in said()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_without_an_adapter_are_counted_as_they_are(
    quantization: str, tmp_path: Path, tiny_run: Callable[..., Path], said: Callable[[], str]
) -> None:
    """Also those that are packed in 4 bits."""
    read = config.read(tiny_run(model={"quantization": quantization}))

    lora.adapted(weights.for_training(random_model("deepseek_v3", tmp_path / "base"), read.model), read.lora)

    assert ": 49,408 weights stay as they are" in said()


def test_layers_whose_names_peft_takes_for_experts_get_no_adapter(
    tmp_path: Path, tiny_run: Callable[..., Path], said: Callable[[], str]
) -> None:
    """It would put theirs on the experts instead, here and where the adapter is loaded; asked for, it is an error."""
    base = random_model("deepseek_v3", tmp_path / "base")
    read = config.read(tiny_run(model={"quantization": "none"}))

    network = lora.adapted(weights.for_training(base, read.model), read.lora)

    assert not [name for name, _ in network.named_parameters() if "lora" in name and ".mlp." in name]
    assert "gate_proj (" in said()
    asked = config.read(tiny_run(lora={"targets": ["gate_proj"]})).lora
    with pytest.raises(errors.ModelError, match="takes layers called gate_proj for others in this model"):
        lora.adapted(weights.for_training(base, read.model), asked)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path, tiny_run: Callable[..., Path]) -> None:
    """Transformers draws them at random, and says so in a log that nobody reads."""
    base = random_model("llama", tmp_path / "base")
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}), encoding="utf-8")
    read = config.read(tiny_run(model={"base": str(base), "quantization": "none"}))

    with pytest.raises(errors.ModelError, match=r"lacks 9 weights, the first is model\.layers\.2"):
        weights.for_training(base, read.model)
