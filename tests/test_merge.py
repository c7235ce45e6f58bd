"""Adding an adapter to its base: the sum is right, or there is none."""

import json
import os
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import adapters
import pytest
import seeing
import torch
from conftest import files
from killing import Moment, Stopped
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from job import config, errors, inputs, manifest, merge, paths
from job.examine import plain
from job.merge import proof
from job.merge.shards import Shards
from job.model import adapted, lora, tokenizer, weights

Job = Callable[..., subprocess.CompletedProcess[str]]
DIGEST = "the base's digest"
EXACT = config.Merge(dtype="float32")


def merged(base: Path, adapter: Path, wanted: config.Merge = EXACT, **model: object) -> Path:
    """The folder of the merged model, beside the adapter."""
    given = inputs.Base(base.as_uri(), base, DIGEST)
    settings = config.Model.model_validate({"base": base.as_uri(), **model})
    return merge.folder(given, adapter, settings, wanted, adapter.parent / "made" / "merged")


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter whose every weight is random, as training would leave it, with what training keeps beside it."""
    torch.manual_seed(1)
    settings = config.Model(base=tiny_model.as_uri(), quantization="none", compute_dtype="float32")
    network = lora.adapted(weights.for_training(tiny_model, settings), config.Lora())
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    folder = tmp_path / "adapter"
    network.save_pretrained(str(folder))
    tokenizer.load(tiny_model).save_pretrained(folder)
    (folder / paths.TRAINING).write_text(json.dumps({"base": "file:///base", "inputs": {"base": DIGEST}}))
    return folder


@pytest.fixture
def large(tiny_model: Path, tmp_path: Path) -> Path:
    """A base of several megabytes."""
    torch.manual_seed(0)
    small = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    described = LlamaConfig(**small, num_hidden_layers=4, vocab_size=420, eos_token_id=2)
    LlamaForCausalLM(described).save_pretrained(tmp_path / "large")
    for path in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("*.jinja")):
        shutil.copy(path, tmp_path / "large")
    return tmp_path / "large"


def change(adapter: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(how(load_file(path)), path)


def say(adapter: Path, **more: object) -> None:
    """Make its settings say something else."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def test_the_merged_weights_are_the_sum_rounded_once(tiny_model: Path, adapter: Path) -> None:
    """W + alpha / r x B A, computed in float64 beside it and rounded to bfloat16, number by number."""
    made = load_file(merged(tiny_model, adapter, config.Merge()) / "model.safetensors")

    original, added = load_file(tiny_model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    changed = [name for name in made if not torch.equal(made[name], original[name].to(torch.bfloat16))]
    assert len(changed) == 14
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = added[f"{module}.lora_A.weight"].double(), added[f"{module}.lora_B.weight"].double()
        exact = original[name].double() + 32 / 16 * b @ a
        assert made[name].dtype == torch.bfloat16
        assert ((made[name].double() - exact).abs() <= 2**-8 * exact.abs() * 1.001 + 1e-7).all()


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", adapters.KINDS)
def test_an_adapter_of_any_kind_is_merged_into_what_peft_computes_with_it(
    kind: str, tied: bool, tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """Loaded by plain transformers; a head that is not the embedding any more is kept beside it."""
    base = adapters.base(tmp_path / "base", tied=tied)
    trained = adapters.adapter(adapters.plain(base), tmp_path / "adapter", **adapters.KINDS[kind])
    expected = adapters.logits(trained)

    made = merged(base, tmp_path / "adapter")

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-5, atol=1e-5)
    assert (adapters.logits(adapters.plain(base)) - expected).abs().max() > 1e-3
    told = json.loads((made / "config.json").read_text())
    assert told["tie_word_embeddings"] is (tied and kind not in adapters.UNTIED)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize(
    "kind", ["lora", *(kind for kind in adapters.KINDS if re.search("embedding|head|token", kind))]
)
def test_a_vocabulary_of_another_size_is_merged_too(
    kind: str, tied: bool, tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """The embedding and the head have grown, config.json says so, and the base with the adapter is opened likewise."""
    base = adapters.base(tmp_path / "base", tied=tied)
    how = adapters.KINDS[kind]
    if told := how.get("trainable_token_indices"):
        new = [3, 40, 41, 42]
        how = {**how, "trainable_token_indices": dict.fromkeys(told, new) if isinstance(told, dict) else new}
    expected = adapters.logits(adapters.adapter(adapters.plain(base, tokens=43), tmp_path / "adapter", **how))

    if not tied and kind in adapters.ONE_SIDED:  # PEFT does not save the other, and so nobody has it
        with pytest.raises(
            errors.ModelError, match="would have 40 and 43 rows: the vocabulary was changed in training"
        ):
            merged(base, tmp_path / "adapter")
        return
    made = merged(base, tmp_path / "adapter")

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((made / "config.json").read_text())["vocab_size"] == 43
    asked = {
        "path": base,
        "adapter": tmp_path / "adapter",
        "quantized": None,
        "dtype": "float32",
        "device_map": {"": "cpu"},
    }
    with warnings.catch_warnings(action="ignore"):  # of what a merge by PEFT itself could not do
        alone = plain.load({**asked, "trust_remote_code": False})
        together = adapted.load(adapters.plain(base), {"one": tmp_path / "adapter"})
    for opened in (alone, together):
        torch.testing.assert_close(adapters.logits(opened), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [37, 43])
def test_a_bias_of_the_head_has_as_many_rows_as_the_head(tokens: int, tmp_path: Path) -> None:
    """Phi's has one, and PEFT saves it with the head when that has grown or shrunk."""
    torch.manual_seed(0)
    shape = PhiConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    network = PhiForCausalLM(shape)
    network.lm_head.bias.data.normal_()
    network.save_pretrained(tmp_path / "base")
    how: dict[str, object] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    trained = adapters.adapter(adapters.plain(tmp_path / "base", tokens=tokens), tmp_path / "adapter", **how)
    asked = torch.arange(37)[None]

    made = adapters.plain(merged(tmp_path / "base", tmp_path / "adapter"))
    together = adapted.load(adapters.plain(tmp_path / "base"), {"one": tmp_path / "adapter"})

    with torch.no_grad():
        expected, *found = (each.eval()(asked).logits for each in (trained, made, together))
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "some tokens"])
def test_an_adapter_that_changes_a_few_rows_of_many_is_merged(kind: str, tmp_path: Path) -> None:
    """Tokens that training never saw stay as they were, and most rows are of such."""
    base = adapters.base(tmp_path / "base", tied=False, vocab_size=3000)
    seen = 1234
    how: dict[str, object] = {"target_modules": ["embed_tokens"]}
    if kind == "some tokens":
        how = {"target_modules": ["q_proj"], "trainable_token_indices": list(range(seen - 50, seen + 1))}
    adapters.adapter(adapters.plain(base), tmp_path / "adapter", **how)
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]

    def few(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, value in held.items():
            if "lora_embedding_A" in name:
                value[:, torch.arange(3000) != seen] = 0
            elif "lora_B" in name:
                value.zero_()
            elif "tokens_delta" in name:
                value[:-1] = before[seen - 50 : seen]
        return held

    change(tmp_path / "adapter", few)

    made = load_file(merged(base, tmp_path / "adapter") / "model.safetensors")["model.embed_tokens.weight"]

    assert (made != before).any(1).nonzero().view(-1).tolist() == [seen]


def test_an_adapter_in_eight_bits_is_merged_as_peft_reads_it(tiny_model: Path, adapter: Path) -> None:
    """In float32, of the numbers that are there."""
    change(adapter, lambda w: {name: value.to(torch.float8_e4m3fn) for name, value in w.items()})
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = adapters.logits(PeftModel.from_pretrained(network, str(adapter)))

    made = merged(tiny_model, adapter)

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_head_that_is_kept_tied_has_the_rank_of_its_embedding(
    tied: bool, tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """And the scale of its own, as in PEFT."""
    base = adapters.base(tmp_path / "base", tied=tied)
    how = {**adapters.KINDS["embedding and head, tied"], "rank_pattern": {"embed_tokens": 4}}
    expected = adapters.logits(adapters.adapter(adapters.plain(base), tmp_path / "adapter", **how))

    made = merged(base, tmp_path / "adapter")

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_transformers_makes_others_of_are_merged_and_keep_their_names(tmp_path: Path) -> None:
    """Files of this family hold queries, keys, values and a gate in one, which the model does not."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    described = {**small, "num_layers_per_stack": 2, "vocab_size": 64, "head_dim": 8}
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("hrm_text", **described)).save_pretrained(base)
    targets = {"target_modules": ["q_proj", "v_proj", "gate_proj", "o_proj"]}
    expected = adapters.logits(adapters.adapter(adapters.plain(base), tmp_path / "adapter", **targets))

    made = merged(base, tmp_path / "adapter")

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-4, atol=1e-4)
    assert {*load_file(made / "model.safetensors")} == {*load_file(base / "model.safetensors")}
    assert "model.L_module.layers.0.attn.gqkv_proj.weight" in load_file(made / "model.safetensors")


def test_an_adapter_that_calls_layers_as_the_files_do_is_merged_too(tmp_path: Path) -> None:
    """As older versions of transformers called those of models that see images; the files keep their names."""
    base = seeing.base("qwen2_5_vl", tmp_path / "base")
    network = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    expected = adapters.logits(
        adapters.adapter(network, tmp_path / "adapter", target_modules=r".*language_model.*\.[qv]_proj")
    )
    change(tmp_path / "adapter", lambda w: {name.replace("language_model.", ""): v for name, v in w.items()})
    say(tmp_path / "adapter", target_modules=None)

    made = merged(base, tmp_path / "adapter")

    loaded = AutoModelForImageTextToText.from_pretrained(made, dtype=torch.float32)
    torch.testing.assert_close(adapters.logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert {*load_file(made / "model.safetensors")} == {*load_file(base / "model.safetensors")}


@pytest.mark.parametrize("how", [{"quantization": "nf4"}, {"quantization": "fp4", "double_quant": False},
                                 {"quantization": "int8"}], ids=["nf4", "fp4", "int8"])  # fmt: skip
def test_merged_into_what_the_adapter_saw_it_answers_as_in_training(
    how: dict[str, object], tiny_model: Path, adapter: Path
) -> None:
    """All quantized layers are rounded as they were then, those without an adapter too; the head and norms are not."""
    change(adapter, lambda w: {name: v for name, v in w.items() if "down_proj" not in name})
    told = json.loads((adapter / "adapter_config.json").read_text())
    say(adapter, target_modules=[name for name in told["target_modules"] if "down_proj" not in name])
    settings = config.Model.model_validate({"base": tiny_model.as_uri(), "compute_dtype": "float32", **how})
    base = weights.for_training(tiny_model, settings)
    expected = adapters.logits(PeftModel.from_pretrained(base, str(adapter)))

    wanted = config.Merge(base="dequantized", dtype="float32")
    made = merged(tiny_model, adapter, wanted, compute_dtype="float32", **how)

    got = adapters.logits(AutoModelForCausalLM.from_pretrained(made))
    original = adapters.logits(AutoModelForCausalLM.from_pretrained(merged(tiny_model, adapter)))
    share = 0.9 if how["quantization"] == "int8" else 0.05  # there the activations are rounded too
    assert (got - expected).abs().max() < share * (original - expected).abs().max()
    layer = base.get_submodule("model.layers.0.mlp.down_proj")
    held = dequantize_module_weight(layer)
    torch.testing.assert_close(load_file(made / "model.safetensors")["model.layers.0.mlp.down_proj.weight"], held)


def test_the_result_loads_with_plain_transformers_and_answers_like_base_and_adapter(
    tiny_model: Path, adapter: Path
) -> None:
    """Weights, tokenizer, chat template and generation config are all there."""
    folder = merged(tiny_model, adapter, config.Merge())

    words = AutoTokenizer.from_pretrained(folder)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "What is 1 and 2?"}], return_tensors="pt", return_dict=True
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        of_base = plain(**asked).logits
        of_merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**asked).logits
        of_adapter = PeftModel.from_pretrained(plain, str(adapter))(**asked).logits
    assert (of_merged - of_adapter).abs().max() < 0.02 * of_adapter.abs().max()
    assert (of_adapter - of_base).abs().max() > 0.2 * of_adapter.abs().max()
    assert {"config.json", "generation_config.json", "tokenizer.json", "manifest.json"} < files(folder)


def test_large_models_are_saved_in_shards_with_an_index_that_is_right(large: Path, tmp_path: Path) -> None:
    """Each no larger than the config says; where every tensor is, and how large they are together."""
    adapters.adapter(adapters.plain(large), tmp_path / "adapter", target_modules=["q_proj"])

    folder = merged(large, tmp_path / "adapter", config.Merge(max_shard_size="1MB", dtype="float32"))

    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(shards) == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, 6)]
    assert all((folder / name).stat().st_size < 1.1e6 for name in shards)
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    every = [tensor for held in shards.values() for tensor in held.values()]
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in every),
        "total_parameters": sum(tensor.numel() for tensor in every),
    }
    assert len(every) == len(load_file(large / "model.safetensors"))


def test_the_config_stays_as_its_owner_wrote_it(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """But for the number format, so that it loads wherever the base does; what is unknown here may be needed there."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    told = json.loads((base / "config.json").read_text())
    told.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**told, "torch_dtype": "float32", "of_the_owner": [1]}))
    (base / "LICENSE").write_text("as you like")
    (base / "notes.csv").write_text("not part of the model")

    folder = merged(base, adapter, config.Merge())

    now = json.loads((folder / "config.json").read_text())
    assert now == {**told, "torch_dtype": "bfloat16", "of_the_owner": [1]}
    assert {"LICENSE"} == files(folder) & {"LICENSE", "notes.csv", "README.md"}


def test_merging_again_does_nothing(tiny_model: Path, adapter: Path) -> None:
    """A sealed result of the same base and adapter is the result."""
    one = merged(tiny_model, adapter)
    written = (one / "model.safetensors").stat().st_mtime_ns

    assert merged(tiny_model, adapter) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == written


def test_a_merge_that_was_made_for_another_claim_has_that_of_this_start(tiny_model: Path, adapter: Path) -> None:
    """The start that made it may never have published it, and this one may have found the same model elsewhere."""
    given = inputs.Base(tiny_model.as_uri(), tiny_model, DIGEST)
    settings = config.Model(base=tiny_model.as_uri())
    claims = [{"made_of": number, "base": f"s3://bucket/{number}"} for number in ("1", "2")]
    place = adapter.parent / "made" / "merged"
    one = merge.folder(given, adapter, settings, EXACT, place, claims[0])
    written = (one / "model.safetensors").stat().st_mtime_ns

    assert merge.folder(given, adapter, settings, EXACT, place, claims[1]) == one

    assert claims[1].items() <= json.loads((one / "training.json").read_text()).items()
    assert manifest.sealed(one) == manifest.of(one)
    assert (one / "model.safetensors").stat().st_mtime_ns == written


ONE = "model.layers.1.self_attn.q_proj"


def only(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    """Change the tensors of one layer whose names have that part."""
    return lambda w: {name: value(v) if f"{ONE}.{part}" in name else v for name, v in w.items()}


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "q_proj" not in k},
            (
                "the adapter is not whole: by its settings it was trained on model.layers.0.self_attn.q_proj, "
                "model.layers.1.self_attn.q_proj, of which it holds no weights (2 such): save or bring it again"
            ),
        ),
        (
            lambda w: {k.replace("q_proj", "c_attn"): v for k, v in w.items()},
            (
                "not all of its weights have a counterpart there; 2 have none, such as "
                "model.layers.0.self_attn.c_attn, model.layers.1.self_attn.c_attn: it was trained on another base"
            ),
        ),
        (
            lambda w: {k.replace(".layers.", ".h."): v for k, v in w.items()},
            (
                "none of its weights have a counterpart there; 14 have none, such as "
                "model.h.0.mlp.down_proj, model.h.0.mlp.gate_proj, model.h.0.mlp.up_proj, model.h.0.self_attn.k_proj "
                "and 10 more: it was trained on another base"
            ),
        ),
        (
            lambda w: {k: v for k, v in w.items() if f"{ONE}.lora_B" not in k},
            f"the adapter is not whole: {ONE} lacks lora_B: save or bring it again",
        ),
        (
            only("lora_A", lambda v: v[:, :-1].contiguous()),
            (
                f"matrices for {ONE} are for 63 inputs and 64 outputs, and the base has 64 and 64 there: it "
                "was trained on another base"
            ),
        ),
        (
            lambda w: {k: v[..., :8].contiguous() if "lora_B" in k else v[:8] for k, v in w.items()},
            (
                "matrices for model.layers.0.mlp.down_proj have rank 8, and adapter_config.json says 16: they "
                "do not belong together"
            ),
        ),
        (
            lambda w: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in w.items()},
            (
                "the adapter changes nothing: lora_B is zero in all 14 layers, so the merged model would be the base: "
                "it was not trained, or saved without its weights"
            ),
        ),
        (
            only("lora_B", lambda v: v * float("inf")),
            (
                f"the adapter holds NaN or Inf in 1 weights (base_model.model.{ONE}.lora_B.weight): its training went "
                "wrong; lower train.learning_rate and train again"
            ),
        ),
        (lambda _: {}, "the adapter holds no weights at all"),
        (
            lambda w: {k.replace("mlp.", "mlp.experts.3."): v for k, v in w.items()},
            "transformers holds all experts of a layer in one tensor now: merge it with PEFT",
        ),
        (
            lambda w: {k.replace("base_model.model.", "base_model.model.module."): v for k, v in w.items()},
            "they are called as in a network that trains: save it with PEFT's save_pretrained",
        ),
        (
            lambda w: {**w, "base_model.model.score.weight": torch.ones(2, 64)},
            "1 have none, such as score: they are a head for another task",
        ),
    ],
    ids=[
        "partial",
        "renamed",
        "another",
        "half",
        "shape",
        "rank",
        "zero",
        "infinite",
        "empty",
        "experts",
        "raw",
        "head",
    ],
)
def test_an_adapter_that_does_not_do_its_work_is_an_error(
    how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], told: str, tiny_model: Path, adapter: Path
) -> None:
    """Never a warning, and nothing is left that looks like a result."""
    change(adapter, how)

    with pytest.raises(errors.ModelError, match=re.escape(told)):
        merged(tiny_model, adapter)

    assert not list(adapter.parent.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"peft_type": "IA3"}, "the adapter is of the kind IA3, where LORA can be merged: merge it with PEFT"),
        (
            {"init_lora_weights": "pissa"},
            (
                "the adapter began with init_lora_weights pissa, which changed the base as well: save it with PEFT's "
                "path_initial_model_for_weight_conversion"
            ),
        ),
        ({"target_parameters": ["experts.gate_up_proj"]}, "the adapter was made with target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "the adapter was made with alora_invocation_tokens"),
        ({"some_new_thing": {"of": 2027}}, "the adapter was made with some_new_thing (adapter_config.json), which"),
        (
            {"modules_to_save": ["lm_head"]},
            "by its settings it was trained on lm_head.weight, of which it holds no weights",
        ),
        ({"use_dora": True}, "model.layers.0.mlp.down_proj lacks lora_magnitude_vector: save or bring it again"),
        ({"lora_bias": True}, "model.layers.0.mlp.down_proj lacks lora_B.bias: save or bring it again"),
        ({"trainable_token_indices": [1]}, "it was trained on trainable_token_indices, of which it holds no weights"),
        ({"r": None}, "does not say r and lora_alpha: it is not what PEFT writes"),
        (
            {"rank_pattern": [1]},
            "rank_pattern: Input should be a valid dictionary, not [1]: it is not what PEFT writes",
        ),
        (
            {"target_modules": "((("},
            "target_modules: '(((' is no regular expression (missing ), unterminated subpattern",
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save: Input should be a valid list, not 'lm_head'"),
        ({"layers_to_transform": "x"}, "layers_to_transform: Input should be a valid integer, not 'x'"),
        ({"init_lora_weights": "loftq"}, "changed the base as well: merge it with PEFT into the base that this left"),
    ],
)
def test_settings_that_the_merge_would_not_honour_are_an_error(
    more: dict[str, object], told: str, tiny_model: Path, adapter: Path
) -> None:
    """What is not known could mean anything; an adapter that is merged without it would be another one."""
    say(adapter, **more)

    with pytest.raises(errors.ModelError, match=re.escape(told)):
        merged(tiny_model, adapter)


@pytest.mark.parametrize(
    ("kind", "how", "more", "told"),
    [
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
            lambda w: {k: v for k, v in w.items() if "layers.1.input_layernorm" not in k},
            {},
            "it was trained on model.layers.1.input_layernorm.weight, of which it holds no weights (1 such)",
        ),
        (
            {"target_modules": ["q_proj"], "bias": "all"},
            lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.k_proj.bias" not in k},
            {},
            "it was trained on model.layers.1.self_attn.k_proj.bias, of which it holds no weights (1 such)",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
            lambda w: w,
            {"trainable_token_indices": [3, 9, 12]},
            "holds 2 rows of model.embed_tokens, and adapter_config.json names 3 tokens for them: they do not belong",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
            lambda w: w,
            {"trainable_token_indices": [3, -9]},
            "names 2 tokens for them, a negative one among them: they do not belong together",
        ),
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            lambda w: {k: v[:-1].clone() if "magnitude" in k else v for k, v in w.items()},
            {},
            "lora_magnitude_vector for model.layers.0.self_attn.q_proj has 15 numbers, and its lora_B 16 outputs",
        ),
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            lambda w: w,
            {"use_dora": False},
            "has a lora_magnitude_vector for model.layers.0.self_attn.q_proj, and adapter_config.json does not say use",
        ),
        (
            {"target_modules": ["q_proj"], "lora_bias": True},
            lambda w: {k: v[:1].clone() if "lora_B.bias" in k else v for k, v in w.items()},
            {},
            "lora_B.bias for model.layers.0.self_attn.q_proj has 1 numbers, and its lora_B 16 outputs: save or bring",
        ),
    ],
    ids=["whole module", "bias", "more tokens", "no token", "short magnitude", "idle magnitude", "short bias"],
)
def test_an_adapter_that_lacks_what_its_settings_say_is_an_error(
    kind: dict[str, object], how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    more: dict[str, object], told: str, tmp_path: Path,
) -> None:  # fmt: skip
    """Whatever was trained besides the matrices; nothing is read from what lies behind it in the file."""
    base = adapters.base(tmp_path / "base", tied=False, attention_bias=True)
    with warnings.catch_warnings(action="ignore"):
        adapters.adapter(adapters.plain(base), tmp_path / "adapter", **kind)
    change(tmp_path / "adapter", how)
    say(tmp_path / "adapter", **more)

    with pytest.raises(errors.ModelError, match=re.escape(told)):
        merged(base, tmp_path / "adapter")


def test_trained_tokens_and_a_head_that_shares_them_are_refused_together(tmp_path: Path) -> None:
    """PEFT computes such a head from the trained tokens, and merges it without them."""
    base = adapters.base(tmp_path / "base", tied=True)
    adapters.adapter(
        adapters.plain(base), tmp_path / "adapter", target_modules=["lm_head"], trainable_token_indices=[1, 2]
    )

    with pytest.raises(errors.ModelError, match=r"trained tokens of model\.embed_tokens\.weight and a LoRA on lm_head"):
        merged(base, tmp_path / "adapter")


def test_the_weights_are_those_that_transformers_would_read(tmp_path: Path) -> None:
    """Of a single file and an index it takes the file; an adapter that lies there too is no part of the base."""
    base = adapters.base(tmp_path / "base", tied=False)
    plain = adapters.plain(base)
    expected = adapters.logits(adapters.adapter(plain, tmp_path / "adapter", target_modules=["q_proj"]))
    held = load_file(base / "model.safetensors")
    save_file({name: value * 2 for name, value in held.items()}, base / "old.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "old.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    made = merged(base, tmp_path / "adapter")
    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-5, atol=1e-5)

    shutil.rmtree(made)
    (base / "model.safetensors").rename(base / "weights.safetensors")
    (base / "old.safetensors").unlink()
    with pytest.raises(errors.ModelError, match=r"lacks old\.safetensors, which model\.safetensors\.index\.json names"):
        merged(base, tmp_path / "adapter")
    (base / "model.safetensors.index.json").write_text("{")
    with pytest.raises(errors.ModelError, match=r"index\.json cannot be read"):
        merged(base, tmp_path / "adapter")
    (base / "model.safetensors.index.json").unlink()
    save_file({"stray": torch.ones(1)}, base / "adapter_model.safetensors")
    made = merged(base, tmp_path / "adapter")
    assert "stray" not in load_file(made / "model.safetensors")
    shutil.rmtree(made)
    save_file(dict(list(held.items())[:1]), base / "more.safetensors")
    with pytest.raises(errors.ModelError, match=r"lm_head\.weight is in weights\.safetensors and in more\.safetensors"):
        merged(base, tmp_path / "adapter")


def test_integers_that_stand_for_weights_are_not_added_to(tmp_path: Path) -> None:
    """Nobody says by what they were to be multiplied."""
    base = adapters.base(tmp_path / "base", tied=False)
    adapters.adapter(adapters.plain(base), tmp_path / "adapter", target_modules=["q_proj"])
    held = load_file(base / "model.safetensors")
    held["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 16, dtype=torch.int8)
    save_file(held, base / "model.safetensors")

    with pytest.raises(errors.ModelError, match=r"q_proj\.weight in .* has numbers in int8, which stand for others"):
        merged(base, tmp_path / "adapter")


def test_a_part_of_a_tokenizer_is_none(tiny_model: Path, adapter: Path) -> None:
    """The base's is taken then, whole; and its licence and code, whatever lies beside the adapter."""
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    for name in ("special_tokens_map.json", "LICENSE", "train.py"):
        (adapter / name).write_text("{}")
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text('{"chat_template": null}')

    made = merged(tiny_model, adapter)

    assert (made / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert (made / "chat_template.jinja").read_bytes() == (tiny_model / "chat_template.jinja").read_bytes()
    assert not {"special_tokens_map.json", "LICENSE", "train.py"} & files(made)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("inside", [False, True], ids=["base's apart", "base's inside"])
def test_a_template_without_a_tokenizer_is_spoken_by_the_bases(
    place: str, inside: bool, tiny_model: Path, adapter: Path, tmp_path: Path  # noqa: FBT001 - a parameter
) -> None:  # fmt: skip
    """By the merged model, and by the base with the adapter."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    if inside:
        told = json.loads((base / "tokenizer_config.json").read_text())
        told["chat_template"] = (base / "chat_template.jinja").read_text()
        (base / "tokenizer_config.json").write_text(json.dumps(told))
        (base / "chat_template.jinja").unlink()
    for path in (*adapter.glob("tokenizer*"), *adapter.glob("*.jinja")):
        path.unlink()
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    text = template if place.endswith(".jinja") else json.dumps({"chat_template": template})
    (adapter / place).write_text(text)

    made = merged(base, adapter)

    for words in (AutoTokenizer.from_pretrained(made), tokenizer.trained_with(adapter, base)):
        assert words.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False) == "[Why?]"
        assert words.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    told = json.loads((made / "tokenizer_config.json").read_text())
    assert told.get("chat_template") is None
    assert [name for name in files(made) if name.startswith("chat_template")] == ["chat_template.jinja"]


def test_a_bias_that_the_base_has_no_place_for_is_an_error(tmp_path: Path) -> None:
    """PEFT adds it while it computes; a merged Llama could not hold it. Where there is a bias, the two are added."""
    base = adapters.base(tmp_path / "base", tied=False)
    adapters.adapter(adapters.plain(base), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(errors.ModelError, match="the adapter has a bias for layers that have none in the base"):
        merged(base, tmp_path / "adapter")

    biased = adapters.base(tmp_path / "biased", tied=False, attention_bias=True)
    expected = adapters.logits(
        adapters.adapter(adapters.plain(biased), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    )
    made = merged(biased, tmp_path / "adapter")

    torch.testing.assert_close(adapters.logits(adapters.plain(made)), expected, rtol=1e-5, atol=1e-5)


def test_another_base_than_the_trained_one_is_refused(tiny_model: Path, adapter: Path) -> None:
    """By the digest of what it contains, not by its name."""
    (adapter / paths.TRAINING).write_text(json.dumps({"inputs": {"base": "another digest"}}))

    with pytest.raises(
        errors.ModelError, match=f"has digest {DIGEST}, the adapter was trained on another digest: put that base back"
    ):
        merged(tiny_model, adapter)


def test_a_model_that_holds_the_adapter_already_is_refused(tiny_model: Path, adapter: Path) -> None:
    """Merged twice it would be twice as strong. Another adapter may be trained on it, and merged."""
    once = merged(tiny_model, adapter)

    with pytest.raises(errors.ModelError, match="is a merged model already, and holds this very adapter: merge into"):
        merged(once, adapter)

    change(adapter, lambda w: {name: v * 0.5 for name, v in w.items()})
    assert manifest.sealed(merged(once, adapter))


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), "bfloat16", "q_proj.weight of the merged model would hold NaN or Inf: the base or the adapter"),
        (1e6, "float16", "q_proj.weight of the merged model has numbers of up to 1e+06, which float16 does not hold:"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error(
    value: float, dtype: str, told: str, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Of a damaged base, or where the number format of the merged model is too small for it."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    held = load_file(base / "model.safetensors")
    held[f"{ONE}.weight"] = held[f"{ONE}.weight"].float()
    held[f"{ONE}.weight"][3, 4] = value
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(errors.ModelError, match=re.escape(told)):
        merged(base, adapter, config.Merge.model_validate({"dtype": dtype}))

    assert not list(tmp_path.rglob("manifest.json"))


def test_an_adapter_that_is_lost_in_rounding_is_an_error(tiny_model: Path, adapter: Path) -> None:
    """The merged model would be the base, to the last bit."""
    change(adapter, lambda w: {name: v * 1e-12 if "lora_B" in name else v for name, v in w.items()})

    with pytest.raises(
        errors.ModelError, match="the adapter changes nothing: what it adds is too small for the merged"
    ):
        merged(tiny_model, adapter, config.Merge())

    assert not list(adapter.parent.rglob("manifest.json"))


def test_what_is_wrong_on_the_disk_is_found(tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every merged weight are read again, and compared with the sum in float64."""
    check = proof.check

    def damage_and_check(shards: Shards, folder: Path) -> proof.Proof:
        held = load_file(folder / "model.safetensors")
        held[f"{ONE}.weight"] *= 1.01
        save_file(held, folder / "model.safetensors")
        return check(shards, folder)

    monkeypatch.setattr(proof, "check", damage_and_check)

    with pytest.raises(errors.ModelError, match=f"{ONE}.weight of the merged model is not what it should be: in row 0"):
        merged(tiny_model, adapter)

    assert not list(adapter.parent.rglob("manifest.json"))


def test_a_base_with_contradictory_sampling_settings_is_saved(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    """As published for Llama-2 chat: a temperature without sampling, which transformers refuses to save."""
    odd = Path(shutil.copytree(tiny_model, tmp_path / "odd"))
    (odd / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False}))

    folder = merged(odd, adapter)

    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is True
    assert manifest.sealed(folder)


def test_a_killed_merge_goes_on_with_the_shards_that_are_whole(
    large: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Those that were damaged since are written again; the result is that of a merge that nobody touched."""
    described = tiny_run(model={"base": str(large)}, merge={"max_shard_size": "1MB", "dtype": "float32"})
    stopped = Stopped(Moment("job", "job.merge.shards", "_Hands._write", call=3, after=True), described)
    os.kill(stopped.job, signal.SIGKILL)
    assert stopped.ended() == -signal.SIGKILL
    (partial,) = (tmp_path / "cache" / "runs").rglob("*.partial")
    journal = partial.with_suffix(".shards")
    kept = [json.loads(line) for line in journal.read_text().splitlines() if line]
    first = kept[0]["name"]
    (partial / first).write_bytes((partial / first).read_bytes()[:-1] + b"!")
    there = len(kept) - 1

    again = job("run", described)

    assert again.returncode == 0, again.stderr
    assert (f"{there} of 5 shards are here already, verified" in again.stderr) is (there > 0)
    whole = manifest.of(tmp_path / "run" / "merged")
    shutil.rmtree(tmp_path / "run" / "merged")
    assert job("run", described).returncode == 0
    assert dict(manifest.of(tmp_path / "run" / "merged").files.items()) == whole.files
