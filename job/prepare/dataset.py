"""The step itself: read, convert, render, tokenize, count, write; and complain once about all that is wrong."""

import hashlib
import importlib.metadata
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import pyarrow as pa

from job import errors, log, manifest, paths
from job.config import Config
from job.inputs import Base, DataFile, Prepared
from job.model import tokenizer
from job.prepare import formats, records
from job.prepare.formats import BadRecordError, Example
from job.prepare.tokens import Renderer, Row, marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 20  # bad records that are listed one by one
_BATCH = 1000  # records tokenized at once
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), Path(tokenizer.__file__))


@dataclass
class _Tally:
    """What happened to the records of one split."""

    records: int = 0
    examples: int = 0
    bad: int = 0
    complaints: list[str] = field(default_factory=list)
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    ignored_keys: Counter[str] = field(default_factory=Counter)

    def reject(self, where: str, reason: str) -> None:
        self.bad += 1
        if len(self.complaints) < _SHOWN:
            self.complaints.append(f"{where}: {reason}")

    def accept(self, row: Row) -> None:
        self.examples += 1
        self.truncated += row.truncated
        self.tokens += len(row.input_ids)
        self.trained_tokens += sum(label != tokenizer.IGNORED for label in row.labels)
        self.longest = max(self.longest, len(row.input_ids))


def dataset(
    config: Config, base: Base, train: Sequence[DataFile], evaluation: Sequence[DataFile], cache: paths.Cache
) -> Prepared:
    """Prepare both splits with the tokenizer of `base`.

    Raises `errors.DataError` naming file, line and reason of each record that cannot be used.
    """
    key = _key(config, base.digest, train, evaluation)
    target = cache.prepared(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        there = manifest.sealed(target)
        if there:
            log.event("prepare.here", f"prepared data are here already ({_summary(target)})", digest=there.digest)
            return Prepared(target, there.digest)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        words = tokenizer.load(base.path, config.data.template, trust_remote_code=config.model.trust_remote_code)
        _Preparation(config, words, partial).run(train, evaluation)
        whole = manifest.seal(partial)
        partial.rename(target)
    log.event(
        "prepare.done",
        f"prepared {_summary(target)}",
        digest=whole.digest,
        **json.loads((target / "data.json").read_text(encoding="utf-8")),
    )
    return Prepared(target, whole.digest)


class _Preparation:
    """One preparation under way."""

    def __init__(self, config: Config, words: "PreTrainedTokenizerBase", target: Path) -> None:
        self._config, self._data, self._words, self._target = config, config.data, words, target
        self._renderer = Renderer(words, config.data.max_length, answers_only=config.data.loss_on == "assistant")
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
        counts = {
            split: {k: v for k, v in vars(tally).items() if k != "complaints"} for split, tally in tallies.items()
        }
        (self._target / "data.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
        (self._target / "sample.txt").write_text(self._sample, encoding="utf-8")
        log.event("prepare.sample", f"the first example, trained tokens between ⟦ and ⟧:\n{self._sample}")

    def _split(self, split: str, files: Sequence[DataFile], *, kept: bool | None = None) -> _Tally:
        """Write one split; with an eval fraction, the records whose draw is `kept`, or not, for training."""
        tally = _Tally()
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
        return tally

    def _examples(self, file: DataFile, tally: _Tally, kept: bool | None) -> Iterator[tuple[str, Example]]:  # noqa: FBT001 - private
        name: str = "" if self._data.format == "auto" else self._data.format
        heading = tokenizer.input_heading(self._words)
        for record in records.read(file.path, file.url):
            if kept is not None and kept != self._draw(file.sha256, record.place):
                continue
            where = f"{file.url}:{record.place}"
            tally.records += 1
            try:
                if record.value is None:
                    raise BadRecordError(record.reason)  # noqa: TRY301 - one place counts bad records
                name = name or formats.recognise(record.value)
                tally.formats[file.url] = name
                tally.ignored_keys.update(formats.ignored(record.value, name))
                yield where, formats.convert(record.value, name, heading)
            except BadRecordError as e:
                tally.reject(where, str(e))
                if self._hopeless(tally):
                    return

    def _rows(self, batch: Sequence[tuple[str, Example]], tally: _Tally) -> Iterator[Row]:
        for (where, _), row in zip(batch, self._renderer.rows([example for _, example in batch]), strict=True):
            if isinstance(row, BadRecordError):
                tally.reject(where, str(row))
            else:
                tally.accept(row)
                yield row

    def _hopeless(self, tally: _Tally) -> bool:
        """Enough has been seen to know that the run will be refused: do not read on."""
        return tally.bad > _SHOWN and not self._data.skip_bad_share

    def _draw(self, digest: str, place: int) -> bool:
        """Whether a record is for training: a function of the seed, the file's content and the place only."""
        drawn = hashlib.sha256(f"{self._config.run.seed} {digest} {place}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64 >= self._data.eval_fraction

    def _judge(self, split: str, tally: _Tally, files: Sequence[DataFile]) -> None:
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

    def _judge_bad(self, split: str, tally: _Tally) -> None:
        share = tally.bad / tally.records
        listed = "\n".join(f"  {line}" for line in tally.complaints)
        more = f"\n  and {tally.bad - len(tally.complaints)} more" if tally.bad > len(tally.complaints) else ""
        seen = f"{split}: {tally.bad} of {tally.records} records read cannot be used:\n{listed}{more}"
        if share > self._data.skip_bad_share:
            raise errors.DataError(
                f"{seen}\nCorrect them, or set data.skip_bad_share to at least {share:.2g} to leave them out"
            )
        log.warn(
            "prepare.skipped",
            f"{seen}\nThey are left out, as data.skip_bad_share {self._data.skip_bad_share} allows",
            split=split,
            skipped=tally.bad,
        )


def _key(config: Config, base_digest: str, train: Sequence[DataFile], evaluation: Sequence[DataFile]) -> str:
    """What the result depends on: the files, the settings, the tokenizer, and the code that reads them."""
    parts = {
        "train": [f.sha256 for f in train],
        "eval": [f.sha256 for f in evaluation],
        "settings": config.data.model_dump(mode="json", exclude={"train", "eval"}),
        "seed": config.run.seed if config.data.eval_fraction else None,
        "base": base_digest,
        "code": [manifest.sha256(path) for path in _SOURCES]
        + [importlib.metadata.version(p) for p in ("transformers", "tokenizers")],
    }
    return paths.digest(json.dumps(parts, sort_keys=True))


def _summary(target: Path) -> str:
    counts = json.loads((target / "data.json").read_text(encoding="utf-8"))
    return "; ".join(
        f"{split}: {c['examples']} examples, {c['tokens']} tokens, {c['trained_tokens'] / c['tokens']:.0%} "
        f"of them trained, longest {c['longest']}"
        for split, c in counts.items()
    )
