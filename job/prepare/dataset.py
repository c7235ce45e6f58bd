"""The step itself: read, convert, render, tokenize, count, write; and complain once about all that is wrong."""

import hashlib
import importlib.metadata
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from job import errors, log, manifest, paths, storage
from job.config import Config
from job.inputs import Base, DataFile, Prepared
from job.manifest import Manifest
from job.model import tokenizer
from job.prepare import formats, records
from job.prepare.formats import Example
from job.prepare.tally import SHOWN, Tally
from job.prepare.tokens import Renderer, Row, marked
from job.prepare.turns import BadRecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000  # records tokenized at once
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), Path(tokenizer.__file__))


def dataset(
    config: Config,
    base: Base,
    train: Sequence[DataFile],
    evaluation: Sequence[DataFile],
    cache: paths.Cache,
    keep: ExitStack,
) -> Prepared:
    """Prepare both splits with the tokenizer of `base`; the result stays in the cache until `keep` is closed.

    Raises `errors.DataError` naming file, line and reason of each record that cannot be used.
    """
    _refuse_leak(train, evaluation)
    key = _key(config, base.digest, train, evaluation)
    target = cache.prepared(key)
    keep.enter_context(storage.used(target))
    with storage.alone(target) as place:
        there = place.sealed()
        if there:
            log.event("prepare.here", f"prepared data are here already ({_summary(target)})", digest=_digest(there))
            return Prepared(target, _digest(there))
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        words = tokenizer.load(base.path, config.data.template, trust_remote_code=config.model.trust_remote_code)
        _Preparation(config, words, partial).run(train, evaluation)
        whole = manifest.seal(partial)
        place.fill(partial)
    log.event(
        "prepare.done",
        f"prepared {_summary(target)}",
        digest=_digest(whole),
        **json.loads((target / "data.json").read_text(encoding="utf-8")),
    )
    return Prepared(target, _digest(whole))


class _Preparation:
    """One preparation under way."""

    def __init__(self, config: Config, words: "PreTrainedTokenizerBase", target: Path) -> None:
        self._config, self._data, self._words, self._target = config, config.data, words, target
        self._renderer = Renderer(words, config.data.max_length, config.data.loss_on)
        self._sample = ""

    def run(self, train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> None:
        if self._data.eval_fraction:
            tallies = {"train": self._split("train", train, kept=True), "eval": self._split("eval", train, kept=False)}
        else:
            tallies = {"train": self._split("train", train)} | (
                {"eval": self._split("eval", evaluation)} if evaluation else {}
            )
        if self._renderer.eos_added:
            log.warn(
                "prepare.eos",
                f"the chat template does not end the last answer: {self._words.eos_token!r} was added "
                f"to {self._renderer.eos_added} example(s)",
            )
        if self._data.packing:
            self._pack(tallies["train"])
        counts = {
            split: {k: v for k, v in vars(tally).items() if k != "complaints"} for split, tally in tallies.items()
        }
        (self._target / "data.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
        (self._target / "sample.txt").write_text(self._sample, encoding="utf-8")
        log.event("prepare.sample", f"the first example, trained tokens between ⟦ and ⟧:\n{self._sample}")

    def _split(self, split: str, files: Sequence[DataFile], *, kept: bool | None = None) -> Tally:
        """Write one split; with an eval fraction, the records whose draw is `kept`, or not, for training."""
        tally = Tally()
        path = self._target / f"{split}.arrow"
        examples = itertools.chain.from_iterable(self._examples(file, tally, kept) for file in files)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            while batch := list(itertools.islice(examples, _BATCH)):
                rows = list(self._rows(batch, tally))
                writer.write_batch(
                    pa.record_batch([[r.input_ids for r in rows], [r.labels for r in rows]], schema=_SCHEMA)
                )
                if rows and not self._sample:
                    self._sample = marked(self._words, rows[0])
        self._judge(split, tally, files)
        if tally.trained_tokens == tally.tokens and self._asks(tally):
            raise errors.DataError(
                f"{split}: every token would be learned, questions too, as in the first example:\n{self._sample}\n"
                "The chat template hides where answers begin: set data.template, or data.loss_on: all if it is meant"
            )
        return tally

    def _asks(self, tally: Tally) -> bool:
        """Whether the records hold questions, which are not to be learned."""
        return self._data.loss_on != "all" and set(tally.formats.values()) != {"text"}

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
        tally.formats[file.url] = name
        for record in records.read(file.path, file.url):
            if kept is not None and kept != self._draw(file.sha256, record.place):
                continue
            where = f"{file.url}:{record.place}"
            tally.records += 1
            try:
                if record.value is None:
                    raise BadRecordError(record.reason)  # noqa: TRY301 - one place counts bad records
                tally.ignored_keys.update(sorted(formats.ignored(record.value, name)))
                yield where, formats.convert(record.value, name, heading)
            except BadRecordError as e:
                tally.reject(where, str(e))
                if self._hopeless(tally):
                    return

    def _format(self, file: DataFile) -> str:
        """What the config says, or what the keys of the first readable record say."""
        if self._data.format != "auto":
            return self._data.format
        first = next((r for r in records.read(file.path, file.url) if r.value is not None), None)
        try:
            return formats.recognise(first.value) if first and first.value is not None else "unreadable"
        except BadRecordError as e:
            raise errors.DataError(f"{file.url}:{first.place if first else 0}: the first record {e}") from e

    def _rows(self, batch: Sequence[tuple[str, Example]], tally: Tally) -> Iterator[Row]:
        for (where, _), row in zip(batch, self._renderer.rows([example for _, example in batch]), strict=True):
            if isinstance(row, BadRecordError):
                tally.reject(where, str(row))
            else:
                tally.accept(row)
                yield row

    def _hopeless(self, tally: Tally) -> bool:
        """Enough has been seen to know that the run will be refused: do not read on."""
        return tally.bad > SHOWN and not self._data.skip_bad_share

    def _draw(self, digest: str, place: int) -> bool:
        """Whether a record is for training: a function of the seed, the file's content and the place only."""
        drawn = hashlib.sha256(f"{self._config.run.seed} {digest} {place}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64 >= self._data.eval_fraction

    def _judge(self, split: str, tally: Tally, files: Sequence[DataFile]) -> None:
        for url, name in tally.formats.items():
            log.event("prepare.format", f"{url}: {name} format", split=split, url=url, format=name)
        if tally.ignored_keys:
            log.event(
                "prepare.ignored",
                f"{split}: keys that are not used: {', '.join(sorted(tally.ignored_keys))}",
                keys=dict(tally.ignored_keys),
            )
        if tally.bad:
            self._judge_bad(split, tally)
        if not tally.examples:
            where = ", ".join(file.url for file in files)
            if split == "eval" and self._data.eval_fraction:
                raise errors.DataError(
                    f"data.eval_fraction {self._data.eval_fraction} holds out none of the records in {where}: raise it"
                )
            raise errors.DataError(
                f"{split}: no record in {where}; there is nothing to {'train on' if split == 'train' else 'evaluate'}"
            )
        if tally.truncated:
            log.warn(
                "prepare.truncated",
                f"{split}: {tally.truncated} of {tally.examples} examples were cut to data.max_length "
                f"{self._data.max_length} tokens",
                split=split, truncated=tally.truncated,
            )  # fmt: skip

    def _judge_bad(self, split: str, tally: Tally) -> None:
        share = tally.bad / tally.records
        listed = "\n".join(f"  {line}" for line in tally.complaints)
        more = f"\n  and {tally.bad - len(tally.complaints)} more" if tally.bad > len(tally.complaints) else ""
        seen = f"{split}: {tally.bad} of {tally.records} records read cannot be used:\n{listed}{more}"
        if share > self._data.skip_bad_share:
            enough = (math.floor(share * 100) + 1) / 100
            skip = f", or set data.skip_bad_share to {enough} to leave them out" if enough < 1 else ""
            raise errors.DataError(f"{seen}\nCorrect them{skip}")
        log.warn(
            "prepare.skipped",
            f"{seen}\nThey are left out, as data.skip_bad_share {self._data.skip_bad_share} allows",
            split=split,
            skipped=tally.bad,
        )


def _refuse_leak(train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> None:
    trained = {file.sha256: file.url for file in train}
    for file in evaluation:
        if file.sha256 in trained:
            raise errors.DataError(
                f"data.eval: {file.url} has the same content as {trained[file.sha256]} in data.train, so the eval loss "
                "would measure memory: hold out other records, or use data.eval_fraction"
            )


def _key(config: Config, base_digest: str, train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> str:
    """What the result depends on: the files, the settings, the tokenizer, and the code that reads them."""
    parts = {
        "train": [(f.url, f.sha256) for f in train],
        "eval": [(f.url, f.sha256) for f in evaluation],
        "settings": config.data.model_dump(mode="json", exclude={"train", "eval"}),
        "seed": config.run.seed if config.data.eval_fraction else None,
        "base": base_digest,
        "code": [manifest.sha256(path) for path in _SOURCES]
        + [importlib.metadata.version(p) for p in ("transformers", "tokenizers", "trl", "datasets")],
    }
    return paths.digest(json.dumps(parts, sort_keys=True))


def _digest(whole: Manifest) -> str:
    """Of the tokens alone: the counts beside them name URLs, which may change while the data stay the same."""
    return Manifest({name: file for name, file in whole.files.items() if name.endswith(".arrow")}).digest


def _summary(target: Path) -> str:
    counts = json.loads((target / "data.json").read_text(encoding="utf-8"))
    return "; ".join(
        f"{split}: {c['examples']} examples, {c['tokens']} tokens, {c['trained_tokens'] / c['tokens']:.0%} "
        f"of them trained, longest {c['longest']}"
        for split, c in counts.items()
    )
