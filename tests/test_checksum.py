"""Checking a download against the checksum that S3 keeps for it."""

import base64
import hashlib
import zlib
from pathlib import Path

import pytest

from job.storage import checksum

DATA = bytes(range(256)) * 5000  # a little over one read block
MD5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
PARTS = hashlib.md5(
    b"".join(hashlib.md5(DATA[i : i + 500_000], usedforsecurity=False).digest() for i in range(0, len(DATA), 500_000)),
    usedforsecurity=False,
).hexdigest()


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ({"ChecksumSHA256": encoded(hashlib.sha256(DATA).digest()), "ETag": '"x-2"'}, "SHA256"),
        ({"ChecksumCRC32": encoded(zlib.crc32(DATA).to_bytes(4, "big")), "ChecksumType": "FULL_OBJECT"}, "CRC32"),
        ({"ChecksumSHA1": encoded(hashlib.sha1(DATA, usedforsecurity=False).digest())}, "SHA1"),
        ({"ETag": f'"{MD5}"'}, "MD5"),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, "MD5"),
        ({"ETag": f'"{PARTS}-3"', "ChecksumCRC32": "AAAA-3", "ChecksumType": "COMPOSITE"}, "MD5 of parts"),
    ],
)
def test_the_strongest_checksum_of_the_whole_object_is_used(head: dict[str, str], name: str, tmp_path: Path) -> None:
    """And it matches the real content, whatever its kind."""
    (tmp_path / "got").write_bytes(DATA)
    wanted = checksum.expected({"ContentLength": len(DATA), **head}, 500_000)

    seen = checksum.of_file(tmp_path / "got", wanted)

    assert (seen.verified_by, seen.sha256, seen.mismatch()) == (name, hashlib.sha256(DATA).hexdigest(), None)


@pytest.mark.parametrize("kind", ["CRC64NVME", "CRC32C"])
def test_the_crcs_that_newer_clients_leave_are_checked(kind: str, tmp_path: Path) -> None:
    """The published check values of both algorithms, for the text 123456789."""
    known = {"CRC64NVME": "AE8B14860A799888", "CRC32C": "E3069283"}
    (tmp_path / "got").write_bytes(b"123456789")
    wanted = checksum.expected({f"Checksum{kind}": encoded(bytes.fromhex(known[kind]))}, None)

    seen = checksum.of_file(tmp_path / "got", wanted)

    assert (seen.verified_by, seen.mismatch()) == (kind, None)


@pytest.mark.parametrize(
    "head",
    [
        {"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"},
        {"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"},
        {"ETag": f'"{PARTS}-7"'},
        {},
    ],
)
def test_an_etag_that_is_no_checksum_is_not_taken_for_one(head: dict[str, str], tmp_path: Path) -> None:
    """Objects encrypted with the customer's key, parts of unequal size: only the size is checked, and it says so."""
    (tmp_path / "got").write_bytes(DATA)
    wanted = checksum.expected({"ContentLength": len(DATA), **head}, 500_000)

    assert wanted is None
    assert checksum.of_file(tmp_path / "got", wanted).verified_by == "size"


@pytest.mark.parametrize("damaged", [DATA[:-1], DATA[:-1] + b"!"])
def test_a_missing_or_flipped_byte_is_seen(damaged: bytes, tmp_path: Path) -> None:
    """It is said what was expected."""
    (tmp_path / "got").write_bytes(damaged)
    wanted = checksum.expected({"ETag": f'"{MD5}"', "ContentLength": len(DATA)}, None)

    assert f"the store says {MD5}" in str(checksum.of_file(tmp_path / "got", wanted).mismatch())
