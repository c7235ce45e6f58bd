"""The questions about each model: where it is, how it is loaded, and what is asked of it."""

import functools
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from job import cluster, config, log
from job.card import CALLED
from job.examine import judge
from job.examine.devices import FORMATS, Machine, Placement, Work
from job.examine.examples import add_pixels, shorten
from job.examine.inquiry import NO_MEMORY, Inquiry
from job.examine.look import Models
from job.examine.runner import Program
from job.examine.sizes import Sizes
from job.model import saved, tokenizer, weights
from job.model.shard import Shard
from job.model.tokenizer import IGNORED

_POSITIONS = 64  # at which logits are compared
_SHARE = 0.1  # of the time for reading examples; the rest is for loading and for answers
_FLOAT32 = 4  # bytes
_FEW = 2  # examples, where a comparison in bfloat16 is repeated in float32


@dataclass
class Questions:
    """Everything that is known before a model is loaded."""

    models: Models
    settings: config.Config | config.Merging
    scratch: Path
    split: str
    """What the examples are, for the report."""
    names: list[str]
    """Of the models that are asked about first."""
    like: str
    """The model that the merged one should compute the same as."""
    machine: Machine
    sizes: Sizes
    choices: dict[str, list[Placement]]
    examples: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    tuned: str = "merged"
    """The model that answers as the tuned one."""

    @classmethod
    def about(
        cls, models: Models, settings: config.Config | config.Merging, held: Mapping[str, Any] | None,
        gpus: tuple[str, ...], scratch: Path,
    ) -> "Questions":  # fmt: skip
        """Choose models, placements and examples for this machine as it is now."""
        adapted = _with_adapter(models.base, settings.model)
        like = "trained" if settings.merge.base == "dequantized" else "adapted"
        first = ["merged"] if models.merged else []
        names = [*first, *sorted(adapted, key=lambda name: name != like)]
        kept = held["examples"] if held else []
        prompts = [each for each in kept if each["asked"]][: settings.examine.prompts]
        machine = _machine(gpus)
        work = _work(kept, prompts, settings, models.adapter)
        sizes = Sizes(models.base, settings.model)
        choices = sizes.choose(names, machine, work)
        made = cls(
            models,
            settings,
            scratch,
            held["split"] if held else "some text",
            names,
            like,
            machine,
            sizes,
            choices,
        )
        made.tuned = made._choose_tuned()
        made.examples, made.prompts = list(made._read(kept)), prompts
        shown = [each for each in (*made.examples, *prompts) if "images" in each]
        if shown:
            add_pixels(shown, models, settings, scratch)
        return made

    def inquiry(self, program: Program) -> Inquiry:
        """Begin to ask: from now on the time counts."""
        pair = {"merged", self.like} & self.choices.keys()
        # A quantized model goes where there is room for it, others to the same place.
        alike = len(pair) > 1 and self.like != "trained"
        minutes = self.settings.examine.minutes
        reserve = self._reserve_seconds() if len(pair) > 1 else 0.0
        for name in self.names:
            if self.choices[name]:
                log.event(
                    "examine.begin",
                    f"verification: {CALLED[name]} on {self.choices[name][0]}",
                )
        return Inquiry(
            program=program,
            scratch=self.scratch,
            minutes=minutes,
            ends=time.monotonic() + minutes * 60 - reserve,
            reserve=reserve,
            choices=self.choices,
            together=frozenset(pair if alike else ()),
            nowhere=self.sizes.unknown or NO_MEMORY,
        )

    def _reserve_seconds(self) -> float:
        """Return one model's share of the time if questions may follow the first answers.

        These are the comparison in float32 and the merge into the other base.
        """
        exact = self._exact_choices(self.choices)
        coarse = any(self.choices[name][0].dtype != FORMATS[0] for name in exact if self.choices[name])
        if "trained" in self.names or (coarse and all(exact.values())):
            return self.settings.examine.minutes * 60 / (len(self.names) + 1)
        return 0.0

    def question(self, name: str, placement: Placement) -> dict[str, Any]:
        """Return what is asked about the model of that name, as `plain` takes it."""
        model, folder = self.settings.model, self._folder(name)
        answers, tokens, prompts = self._answers(name)
        return {
            "name": name,
            "path": str(folder or self.models.base),
            "adapter": None if folder else str(self.models.adapter),
            **self._words(folder),
            "check_words": name in ("merged", self.like),
            "quantized": self.sizes.describe_quantization(name, placement.dtype),
            "device_map": dict(placement.device_map),
            "dtype": placement.dtype,
            "positions": _POSITIONS,
            "chunk": placement.positions,
            "batch": placement.batch,
            "before": self._reads_before(name),
            "answers": answers,
            "tokens": tokens,
            "prompts": [{"ids": each["ids"][: each["asked"]], "seen": each.get("seen")} for each in prompts],
            "trust_remote_code": model.trust_remote_code,
            "logits": str(self.scratch / f"{name}.safetensors"),
        }

    def standard(self, inquiry: Inquiry) -> judge.Standard:
        """Return what the merged model is held against, in the coarser of both formats."""
        used = [inquiry.placement(name) for name in ("merged", self.like)]
        formats = {each.dtype for each in used if each}
        numbers = next((each for each in reversed(FORMATS) if each in formats), FORMATS[0])
        if self.like == "trained" and self.settings.model.quantization == "int8":
            numbers = "int8"
        return judge.Standard(
            self.like,
            numbers,
            short=self._is_short(),
            answered_by=(self._reference, self.tuned),
        )

    def compare_bases(self, inquiry: Inquiry) -> dict[str, str]:
        """Ask about the merge into the other base, and return why it was left out, if it was.

        Its folder is as large as the merged model, so it is made when that one has passed, and
        removed at once.
        """
        if not self.examples or not {"trained", "merged"} <= inquiry.found.keys():
            return {}
        if time.monotonic() > inquiry.ends - self.settings.examine.minutes * 60 * _SHARE:
            return self._leave_other("there was no time left to make it")
        begun = time.monotonic()
        folder = self.models.other()
        inquiry.extend(time.monotonic() - begun)  # examine.minutes are for verification only
        if not folder:
            return self._leave_other("there is no room for it on the disk")
        try:
            placement = inquiry.placement("merged")
            inquiry.choices["other"] = [placement] if placement else []
            inquiry.ask(
                ["other"],
                lambda name, where: self.question(name, where) | {"path": str(folder)},
                self.plain_examples(),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {}

    def compare_in_float32(self, inquiry: Inquiry, order: Sequence[int]) -> tuple[Inquiry, str]:
        """Ask about both models that are compared again, in float32 and about few examples.

        `order` are the numbers of the examples, those first on which the models differ most. Return
        what was found, and why not both were compared, if so.
        """
        folder = self.scratch / FORMATS[0]
        folder.mkdir()
        choices = self._exact_choices(inquiry.choices)
        again = replace(
            inquiry, scratch=folder, choices=choices, found={}, left={}, fallbacks=[],
            left_out=f"not compared in {FORMATS[0]}",
        )  # fmt: skip
        if not all(choices.values()):
            return again, "this machine has no memory to compare in float32"
        examples = self.plain_examples()
        few = [shorten(examples[number], _POSITIONS // _FEW) for number in order[:_FEW] if examples]
        seconds = sum(self._reading_seconds(choices, name, each) for name in choices for each in few)
        if time.monotonic() + seconds > again.ends:
            return again, "examine.minutes leave no time to compare in float32"
        log.event(
            "examine.float32",
            f"verification: bfloat16 is too coarse to compare {CALLED['merged']} with "
            f"{CALLED[self.like]}; comparing both again in float32",
        )
        again.ask(choices, functools.partial(self._brief_question, folder), few)
        faults = again.left | judge.find_faults(again.found)
        reasons = "; ".join(f"{CALLED[name]}: {why}" for name, why in faults.items())
        return again, reasons and f"the comparison in float32 failed ({reasons})"

    def _exact_choices(self, choices: Mapping[str, list[Placement]]) -> dict[str, list[Placement]]:
        """Return where the models that are compared may be in float32."""
        return {
            name: [each for each in choices.get(name, ()) if each.dtype == FORMATS[0]] for name in ("merged", self.like)
        }

    def _brief_question(self, folder: Path, name: str, placement: Placement) -> dict[str, Any]:
        """Return what is asked about a model that is only to be compared."""
        return self.question(name, placement) | {
            "before": name == self.like,
            "answers": [],
            "prompts": [],
            "logits": str(folder / f"{name}.safetensors"),
        }

    def left(self) -> dict[str, str]:
        """Return which models nobody is asked about, and why."""
        if not self.models.merged or "adapted" in self.names:
            return {}
        why = "the base comes quantized, and transformers alone cannot load it with an adapter"
        log.warn("examine.left", f"{CALLED['adapted']}: not verified: {why}")
        return {"adapted": why}

    def facts(self, inquiry: Inquiry) -> dict[str, Any]:
        """Return for the report which models were on which devices, and which merge is which."""
        other = "original" if self.settings.merge.base == "dequantized" else "dequantized"
        told: dict[str, Any] = {
            "on_devices": {name: str(inquiry.choices[name][0]) for name in inquiry.found},
        }
        if "other" in inquiry.found:
            told["bases"] = {"merged": self.settings.merge.base, "other": other}
        return told

    def _folder(self, name: str) -> Path | None:
        """The folder of a whole model; None of one that is the base with the adapter."""
        return self.models.merged if name in ("merged", "other") else None

    @property
    def _reference(self) -> str:
        """The model whose losses and answers stand for the adapter."""
        return "trained" if self.choices.get("trained") else "adapted"

    def _choose_tuned(self) -> str:
        """Return which model answers as the tuned one: the reference if only that is fast."""
        merged, reference = self.choices.get("merged"), self.choices.get(self._reference)
        if not merged:
            return self._reference
        slow = reference and reference[0].fast and not merged[0].fast
        return self._reference if slow else "merged"

    def _answers(self, name: str) -> tuple[list[str], int, list[dict[str, Any]]]:
        """Return which answers are asked of a model, how long, and to which prompts."""
        tokens = self.settings.examine.tokens
        before = ["before"] if name == self._reference else []
        if name == self.tuned:
            return ["after", *before], tokens, self.prompts
        if name == "merged":  # that it writes at all is part of the verification
            return ["after"], 1, self.prompts[:1]
        return before, tokens, self.prompts if before else []

    def _read(self, kept: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield as many examples as the slowest of the models has time to read, and at least one."""
        names = [name for name in self.names if self.choices[name]]
        if not names:
            return
        share = self.settings.examine.minutes * 60 * _SHARE / (len(self.names) + 1)
        spent = 0.0
        for number, each in enumerate(kept):
            spent += max(self._reading_seconds(self.choices, name, each) for name in names)
            if number and spent > share:
                log.event(
                    "examine.read",
                    f"verification: there is time to read {number} of {len(kept)} examples",
                )
                return
            yield each

    def _reading_seconds(self, choices: Mapping[str, list[Placement]], name: str, example: Mapping[str, Any]) -> float:
        """Return about how long a model takes to read an example, with and without the adapter."""
        placement = choices[name][0]
        size = self.sizes.outline(None, FORMATS[0])[1]
        trained = sum(label != IGNORED for label in example["labels"])
        once = placement.seconds(size, len(example["ids"]), trained, self.machine)
        return once * (2 if self._reads_before(name) else 1)

    def _reads_before(self, name: str) -> bool:
        """Return whether the loss of a model is measured with the adapter switched off, too."""
        return not self._folder(name) and name in (self.like, self._reference)

    def plain_examples(self) -> list[dict[str, Any]]:
        """Return of the examples what a model gets, and what it should answer."""
        return [{key: each.get(key) for key in ("ids", "labels", "seen")} for each in self.examples]

    def _words(self, folder: Path | None) -> dict[str, str | None]:
        """Return where the tokenizer is, and its template if it lies apart."""
        home = folder or tokenizer.home(self.models.adapter, self.models.base)
        apart = tokenizer.template(self.models.adapter) if home == self.models.base else None
        return {"words": str(home), "template": apart}

    def _is_short(self) -> bool:
        """Whether the base's embedding has fewer rows than the tokenizer has tokens."""
        trusted = self.settings.model.trust_remote_code
        described, _ = weights.describe(self.models.base, self.settings.model)
        home = tokenizer.home(self.models.adapter, self.models.base)
        rows = getattr(described.get_text_config(), "vocab_size", None)
        return rows is not None and tokenizer.count(home, trust_remote_code=trusted) > rows

    def _leave_other(self, why: str) -> dict[str, str]:
        log.warn("examine.left", f"{CALLED['other']}: not verified: {why}")
        return {"other": why}


def _machine(gpus: tuple[str, ...]) -> Machine:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # which the merge may have filled
    free = cluster.free_gpu_memory(gpus)
    return Machine(free or (), cluster.free_memory(), cluster.cpus())


def _work(
    kept: Sequence[Mapping[str, Any]], prompts: Sequence[Mapping[str, Any]],
    settings: config.Config | config.Merging, adapter: Path,
) -> Work:  # fmt: skip
    longest = max((len(each["ids"]) for each in kept), default=_POSITIONS)
    asked = max((each["asked"] for each in prompts), default=0) + settings.examine.tokens
    file = adapter / saved.FILE
    numbers = 0
    if file.is_file():
        numbers = sum(math.prod(each.shape) for each in Shard(file).tensors.values())
    return Work(longest, len(prompts), asked, numbers * _FLOAT32)


def _with_adapter(base: Path, model: config.Model) -> list[str]:
    """Return on which bases the adapter can be opened: none if the base comes quantized."""
    told = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if told.get("quantization_config"):
        return []
    return ["adapted"] if model.quantization == "none" else ["adapted", "trained"]
