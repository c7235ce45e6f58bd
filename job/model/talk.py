"""A model that answers: a base, with one of several adapters switched on or none, or a merged model."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)  # fmt: skip

from job import config, errors
from job.config import Sampling
from job.model import adapted, tokenizer, weights

Message: TypeAlias = Mapping[str, Any]
Network: TypeAlias = Any  # each family has a class of its own
_LONGEST = 1 << 30  # tokens of context, where nobody says
_MARGIN = 8  # tokens: the end of an answer is decoded with some that come before it


@dataclass(frozen=True)
class Answer:
    """What was said, how many tokens that took, and whether it came to its end."""

    text: str
    tokens: int
    ended: bool


class _Stops(StoppingCriteria):
    """Ends an answer in which one of the strings is; transformers' own looks into the prompt too."""

    def __init__(self, words: PreTrainedTokenizerBase, stops: Sequence[str], asked: int) -> None:
        self._words, self._stops, self._asked = words, stops, asked
        self._many = 4 * max(map(len, stops)) + _MARGIN  # tokens: a character may take up to four

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        ends = self._words.batch_decode(input_ids[:, self._asked :][:, -self._many :])
        return torch.tensor([any(stop in end for stop in self._stops) for end in ends], device=input_ids.device)


class _Told(StoppingCriteria):
    """Ends an answer that nobody wants to hear to its end."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


class Speaker:
    """The model in the folder `base`, held as `settings` say, and the `adapters` for it, by name; the first is on.

    Raises `errors.ModelError` if one of them cannot be loaded.
    """

    def __init__(self, base: Path, settings: config.Model, adapters: Mapping[str, Path]) -> None:
        self._base, self._settings, self._folders = base, settings, dict(adapters)
        self.adapters, self.adapter = list(adapters), next(iter(adapters), None)
        self._words = [self._read(folder) for folder in adapters.values() or (base,)]
        self._wants_parts = [tokenizer.wants_parts(words) for words in self._words]

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer and the template that the adapter was trained with; the base alone speaks like the first."""
        return self._words[self._place]

    @property
    def _place(self) -> int:
        return self.adapters.index(self.adapter) if self.adapter else 0

    def _read(self, folder: Path) -> PreTrainedTokenizerBase:
        trusted = self._settings.trust_remote_code
        words = tokenizer.trained_with(folder, self._base, trust_remote_code=trusted)
        tokenizer.pad(words, tokenizer.rows(self._base, trust_remote_code=trusted))
        words.padding_side = "left"
        return words

    @functools.cached_property
    def context(self) -> int:
        """How many tokens the model can read and write together."""
        described, _ = weights.describe(self._base, self._settings)
        return int(getattr(described.get_text_config(), "max_position_embeddings", None) or _LONGEST)

    @functools.cached_property
    def _network(self) -> Network:
        """Loaded when it is needed: what can be said without it, is said before."""
        network: Network = weights.for_answering(self._base, self._settings)
        if self._folders:
            network = adapted.load(network, self._folders)
        # How answers are drawn is told here alone: a base's own settings may cut them, or make them lists.
        told = network.generation_config
        kept = {name: getattr(told, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        network.generation_config = GenerationConfig(**kept)  # type: ignore[no-untyped-call]
        return network.eval()

    def load(self) -> None:
        """Load the model now, and not with the first question."""
        _ = self._network

    def use(self, name: str | None) -> None:
        """Answer with that adapter from now on; None: with the base alone."""
        if name is not None and name not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise errors.ConfigError(f"there is no adapter called {name}: there is {there}")
        self.adapter = name

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The tokens after which the model answers a conversation, with `tools` that it may call.

        Raises `ValueError` if the template has no place for those.
        """
        turns: Any = [dict(each) for each in messages]
        if self._wants_parts[self._place]:
            turns = [{**each, "content": tokenizer.in_parts(each["content"])} for each in turns]
        written = str(
            self.words.apply_chat_template(turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=True)
        )
        called = [*tools, *(call for each in messages for call in each.get("tool_calls") or ())]
        if lost := [each["function"]["name"] for each in called if each["function"]["name"] not in written]:
            raise ValueError(f"the chat template does not write the tool {lost[0]!r}: it has no place for tools")
        return list(self.words(written, add_special_tokens=False)["input_ids"])

    def text(self, text: str) -> list[int]:
        """The tokens of a text that is gone on with, which begins as in training."""
        begin = str(self.words.bos_token or "")
        if tokenizer.adds_bos(self.words) and not text.startswith(begin):
            text = begin + text
        return list(self.words(text, add_special_tokens=False)["input_ids"])

    def answers(self, prompts: Sequence[Sequence[int]], how: Sampling, seed: int) -> list[Answer]:
        """What it says after each of the `prompts`, in one batch, with the randomness of `seed`."""
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        padding = int(self.words.pad_token_id or 0)
        ids = torch.tensor([[padding] * (longest - len(each)) + list(each) for each in prompts])
        seen = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        with self._as_wanted(), torch.no_grad():
            made = self._network.generate(**self._given(ids, seen), **self._how(how, longest))
        return [self._answer(each[longest:].tolist(), how) for each in made]

    def stream(self, prompt: Sequence[int], how: Sampling, seed: int, stop: threading.Event) -> Iterator[str]:
        """What it says, word by word, until it ends or `stop` is set."""
        torch.manual_seed(seed)
        streamer = TextIteratorStreamer(self.words, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([list(prompt)])
        failed: list[BaseException] = []
        left = threading.Event()  # set when nobody listens any more

        def speak() -> None:
            try:
                with self._as_wanted(), torch.no_grad():
                    self._network.generate(
                        **self._given(ids, torch.ones_like(ids)),
                        **self._how(how, len(prompt), _Told(stop), _Told(left)),
                        streamer=streamer,
                    )
            except BaseException as e:  # noqa: BLE001 - raised again below
                failed.append(e)
            finally:
                streamer.end()  # type: ignore[no-untyped-call]

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        try:
            yield from _until(streamer, how.stop)
        finally:
            left.set()
            speaking.join()
        if failed:
            raise failed[0]

    def _as_wanted(self) -> contextlib.AbstractContextManager[Any]:
        if self.adapter is None and self.adapters:
            off: contextlib.AbstractContextManager[Any] = self._network.disable_adapter()
            return off
        if self.adapter is not None:
            self._network.set_adapter(adapted.called(self.adapter))
        return contextlib.nullcontext()

    def _given(self, ids: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        device, rows = self._network.device, self._network.get_input_embeddings().weight.shape[0]
        if (most := int(ids.max())) >= rows:
            raise errors.ModelError(
                f"the tokenizer makes token {most} ({self.words.convert_ids_to_tokens(most)}), and the model has "
                f"embeddings for {rows}: use the tokenizer that belongs to it"
            )
        return {"input_ids": ids.to(device), "attention_mask": seen.to(device)}

    def _how(self, how: Sampling, asked: int, *criteria: StoppingCriteria) -> dict[str, Any]:
        drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.temperature else {}
        likeliest = dict.fromkeys(("temperature", "top_p", "top_k"))
        stops = [_Stops(self.words, how.stop, asked)] if how.stop else []
        return {
            "do_sample": how.temperature > 0, **(drawn or likeliest), "repetition_penalty": how.repetition_penalty,
            "max_new_tokens": how.max_tokens, "pad_token_id": self.words.pad_token_id,
            "eos_token_id": self._ends(), "stopping_criteria": StoppingCriteriaList([*stops, *criteria]),
        }  # fmt: skip

    def _answer(self, ids: list[int], how: Sampling) -> Answer:
        ends, pad = self._ends(), self.words.pad_token_id
        said = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        ended = said < len(ids)
        while said and ids[said - 1] == pad:  # behind what ended at a string
            said -= 1
        whole = str(self.words.decode(ids[:said]))
        found = min((at for stop in how.stop if (at := whole.find(stop)) >= 0), default=None)
        text = str(self.words.decode(ids[:said], skip_special_tokens=True))
        cut = min((at for stop in how.stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None and cut is None:  # at a special token
            before = next(count for count in range(said, -1, -1) if len(self.words.decode(ids[:count])) <= found)
            text = str(self.words.decode(ids[:before], skip_special_tokens=True))
        return Answer(text[:cut], said, ended or found is not None)

    def _ends(self) -> list[int]:
        """The tokens at which an answer ends: the tokenizer's, and those that the base names."""
        told = self._network.generation_config.eos_token_id
        named = told if isinstance(told, list) else [told] if told is not None else []
        return sorted({int(self.words.eos_token_id or 0), *named})


def _until(parts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text that comes in `parts`, to before the first of the `stops`; what may become one is kept back."""
    kept, longest = "", max(map(len, stops), default=1)
    for part in parts:
        kept += part
        found = [at for stop in stops if (at := kept.find(stop)) >= 0]
        if found:
            yield kept[: min(found)]
            return
        ready = len(kept) - longest + 1
        if ready > 0:
            yield kept[:ready]
            kept = kept[ready:]
    yield kept
