"""Ranges of S3 objects, as fast as they can be had: through obstore (Rust) where it works, else through boto3.

obstore does one thing here: it reads a range, once. What fails is tried again through boto3, whose errors say what is
wrong. Measured side by side in benchmarks/storage.py; docs/decisions.md has the figures and the choice.
"""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import boto3

from job import errors, log
from job.storage import patience
from job.storage.store import Block

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.client import S3Client
    from obstore.store import ClientConfig, S3Credential, S3Store
    from urllib3.response import BaseHTTPResponse

_BLOCK = 1 << 18  # blocks of a megabyte leave the processor's cache: they took up to twice the CPU time
_SMALLEST_BLOCK = 1 << 16
_CREDENTIALS_KEPT = timedelta(minutes=1)  # boto3 renews its own long before they expire
_TRUSTED_FAILURES = 5


class Ranges:
    """Reads ranges of the objects in `bucket`."""

    def __init__(self, session: boto3.session.Session, client: "S3Client", bucket: str) -> None:
        self._client, self._bucket = client, bucket
        self._fast = _fast_store(session, client, bucket)
        self._mine = threading.local()
        self._succeeded, self._failed = 0, 0

    def stream(self, key: str, version: str, start: int, stop: int) -> Iterator[Block]:
        """The bytes of `key` from `start` to before `stop`; what boto3 raises, and `errors.StoreError` of obstore."""
        doubted = getattr(self._mine, "doubted", False)  # this thread's last try failed, so find out why
        self._mine.doubted = False
        fast = self._fast
        if fast is None or doubted:
            yield from self._slow(key, version, start, stop)
            return
        try:
            yield from self._quick(fast, key, version, start, stop)
            self._succeeded += 1
        except _obstore_errors() as e:
            self._mine.doubted = True
            self._failed += 1
            if self._failed > self._succeeded + _TRUSTED_FAILURES:
                self._fast = None
                log.warn("store.fallback", f"reading through obstore fails too often ({_first(e)}): boto3 from now on")
            raise errors.StoreError(f"s3://{self._bucket}/{key}: the transfer failed: {_first(e)}") from e

    def _quick(self, fast: "S3Store", key: str, version: str, start: int, stop: int) -> Iterator[Block]:
        import obstore

        reply = obstore.get(fast, key, options={"range": (start, stop), "if_match": f'"{version}"'})
        _same_version(f"s3://{self._bucket}/{key}", reply.meta["e_tag"], version)
        for block in reply.stream(min_chunk_size=_SMALLEST_BLOCK):
            yield memoryview(block)

    def _slow(self, key: str, version: str, start: int, stop: int) -> Iterator[Block]:
        reply = self._client.get_object(
            Bucket=self._bucket, Key=key, IfMatch=f'"{version}"', Range=f"bytes={start}-{stop - 1}"
        )
        _same_version(f"s3://{self._bucket}/{key}", reply["ETag"], version)
        yield from arriving(reply["Body"])


def arriving(body: "StreamingBody") -> Iterator[bytes]:
    """What comes of `body`, as it comes: who waits for blocks of a given size cannot see that it only trickles.

    Raises `errors.StoreError` if it is not over in time, and what urllib3 raises. May end early without an error.
    """
    deadline = time.monotonic() + patience.PART_SECONDS
    with body as opened:
        raw = cast("BaseHTTPResponse", opened)  # so says botocore's source, not its stubs
        while block := raw.read1(_BLOCK):
            yield block
            if time.monotonic() > deadline:
                raise errors.StoreError(f"a reply was not over after {patience.PART_SECONDS:.0f} s")


def _same_version(where: str, seen: str | None, wanted: str) -> None:
    if (seen or "").strip('"') != wanted:
        raise errors.ChangedError(f"{where} was overwritten while it was read; start again")


def _fast_store(session: boto3.session.Session, client: "S3Client", bucket: str) -> "S3Store | None":
    """An obstore store with the endpoint and the credentials that boto3 uses; None where that is not possible."""
    try:
        from obstore.store import S3Store
    except ImportError:
        log.event("store.boto3", "obstore is not installed: reading through boto3, which takes more CPU time")
        return None
    addressing = (getattr(client.meta.config, "s3", None) or {}).get("addressing_style", "auto")
    credentials = session.get_credentials()
    if addressing == "virtual" or bucket.startswith("arn:") or credentials is None:
        return None  # the URL cannot be built from endpoint and bucket alone
    options: ClientConfig = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=patience.CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=patience.STALL_SECONDS),
        "timeout": timedelta(seconds=patience.PART_SECONDS),
        "user_agent": "finetune-job",
    }
    bundle = session._session.get_config_variable("ca_bundle")  # noqa: SLF001 - boto3 has no public way to ask
    if bundle:
        options["root_certificate"] = Path(bundle).read_bytes()

    def renewed() -> "S3Credential":
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key or "",
            "secret_access_key": frozen.secret_key or "",
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_KEPT,
        }

    return S3Store(
        bucket,
        endpoint=client.meta.endpoint_url,
        region=client.meta.region_name,
        virtual_hosted_style_request=False,
        client_options=options,
        retry_config={"max_retries": 0},
        credential_provider=renewed,
    )


def _obstore_errors() -> tuple[type[Exception], ...]:
    from obstore import exceptions

    return (exceptions.BaseError, FileNotFoundError, ValueError, OSError)


def _first(error: Exception) -> str:
    """The first line of what obstore says; the rest are its own internals."""
    return str(error).strip().partition("\n")[0]
