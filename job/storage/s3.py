"""S3 and everything that speaks its protocol, through boto3.

Endpoint, region and credentials come from the standard AWS chain. Retries are ours (`patience`), so that all are
counted and none is made twice.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions

from job import errors, log
from job.storage import checksum, patience, s3_errors, s3_ranges, s3_target, s3_upload
from job.storage.checksum import Expected
from job.storage.store import ANY, Blob, Block, Entry, Upload

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Outcome = TypeVar("Outcome")

_LEAST_PART = 16 << 20
_MOST_PARTS = 10_000


class S3:
    """The store at ``s3://bucket/prefix``."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self._answered = False
        self._renewing, self._untold = threading.Lock(), threading.Event()
        self._client, self._ranges = self._connected()

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, prefix: str = "") -> list[Entry]:
        def request(s3: "S3Client") -> list[Any]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
            return [item for page in pages for item in page.get("Contents", [])]

        # Some tools make empty objects that end in / to show folders.
        return [
            Entry(i["Key"].removeprefix(self.prefix), i["Size"], i["ETag"].strip('"'))
            for i in self._patiently(f"listing {prefix}", request)
            if not i["Key"].endswith("/")
        ]

    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Block]:
        key = self.prefix + entry.key
        with self._explained(f"reading {entry.key}"):
            try:
                yield from self._ranges.stream(key, entry.version, start, stop)
            except botocore.exceptions.ClientError as e:
                if s3_errors.code(e) in (*s3_errors.LOST, *s3_errors.MISSING):
                    raise self._describe_change(entry) from e
                raise

    def checksum(self, entry: Entry) -> Expected | None:
        place: dict[str, Any] = {"Bucket": self.bucket, "Key": self.prefix + entry.key}

        def request(s3: "S3Client") -> Expected | None:
            try:
                head = s3.head_object(**place, ChecksumMode="ENABLED")
            except botocore.exceptions.ClientError as e:
                if s3_errors.code(e) in s3_errors.MISSING:
                    raise self._describe_change(entry) from e
                raise
            if head["ETag"].strip('"') != entry.version:
                raise self._describe_change(entry)
            known = checksum.expected(dict(head), None)
            if known or "-" not in entry.version:
                return known
            try:  # the bytes of the first part of a multipart upload; some stores cannot tell
                part = s3.head_object(**place, PartNumber=1)["ContentLength"]
            except botocore.exceptions.ClientError as e:
                if s3_errors.code(e) in s3_errors.LATER:
                    raise
                return None
            return checksum.expected(dict(head), part)

        return self._once(f"reading {entry.key}", request)

    def read(self, key: str) -> Blob | None:
        def request(s3: "S3Client") -> Blob | None:
            try:
                reply = s3.get_object(Bucket=self.bucket, Key=self.prefix + key, ChecksumMode="ENABLED")
            except botocore.exceptions.ClientError as e:
                if s3_errors.code(e) in s3_errors.MISSING:
                    return None
                raise
            data = b"".join(s3_ranges.arriving(reply["Body"]))
            seen = checksum.Running(checksum.expected(dict(reply), None))
            seen.update(data)
            short = len(data) != reply["ContentLength"]
            damage = f"{len(data)} of {reply['ContentLength']} bytes came" if short else seen.mismatch()
            if damage:
                raise errors.DamagedError(f"{self.url}/{key}: damaged on the way: {damage}")
            return Blob(data, reply["ETag"])

        return self._patiently(f"reading {key}", request)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, ANY)

    def create(self, key: str, data: bytes) -> None:
        self._write(key, data, None)

    def replace(self, key: str, data: bytes, version: str) -> None:
        self._write(key, data, version)

    def part_size(self, size: int) -> int:
        return max(_LEAST_PART, -(-size // _MOST_PARTS))

    def upload(self, key: str, size: int, over: str | None) -> Upload:
        target = self._target(key, f'"{over}"' if over and over != ANY else over)
        return s3_upload.Parts(target, size) if size > self.part_size(size) else s3_upload.Whole(target)

    def sweep(self, prefix: str) -> None:
        for key, upload in s3_upload.unfinished(self._target(prefix)):
            s3_upload.abort(self._target(key.removeprefix(self.prefix)), upload)

    def delete(self, key: str) -> None:
        self._patiently(f"deleting {key}", lambda s3: s3.delete_object(Bucket=self.bucket, Key=self.prefix + key))

    def _describe_change(self, entry: Entry) -> errors.ChangedError:
        """Return what reading `entry` ends with when it is not there any more, or another one."""
        return errors.ChangedError(
            f"{self.url}/{entry.key} was overwritten or removed since it was listed; start again"
        )

    def _write(self, key: str, data: bytes, over: str | None) -> None:
        target = self._target(key, over)
        self._patiently(f"writing {key}", lambda s3: target.put(s3, data, data))

    def _target(self, key: str, over: str | None = ANY) -> s3_target.Target:
        crc = getattr(self._client.meta.config, "request_checksum_calculation", None) != "when_required"
        place = (self.bucket, self.prefix + key)
        return s3_target.Target(place, over, self._once, self._patiently, self._briefly, self._untold, crc=crc)

    def _once(self, doing: str, request: Callable[["S3Client"], Outcome]) -> Outcome:
        with self._explained(doing):
            try:
                outcome = request(self._client)
            except botocore.exceptions.ClientError:
                self._answered = True
                raise
            self._answered = True
            return outcome

    def _patiently(self, doing: str, request: Callable[["S3Client"], Outcome]) -> Outcome:
        def attempt() -> Outcome:
            return self._once(doing, request)

        if not self._answered:
            try:
                return patience.FIRST.keep_trying(attempt, _say_again)
            except errors.StoreError:
                if not self._answered:
                    raise
        return patience.USUAL.keep_trying(attempt, _say_again)

    def _briefly(self, doing: str, request: Callable[["S3Client"], Outcome]) -> Outcome:
        return patience.BRIEF.keep_trying(lambda: self._once(doing, request), _say_again)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        client = self._client
        try:
            with s3_errors.explained(f"{doing.strip()} in s3://{self.bucket}/{self.prefix}", client.meta.endpoint_url):
                yield
        except errors.ExpiredError:
            with self._renewing:  # somebody may have put new ones where these came from
                if self._client is client:
                    self._client, self._ranges = self._connected()
            raise

    def _connected(self) -> tuple["S3Client", s3_ranges.Ranges]:
        with s3_errors.explained(f"connecting to s3://{self.bucket}", "S3"):
            session = boto3.session.Session()
            client: S3Client = session.client("s3", config=_config())
        return client, s3_ranges.Ranges(session, client, self.bucket)


def _config() -> botocore.config.Config:
    return botocore.config.Config(
        connect_timeout=patience.CONNECT_SECONDS,
        read_timeout=patience.ANSWER_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 1},
        response_checksum_validation="when_required",  # we hash all that comes ourselves
        max_pool_connections=16,
        user_agent_extra="finetune-job",
    )


def _say_again(error: errors.StoreError, tried: int) -> None:
    log.warn("store.retry", f"{error}; trying again", tried=tried)
