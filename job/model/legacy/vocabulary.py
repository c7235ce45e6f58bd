"""Vocabularies of tiktoken and SentencePiece as fast tokenizers that give the same token ids.

Both merge, again and again, the two neighbours whose union ranks best. A fast tokenizer does the same, but wants to
know which two neighbours each token is made of. There is only one such pair: what is merged inside a token, in any
text in which it appears, is what is merged when it stands alone.
"""

import base64
import binascii
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode, import_protobuf

_Text = TypeVar("_Text", str, bytes)
_SPACE = "▁"  # SentencePiece's
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6  # types of pieces in sentencepiece_model.proto
_BPE = 2  # the type of a model there


@dataclass(frozen=True)
class SentencePiece:
    """What a SentencePiece model says: its pieces by their ids, which are better, and what it does to text."""

    pieces: Sequence[str]
    ranks: Mapping[str, int]
    """Of those that are made by merging, the best first."""
    kept: Collection[str]
    """Those that are never cut."""
    unknown: str
    charsmap: bytes
    dummy_prefix: bool
    single_spaces: bool


def tiktoken(path: Path) -> dict[bytes, int]:
    """The tokens in a file of tiktoken's, a line for each in base64 with its rank, which is its id.

    Raises `ValueError` if it is no such file.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise ValueError(f"{path.name}:{number} is not a token in base64 and its rank ({line[:40]!r})") from e
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path.name} lacks ranks or single bytes: it is not whole")
    return ranks


def byte_level(ranks: Mapping[bytes, int], special: Sequence[str], pattern: str) -> Tokenizer:
    """The fast tokenizer of the tokens `ranks`, after which the `special` ones have their ids.

    Text is brought into Unicode's form NFC and cut by `pattern` before it is tokenized.
    """
    spelled: Mapping[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    vocabulary |= {token: number for number, token in enumerate(special, start=len(ranks))}
    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))  # tiktoken too takes a whole word if it can
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return made


def sentencepiece(path: Path) -> SentencePiece:
    """The SentencePiece model in the file `path`; raises `ValueError` if it is none, or not of the kind BPE."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # late: with its only user

    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as e:
        raise ValueError(f"{path.name} is no SentencePiece model: {e}") from e
    if proto.trainer_spec.model_type != _BPE or not proto.trainer_spec.byte_fallback:
        raise ValueError(f"{path.name} is a SentencePiece model of another kind than BPE with byte_fallback")
    if not proto.normalizer_spec.escape_whitespaces:
        raise ValueError(f"{path.name} does not write spaces as {_SPACE}")
    merged = sorted((p for p in proto.pieces if p.type == _NORMAL), key=lambda p: -p.score)
    return SentencePiece(
        pieces=[p.piece for p in proto.pieces],
        ranks={p.piece: rank for rank, p in enumerate(merged)},
        kept=[p.piece for p in proto.pieces if p.type == _USER_DEFINED],
        unknown=next(p.piece for p in proto.pieces if p.type == _UNKNOWN),
        charsmap=proto.normalizer_spec.precompiled_charsmap,
        dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
        single_spaces=proto.normalizer_spec.remove_extra_whitespaces,
    )


def byte_fallback(plain: SentencePiece, special: Sequence[str], looked_for: Collection[str]) -> Tokenizer:
    """The fast tokenizer of a SentencePiece model, after whose pieces the `special` tokens have their ids.

    Of those the ones that are `looked_for` are found in text.
    """
    vocabulary = {piece: number for number, piece in enumerate([*plain.pieces, *special])}
    merges = _merges(plain.ranks)
    if strange := next((part for pair in merges for part in pair if part not in plain.ranks), None):
        raise ValueError(f"the vocabulary has no piece {strange!r}, from which others are made")
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=plain.unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if plain.single_spaces else []
    made.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(plain.charsmap)] if plain.charsmap else []),
            *spaces,
            *([normalizers.Prepend(_SPACE)] if plain.dummy_prefix else []),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if plain.dummy_prefix else []),
        ]
    )
    made.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in plain.kept])
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special if token in looked_for]
    )
    return made


def _merges(ranks: Mapping[_Text, int]) -> list[tuple[_Text, _Text]]:
    """The pair that each token is made of, the best token first."""
    pairs = (_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    return [pair for pair in pairs if pair]


def _last_merge(token: _Text, ranks: Mapping[_Text, int]) -> tuple[_Text, _Text] | None:
    """The two parts that `token` is merged from when it stands alone; None if it never comes about by merging."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:  # noqa: PLR2004 - a pair
        unions = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        best = min((rank for rank in unions if rank is not None and rank < ranks[token]), default=None)
        if best is None:
            return None
        place = unions.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
