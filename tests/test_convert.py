"""Old bases: Qwen v1 and ChatGLM3 become what transformers loads, and compute the same; pickles are never run."""

import json
import os
import pickle
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jinja2
import originals
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import config, convert, errors, manifest, paths, pull
from job.inputs import Base
from job.model import files

Logits = Callable[[torch.Tensor], torch.Tensor]
FAMILIES = {"qwen": originals.qwen, "chatglm": originals.chatglm}
IDS = torch.arange(60) * 7 % 300


@pytest.fixture
def cache(tmp_path: Path) -> paths.Cache:
    return paths.Cache(tmp_path / "cache", "run")


def converted(folder: Path, cache: paths.Cache, fingerprint: str = "any") -> Path:
    """What the base in `folder` becomes."""
    base = Base(folder.as_uri(), folder, manifest.of(folder).digest, fingerprint)
    with ExitStack() as keep:
        return convert.native(base, cache, keep).path


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_base_computes_what_the_original_does(
    family: str,
    pickled: bool,  # noqa: FBT001 - of pytest
    cache: paths.Cache,
    tmp_path: Path,
) -> None:
    """In float32 up to the rounding of another order of summation; a swapped weight would change the first digit."""
    logits = FAMILIES[family](tmp_path / "base", pickled=pickled)

    made = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "base", cache), dtype=torch.float32)

    with torch.no_grad():
        torch.testing.assert_close(made(IDS[None]).logits[0], logits(IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", originals.HARD, ids=lambda text: repr(text[:20]))
def test_qwens_tokens_are_those_of_tiktoken(text: str, qwen_words: tuple[Path, Path]) -> None:
    """Of text in many scripts, code, emoji, digits and white space, also of what looks like a special token."""
    folder, made = qwen_words
    text = f"{text}<|im_start|>{text}<|extra_7|>"

    ids = AutoTokenizer.from_pretrained(made)(text, add_special_tokens=False)["input_ids"]

    assert ids == originals.qwen_ids(folder)(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("text", originals.HARD, ids=lambda text: repr(text[:20]))
def test_chatglms_tokens_are_those_of_sentencepiece(text: str, chatglm_words: tuple[Path, Path]) -> None:
    """Also where a word holds the name of a token: the original's "sop" is no token inside of "philosophy"."""
    folder, made = chatglm_words
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(made)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids == original.encode(text)
    assert tokenizer.decode(ids) == original.decode(ids)


@pytest.mark.slow
@pytest.mark.every_commit
def test_tokens_of_a_vocabulary_of_49152_are_those_of_tiktoken(smol_model: Path) -> None:
    """With the merges of a real model, on files of real code and prose."""
    import tiktoken

    from job.model.legacy import vocabulary
    from job.model.legacy.qwen import _PATTERN, _SPECIAL

    spelled = {character: byte for byte, character in vocabulary.bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in json.loads((smol_model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]:
        ranks.setdefault(bytes(spelled[character] for character in left + right), len(ranks))
    special = {token: number for number, token in enumerate(_SPECIAL, start=len(ranks))}
    original = tiktoken.Encoding("real", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    made = vocabulary.byte_level(ranks, _SPECIAL, _PATTERN)

    for path in [*Path(torch.__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("**/*.md")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert made.encode(text).ids == original.encode(text, allowed_special="all", disallowed_special=()), path


def test_qwens_chat_is_chatml(qwen_words: tuple[Path, Path]) -> None:
    """Token for token what the original's own code put together, piece by piece, for the same conversation."""
    folder, made = qwen_words
    encode = originals.qwen_ids(folder)
    begin, end, line = encode("<|im_start|>"), encode("<|im_end|>"), encode("\n")
    turns = [
        ("system", "You are a helpful assistant."),
        ("user", "你好"),
        ("assistant", "Hi  there!\n"),
        ("user", "1+1?"),
    ]
    expected = [
        token
        for role, content in turns
        for token in [*begin, *encode(role), *line, *encode(content), *end, *line]
    ] + [*begin, *encode("assistant"), *line]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(made)

    messages = [{"role": role, "content": content} for role, content in turns[1:]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert ids == expected
    assert tokenizer.eos_token == "<|im_end|>"


def test_chatglm3s_chat_is_its_own(chatglm_words: tuple[Path, Path]) -> None:
    """Token for token: there every message is encoded by itself, so that SentencePiece begins it with a space."""
    folder, made = chatglm_words
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    token = {name: plain.vocab_size() + place for place, name in enumerate(
        ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    )}  # fmt: skip
    turns = [("system", "Be brief."), ("user", "你好"), ("assistant", " Hi!"), ("user", "a\nb")]
    expected = [token["[gMASK]"], token["sop"]]
    for role, content in turns:
        expected += [token[f"<|{role}|>"], *plain.encode("\n"), *plain.encode(content)]
    expected.append(token["<|assistant|>"])
    tokenizer = AutoTokenizer.from_pretrained(made)

    messages = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert ids == expected
    stops = json.loads((made / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert stops == [plain.eos_id(), token["<|user|>"], token["<|observation|>"]]


def test_a_base_that_was_not_trained_to_chat_gets_no_chat_template(cache: paths.Cache, tmp_path: Path) -> None:
    """Qwen's base models do not know ChatML's tokens; they stop at the end of a text."""
    originals.qwen(tmp_path / "base", chat_format="raw")

    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "base", cache))

    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == "<|endoftext|>"


def test_weights_in_pickled_files_become_safetensors(tiny_model: Path, cache: paths.Cache, tmp_path: Path) -> None:
    """Of any family, with its tokenizer and config as they are; in shards, so that no more than one is in memory."""
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_model / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")

    made = converted(base, cache)

    assert {name: tensor.tolist() for name, tensor in files.tensors(made)} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    assert not list(made.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(made).chat_template


def test_shards_are_no_larger_than_they_may_be(tmp_path: Path) -> None:
    """And the index says where each weight is."""
    weights = {f"w{number}": torch.full((10, 10), float(number)) for number in range(7)}

    files.write(iter(weights.items()), tmp_path, limit=900)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 7 * 400
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    for name, shard in index["weight_map"].items():
        assert load_file(tmp_path / shard)[name].equal(weights[name])


class _Trap:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._path,)


@pytest.mark.parametrize(
    "content",
    [
        lambda trap: pickle.dumps({"model.embed_tokens.weight": _Trap(trap)}, protocol=2),
        lambda _: b"PK\x03\x04 half a file",
        lambda _: b"",
        lambda _: b"\x80\x02",
    ],
    ids=["code", "broken", "empty", "cut"],
)
def test_a_pickle_that_is_more_than_weights_is_refused(
    content: Callable[[str], bytes], tiny_model: Path, cache: paths.Cache, tmp_path: Path
) -> None:
    """Nothing of it is run, and nothing is left in the cache."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (base / "pytorch_model.bin").write_bytes(content(str(tmp_path / "trap")))

    with pytest.raises(errors.ModelError, match=r"pytorch_model\.bin is broken, or holds something other than weights"):
        converted(base, cache)

    assert not (tmp_path / "trap").exists()
    assert not any(map(manifest.sealed, cache.conversions("any")))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.update({"transformer.h.0.attn.extra": torch.ones(1)}), "the weight transformer.h.0.attn.extra"),
        (lambda w: w.update({"visual.proj": torch.ones(1)}), "holds the weight visual.proj"),
        (lambda w: w.pop("transformer.h.1.mlp.w2.weight"), "1.mlp.gate_proj.weight would be 40x64, and is missing"),
        (lambda w: w.update({"transformer.ln_f.weight": torch.ones(3)}), "model.norm.weight would be 64, and is 3"),
        (lambda w: w.update({"transformer.h.2.ln_1.weight": torch.ones(64)}), "norm.weight would be missing"),
    ],
    ids=["unknown", "of another model", "missing", "of another shape", "too many layers"],
)  # fmt: skip
def test_weights_that_do_not_fit_the_config_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], told: str, cache: paths.Cache, tmp_path: Path
) -> None:
    """The library would fill in random numbers, and say so in a log."""
    base = tmp_path / "base"
    originals.qwen(base)
    weights = dict(files.tensors(base))
    change(weights)
    for path in base.glob("*.safetensors"):
        path.unlink()
    save_file(weights, base / "model.safetensors")

    with pytest.raises(errors.ModelError, match=told):
        converted(base, cache)

    assert not any(map(manifest.sealed, cache.conversions("any")))


def test_what_chatglm2_computes_otherwise_is_refused(cache: paths.Cache, tmp_path: Path) -> None:
    """Its positions are divided by rope_ratio, where ChatGLM3 multiplies the base of the rotary embedding."""
    base = tmp_path / "base"
    originals.chatglm(base)
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(described | {"rope_ratio": 16}), encoding="utf-8")
    made = json.loads((converted(base, cache) / "config.json").read_text(encoding="utf-8"))
    assert made["rope_theta"] == 160000.0

    (base / "tokenization_chatglm.py").write_text("# without roles", encoding="utf-8")
    with pytest.raises(errors.ModelError, match="ChatGLM2 stretches its positions"):
        converted(base, cache, fingerprint="other")


@pytest.mark.parametrize("family", ["qwen", "chatglm"])
def test_answers_of_tools_are_no_plain_text(
    family: str, qwen_words: tuple[Path, Path], chatglm_words: tuple[Path, Path]
) -> None:
    """ChatGLM3 has a token for them; Qwen of 2023 knows none."""
    tokenizer = AutoTokenizer.from_pretrained({"qwen": qwen_words, "chatglm": chatglm_words}[family][1])
    messages = [{"role": "user", "content": "?"}, {"role": "tool", "content": "20 C"}]

    if family == "chatglm":
        assert "<|observation|>\n 20 C" in tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        with pytest.raises(jinja2.TemplateError, match="does not know the role tool"):
            tokenizer.apply_chat_template(messages, tokenize=False)


def test_an_adapter_beside_pickled_weights_is_no_base(tiny_model: Path, cache: paths.Cache, tmp_path: Path) -> None:
    """Its file is of the kind that is looked for, and not what is looked for."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    torch.save(load_file(tiny_model / "model.safetensors"), base / "pytorch_model.bin")
    save_file({"lora_A": torch.ones(1)}, base / "adapter_model.safetensors")

    assert {name for name, _ in files.tensors(converted(base, cache))} == set(
        load_file(tiny_model / "model.safetensors")
    )


def test_a_vocabulary_that_is_not_whole_is_refused(cache: paths.Cache, tmp_path: Path) -> None:
    """As after a download that was cut off."""
    base = tmp_path / "base"
    originals.qwen(base)
    path = base / "qwen.tiktoken"
    path.write_bytes(path.read_bytes()[:2000])

    with pytest.raises(errors.ModelError, match=r"the tokenizer of .* cannot be converted: qwen\.tiktoken"):
        converted(base, cache)


def test_a_base_is_converted_once_and_again_when_it_changes(
    cache: paths.Cache, tmp_path: Path, said: Callable[[], str]
) -> None:
    """The cache keeps the result for the next start; another base at the same URL is converted to another place.

    So a job that still uses the first one goes on with it.
    """
    base = tmp_path / "base"
    originals.qwen(base)
    first = manifest.of(converted(base, cache))
    (place,) = cache.conversions("any")
    converted(base, cache)
    weights = {name: tensor * 2 for name, tensor in files.tensors(base)}
    for path in base.glob("*.safetensors"):
        path.unlink()
    save_file(weights, base / "model.safetensors")

    second = manifest.of(converted(base, cache, fingerprint="other"))

    assert said().count("is converted already") == 1
    assert said().count("converting it to qwen2") == 2
    assert first.digest != second.digest
    assert manifest.of(place) == first


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"model_type": "qwen", "visual": {}}, "Qwen-VL of 2023"),
        ({"model_type": "qwen", "no_bias": False}, "it has biases"),
        ({"model_type": "qwen", "seq_length": None}, "lacks seq_length, which every Qwen"),
        ({"model_type": "qwen", "intermediate_size": None}, "lacks intermediate_size, which every Qwen"),
        ({"model_type": "qwen", "seq_length": []}, "cannot be converted: int"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "the first one, is another architecture"),
        ({"model_type": "chatglm", "multi_query_attention": False}, "multi_query_attention is False, and True in"),
        ({"model_type": "chatglm", "pre_seq_len": 128}, "a prefix of P-tuning"),
    ],
)  # fmt: skip
def test_relatives_that_are_something_else_are_refused_before_they_are_fetched(
    told: dict[str, object], why: str, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """Their config.json says so; what would come out of them would look like a model."""
    base = tmp_path / "base"
    FAMILIES[str(told["model_type"])](base)
    path = base / "config.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | told
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}), encoding="utf-8")

    with pytest.raises(errors.ModelError, match=why):
        pull.survey(config.read(tiny_run(model={"base": str(base)})))


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_longer_than_the_context_are_refused_at_once(
    family: str, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """Beyond it Qwen v1 computes something else than Qwen2, and no model was trained there."""
    base = tmp_path / "base"
    FAMILIES[family](base)
    settings = config.read(tiny_run(model={"base": str(base)}, data={"max_length": 257}))

    with pytest.raises(errors.ConfigError, match="max_length 257 is more than the 256 tokens"):
        pull.survey(settings)


@pytest.fixture(scope="module")
def qwen_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen v1, and what it becomes."""
    return _words(tmp_path_factory.mktemp("qwen"), originals.qwen)


@pytest.fixture(scope="module")
def chatglm_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same for ChatGLM3."""
    return _words(tmp_path_factory.mktemp("chatglm"), originals.chatglm)


def _words(folder: Path, family: Callable[[Path], Logits]) -> tuple[Path, Path]:
    family(folder / "base")
    return folder / "base", converted(folder / "base", paths.Cache(folder / "cache", "run"))
