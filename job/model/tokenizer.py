"""The tokenizer of a base model, with the template by which conversations become text."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from job import errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPOKEN = "chat_template.jinja"
_TEMPLATE = "chat_template.json"  # where older bases that see images keep theirs
_SETTINGS = "tokenizer_config.json"
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
"""Of which a tokenizer has one."""
_MARK = "\ue000"  # stands in no template
IGNORED = -100  # the label of a token without loss, by PyTorch's convention

_HEADINGS = {"instruction-en": ("Instruction", "Input", "Response"), "instruction-zh": ("指令", "输入", "回答")}
_TURNS = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '### QUESTION\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### ANSWER\\n' + message['content'] + eos_token + ('' if loop.last else '\\n\\n') }}
{%- else -%}{{ raise_exception('an instruction template has no place for the role ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### ANSWER\\n' }}{%- endif -%}"""


def home(adapter: Path, base: Path) -> Path:
    """Which of the two folders has the tokenizer that the adapter was trained with: its own, or else the base's."""
    return adapter if any((adapter / name).is_file() for name in FILES) else base


def trained_with(adapter: Path, base: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load what is in `home`, with the `template` of the adapter; raises what `load` does."""
    place = home(adapter, base)
    loaded = load(place, trust_remote_code=trust_remote_code)
    if place == base != adapter and (told := template(adapter)):
        loaded.chat_template = told
    return loaded


def template(folder: Path) -> str | None:
    """The chat template in the folder, whether or not there is a tokenizer; None if there is none."""
    if (folder / _SPOKEN).is_file():
        return (folder / _SPOKEN).read_text(encoding="utf-8")
    apart, inside = folder / _TEMPLATE, folder / _SETTINGS
    if apart.is_file():
        return _inside(apart)
    return _inside(inside) if inside.is_file() and _settings(inside).get("chat_template") else None


def pad(tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Have it fill up short sequences, which nothing looks at, with one of the tokens that there are `rows` for.

    Many (Llama's) have no token for it, and some have one behind the last row of the embedding.
    """
    if tokenizer.pad_token_id is None or int(tokenizer.pad_token_id) >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def load(base: Path, template: str = "auto", *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in the folder `base` and give it the chat template that `data.template` asks for.

    An instruction template is a chat template like any other: saved with the model, and used to talk to it.
    Raises `errors.ModelError` if it cannot be loaded or lacks what training needs.
    """
    loaded = _read(base, trust_remote_code=trust_remote_code)
    if not loaded.is_fast:
        raise errors.ModelError(
            f"model.base: {base} has no fast tokenizer (tokenizer.json), which is needed to find the trained tokens"
        )
    if loaded.eos_token is None:
        raise errors.ModelError(
            f"model.base: the tokenizer in {base} has no eos_token: the model could not learn to stop"
        )
    apart = base / _TEMPLATE
    if not loaded.chat_template and apart.is_file():
        loaded.chat_template = _inside(apart)
    _choose(loaded, template, base)
    return loaded


def count(base: Path, *, trust_remote_code: bool = False) -> int:
    """How many tokens the tokenizer in the folder `base` has, of which nothing else is asked."""
    return len(_read(base, trust_remote_code=trust_remote_code))


def rows(base: Path, *, trust_remote_code: bool = False) -> int:
    """How many tokens the model in the folder `base` has an embedding for, by its config.json."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as e:
        raise errors.ModelError(f"model.base: the model in {base} cannot be loaded: {e}") from e
    return int(getattr(found.get_text_config(), "vocab_size", None) or sys.maxsize)


def _read(base: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # late: a start that finds its data prepared needs none

    try:
        return cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True),
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as e:
        raise errors.ModelError(f"model.base: the tokenizer in {base} cannot be loaded: {e}") from e


def _settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise errors.ModelError(f"{file} cannot be read ({type(e).__name__}: {e}): bring it again") from e


def _inside(file: Path) -> str:
    """The template in a file of JSON; of several the one that is called default."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(told, list):
            told = {each["name"]: each["template"] for each in told}
        return str(told["default"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError) as e:
        raise errors.ModelError(f"model.base: {file} holds no chat template ({type(e).__name__}: {e})") from e


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether it begins every text with a token of its own."""
    ids = tokenizer("a")["input_ids"]
    return bool(tokenizer.bos_token) and ids[:1] == [tokenizer.bos_token_id]


def wants_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether its template writes what a message says only if that is a list of parts, as of some that see images."""

    def writes(question: object, answer: object) -> bool:
        turns: Any = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            return _MARK in str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # noqa: BLE001 - templates fail in many ways
            return False

    return not writes("?", _MARK) and writes(in_parts("?"), in_parts(_MARK))


def in_parts(text: str) -> list[dict[str, str]]:
    """What a message says, as such templates want it."""
    return [{"type": "text", "text": text}] if text else []


def input_heading(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What stands between an instruction and its input with this tokenizer's template."""
    for name, (_, extra, _) in _HEADINGS.items():
        if tokenizer.chat_template == _instruction(tokenizer, name):
            return f"\n\n### {extra}\n"
    return "\n\n"


def _choose(tokenizer: "PreTrainedTokenizerBase", template: str, base: Path) -> None:
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "instruction-en"
    if template != "chat":
        tokenizer.chat_template = _instruction(tokenizer, template)
    elif not tokenizer.chat_template:
        raise errors.ModelError(
            f"data.template is chat, but the tokenizer in {base} has no chat template: use instruction-en "
            "or instruction-zh"
        )


def _instruction(tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    question, _, answer = _HEADINGS[name]
    return ("{{- bos_token -}}" if adds_bos(tokenizer) else "") + _TURNS.replace("QUESTION", question).replace(
        "ANSWER", answer
    )
