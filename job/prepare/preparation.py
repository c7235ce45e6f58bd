"""One preparation under way: read, convert, render, tokenize, write, choose, and count."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from job import errors, log
from job.config import Config
from job.inputs import DataFile
from job.model import tokenizer
from job.prepare import formats, held, judge, pictures, records, select
from job.prepare.crew import Batch, Crew, Recipe, Rows
from job.prepare.formats import Example
from job.prepare.records import Record
from job.prepare.tally import SHOWN, Tally
from job.prepare.tokens import Row, marked
from job.prepare.turns import BadRecordError

_BATCH, _CHARACTERS = 1000, 2_000_000  # records tokenized at once, or fewer if they are so long
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS)])
_SEEN = pa.schema([*_SCHEMA, ("text", pa.string()), ("pictures", pa.list_(pa.large_binary()))])
_PAIRS = pa.schema([*_SCHEMA, ("rejected_input_ids", _TOKENS), ("rejected_labels", _TOKENS)])
_PART = 600  # characters of an example in a message


class Preparation:
    """Writes ``train.arrow``, perhaps ``eval.arrow``, and what is to be known of them into `target`."""

    def __init__(self, config: Config, recipe: Recipe, target: Path) -> None:
        self._data, self._seed, self._target = config.data, config.run.seed, target
        self._pairs = config.train.method == "dpo"
        self._blind = recipe.blind
        self._schema = _SEEN if not recipe.blind else _PAIRS if self._pairs else _SCHEMA
        self._renderer = recipe.renderer()
        self._words = self._renderer.tokenizer
        # Of bases that see images some (Mllama) have more rows than their config.json says, for what stands for those.
        trusted = recipe.trust_remote_code
        self._tokens = tokenizer.rows(recipe.base, trust_remote_code=trusted) if recipe.blind else sys.maxsize
        self._crew = Crew(self._renderer, recipe)
        self._sample, self._seen = "", False

    def run(self, train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> None:
        """Prepare both splits; raises `errors.DataError`."""
        halved = self._data.eval_fraction > 0
        tallies, marks = {}, {}
        with contextlib.closing(self._crew):
            tallies["train"], marks["train"] = self._split("train", train, kept=True if halved else None)
            if halved or evaluation:
                files, kept = (train, False) if halved else (evaluation, None)
                tallies["eval"], marks["eval"] = self._split("eval", files, kept=kept)
        if self._schema is _SEEN and not self._seen:
            for split in tallies:  # a base that sees images is trained on text like any other
                select.columns(self._target / f"{split}.arrow", _SCHEMA.names)
        if self._renderer.eos_added:
            log.warn(
                "prepare.eos",
                f"the chat template does not end the last answer: {self._words.eos_token!r} was added "
                f"to {self._renderer.eos_added} example(s)",
            )
        self._choose(tallies, marks, [file.weight for file in train])
        split = "eval" if "eval" in tallies else "train"
        held.out(self._target, split, tallies[split].examples, self._words, self._renderer.placeholder)
        if self._data.packing:
            self._pack(tallies["train"])
        counts = {
            split: {k: v for k, v in vars(tally).items() if k != "complaints"} for split, tally in tallies.items()
        }
        (self._target / "data.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
        (self._target / "sample.txt").write_text(self._sample, encoding="utf-8")
        log.event("prepare.sample", f"the first example, trained tokens between ⟦ and ⟧:\n{self._sample}")

    def _split(self, split: str, files: Sequence[DataFile], *, kept: bool | None = None) -> tuple[Tally, select.Marks]:
        """Write one split; with an eval fraction, the records whose draw is `kept`, or not, for training."""
        tally, marks = Tally(), select.Marks()
        path, schema = self._target / f"{split}.arrow", self._schema
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for number, file in enumerate(files):
                examples = self._examples(file, tally, kept)
                for batch, made in self._crew.rows(_batches(examples)):
                    rows = list(_good(batch, made, tally))
                    if rows:
                        self._check(rows)
                        writer.write_batch(pa.record_batch(_columns(rows, schema), schema=schema))
                    for row in rows:
                        marks.add(row, number)
                        self._seen |= bool(row.images)
                    if self._hopeless(tally):
                        break
                    if self._seen and self._data.packing:
                        raise errors.DataError(
                            "data.packing: the records have images, which are not packed: set it to false"
                        )
                    if rows and not self._sample:
                        self._sample = marked(self._words, rows[0])
        tally.measure(path)
        judge.split(split, tally, files, self._data)
        judge.share(split, tally, self._data, self._sample)
        return tally, marks

    def _choose(self, tallies: dict[str, Tally], marks: dict[str, select.Marks], weights: list[float]) -> None:
        """Leave out what is there twice or evaluated, if asked, and repeat examples as often as their sources want."""
        counts = {split: np.ones(len(each.hashes), dtype=np.int64) for split, each in marks.items()}
        for split, each in marks.items():
            repeated = each.repeated()
            tallies[split].repeated = int(repeated.sum())
            judge.repeated(split, tallies[split], self._data)
            if self._data.deduplicate:
                counts[split][repeated] = 0
        if "eval" in marks:
            leaked = marks["eval"].among(marks["train"])
            tallies["eval"].leaked = int(leaked.sum())
            example = [marked(self._words, row)[:_PART] for row in self._first(leaked)]
            judge.leaked(tallies["eval"], self._data, "\n".join(example))
            if self._data.leaks == "drop":
                counts["train"][marks["train"].among(marks["eval"])] = 0
        counts["train"] *= select.times(marks["train"], weights, self._seed)
        for split, often in counts.items():
            if (often != 1).any():
                path = self._target / f"{split}.arrow"
                select.keep(path, often)
                tallies[split].measure(path)
        judge.chosen(tallies["train"], weights)

    def _first(self, which: np.ndarray) -> list[Row]:
        return select.rows(self._target / "eval.arrow", which, 1) if which.any() else []

    def _pack(self, tally: Tally) -> None:
        from job.prepare import packing  # takes seconds to import

        tally.sequences = packing.pack(self._target / "train.arrow", self._data.max_length)
        full = tally.tokens / (tally.sequences * self._data.max_length)
        log.event(
            "prepare.packed",
            f"train: {tally.examples} examples were packed into {tally.sequences} sequences, {full:.0%} full",
            sequences=tally.sequences,
            full=full,
        )

    def _examples(self, file: DataFile, tally: Tally, kept: bool | None) -> Iterator[tuple[str, Example]]:  # noqa: FBT001 - private
        name, heading = self._format(file), tokenizer.input_heading(self._words)
        judge.method(file.url, name, pairs=self._pairs)
        tally.formats[file.url] = name
        for record in records.read(file.path, file.url):
            example, reason = self._converted(record, name, heading, file)
            if kept is not None and kept != self._draw(example or f"{file.sha256} {record.place}"):
                continue
            where = f"{file.url}:{record.place}"
            tally.records += 1
            if record.value is not None:
                tally.ignored_keys.update(sorted(formats.ignored(record.value, name)))
            if example:
                yield where, example
                continue
            tally.reject(where, reason)
            if self._hopeless(tally):
                return

    def _converted(self, record: Record, name: str, heading: str, file: DataFile) -> tuple[Example | None, str]:
        """What a record says, with the images that it names, or why it says nothing."""
        if record.value is None:
            return None, record.reason
        try:
            example = formats.convert(record.value, name, heading)
            if example.images and self._blind:
                return None, f"has images, and {self._blind}"
            if not self._blind:
                pictures.check(record.value, example)
            return pictures.opened(example, file), ""
        except BadRecordError as e:
            return None, str(e)

    def _format(self, file: DataFile) -> str:
        """What the config says, of this file or all, or what the keys of the first readable record say."""
        told = file.format or self._data.format
        if told != "auto":
            return told
        first = next((r for r in records.read(file.path, file.url) if r.value is not None), None)
        try:
            return formats.recognise(first.value) if first and first.value is not None else "unreadable"
        except BadRecordError as e:
            raise errors.DataError(f"{file.url}:{first.place if first else 0}: the first record {e}") from e

    def _check(self, rows: Sequence[Row]) -> None:
        """Raise `errors.ModelError` if there is a token that the model has no embedding for."""
        most = max(max(each.input_ids) for row in rows for each in (row, row.rejected) if each)
        if most >= self._tokens:
            raise errors.ModelError(
                f"model.base: its tokenizer makes token {most} ({self._words.convert_ids_to_tokens(most)}), and by "
                f"config.json it has embeddings for {self._tokens}: use the tokenizer that belongs to it, or a base "
                "that was saved after resize_token_embeddings"
            )

    def _hopeless(self, tally: Tally) -> bool:
        """Enough has been seen to know that the run will be refused: do not read on."""
        return tally.bad > SHOWN and not self._data.skip_bad_share

    def _draw(self, content: Example | str) -> bool:
        """Whether a record is for training: a function of the seed and what it says, so that equal ones stay together.

        Of one that says nothing, of its file's content and its place.
        """
        told = content if isinstance(content, str) else _told(content)
        drawn = hashlib.sha256(f"{self._seed} {told}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64 >= self._data.eval_fraction


def _good(batch: Batch, made: Rows, tally: Tally) -> Iterator[Row]:
    """The rows among what was made of a batch."""
    for (where, _), row in zip(batch, made, strict=True):
        if isinstance(row, BadRecordError):
            tally.reject(where, str(row))
        else:
            tally.truncated += row.truncated
            yield row


def _batches(examples: Iterator[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """The examples in batches that take a bounded memory while they are tokenized."""
    batch: list[tuple[str, Example]] = []
    size = 0
    for where, example in examples:
        batch.append((where, example))
        every = [*example.messages, *(example.rejected.messages if example.rejected else ())]
        size += len(example.text) + sum(len(message["content"]) for message in every)
        size += sum(len(image) for image in example.images)
        if len(batch) == _BATCH or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _told(example: Example) -> str:
    """What an example says, and shows, as text."""
    plain = dataclasses.asdict(dataclasses.replace(example, images=()))
    plain.pop("images")
    shown = [hashlib.sha256(image).hexdigest() for image in example.images if isinstance(image, bytes)]
    return json.dumps(plain | ({"images": shown} if shown else {}), sort_keys=True)


def _columns(rows: Sequence[Row], schema: pa.Schema) -> list[list[object]]:
    """The rows by columns: tokens and labels, and what else `schema` has."""
    rejected = [row.rejected for row in rows if row.rejected]
    columns: dict[str, list[object]] = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "rejected_input_ids": [row.input_ids for row in rejected],
        "rejected_labels": [row.labels for row in rejected],
        "text": [row.text for row in rows],
        "pictures": [list(row.images) for row in rows],
    }
    return [columns[name] for name in schema.names]
