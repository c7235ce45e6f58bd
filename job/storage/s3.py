"""S3 and everything that speaks its protocol, through boto3.

Endpoint, region and credentials come from the standard AWS chain.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
from boto3.s3.transfer import TransferConfig

from job import errors
from job.storage import checksum
from job.storage.store import Advance, Blob, Entry, Seen

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_MISSING = ("404", "NoSuchKey", "NotFound")
_LOST = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
_DENIED = (errors.DeniedError, "check the credentials and what they may do with this bucket")
_EXPIRED = (errors.StoreError, "the credentials expired; a new start fetches new ones")
_ELSEWHERE = (errors.PermanentError, "the bucket lives in another region; set AWS_REGION or AWS_ENDPOINT_URL")
_REFUSALS: dict[str, tuple[type[errors.JobError], str]] = {
    "NoSuchBucket": (errors.NotFoundError, "create the bucket or correct the URL"),
    "RequestTimeTooSkewed": (errors.PermanentError, "correct this machine's clock"),
    **dict.fromkeys(_MISSING, (errors.NotFoundError, "correct the URL")),
    **dict.fromkeys(("403", "AccessDenied", "AllAccessDisabled", "AccountProblem"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"), _DENIED),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed"), _ELSEWHERE),
}
_RAISED = (
    boto3.exceptions.Boto3Error,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    ValueError,
)
_UNREACHED = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
)
_MISCONFIGURED = (
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ConfigNotFound,
    botocore.exceptions.ConfigParseError,
    botocore.exceptions.NoRegionError,
    ValueError,  # what boto3 raises for an endpoint that is no URL
)
_PATIENCE = botocore.config.Config(
    connect_timeout=10,
    read_timeout=60,
    retries={"mode": "standard", "total_max_attempts": 5},
    user_agent_extra="finetune-job",
)
# "classic": the CRT client that boto3 may pick by itself ignores endpoint_url (boto3 issue 4839).
_TRANSFER = TransferConfig(preferred_transfer_client="classic", max_concurrency=8)


class S3:
    """The store at ``s3://bucket/prefix``."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        with self._explained("connecting"):
            self._client: S3Client = boto3.session.Session().client("s3", config=_PATIENCE)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, prefix: str = "") -> list[Entry]:
        with self._explained(f"listing {prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            found = [item for page in pages for item in page.get("Contents", [])]
        # Some tools make empty objects that end in / to show folders.
        return [
            Entry(i["Key"].removeprefix(self.prefix), i["Size"], i["ETag"].strip('"'))
            for i in found
            if not i["Key"].endswith("/")
        ]

    def download(self, entry: Entry, target: Path, advance: Advance) -> Seen:
        key = self.prefix + entry.key
        with self._explained(f"reading {entry.key}"):
            head = self._client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
            if head["ETag"].strip('"') != entry.version:
                raise errors.DamagedError(f"{self.url}/{entry.key} changed since it was listed; start again")
            parts = self._part_size(key) if "-" in entry.version else None
            self._client.download_file(self.bucket, key, str(target), Callback=advance, Config=_TRANSFER)
        expected = checksum.expected(dict(head), parts)
        return checksum.verify(target, entry.size, expected, f"{self.url}/{entry.key}")

    def read(self, key: str) -> Blob | None:
        with self._explained(f"reading {key}"):
            for last in (False, False, True):
                try:
                    reply = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
                    return Blob(reply["Body"].read(), reply["ETag"])
                except botocore.exceptions.ClientError as e:
                    if _code(e) in _MISSING:
                        return None
                    raise
                except _UNREACHED:
                    if last:  # botocore retries requests, but not a body that breaks off
                        raise
        raise AssertionError

    def put(self, key: str, data: bytes) -> None:
        with self._explained(f"writing {key}"):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def create(self, key: str, data: bytes) -> None:
        self._write_if(key, data, {"IfNoneMatch": "*"}, "exists already")

    def replace(self, key: str, data: bytes, version: str) -> None:
        self._write_if(key, data, {"IfMatch": version}, "was changed by somebody else")

    def upload(self, path: Path, key: str, advance: Advance) -> None:
        with self._explained(f"writing {key}"):
            self._client.upload_file(str(path), self.bucket, self.prefix + key, Callback=advance, Config=_TRANSFER)

    def delete(self, key: str) -> None:
        with self._explained(f"deleting {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def _write_if(self, key: str, data: bytes, condition: Any, lost: str) -> None:  # noqa: ANN401 - one of two keywords of put_object
        with self._explained(f"writing {key}"):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, **condition)
            except botocore.exceptions.ClientError as e:
                if _code(e) not in _LOST + _MISSING:
                    raise
                # A write whose reply was lost is retried by botocore and then loses against itself.
                there = self.read(key)
                if there is None or there.data != data:
                    raise errors.ConflictError(f"{self.url}/{key} {lost}") from e

    def _part_size(self, key: str) -> int | None:
        """Bytes of the first part of a multipart upload; None on stores that cannot tell."""
        try:
            return self._client.head_object(Bucket=self.bucket, Key=key, PartNumber=1)["ContentLength"]
        except botocore.exceptions.ClientError:
            return None

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn what boto3 raises into our errors: what happened, where, and what to do."""
        what = f"{doing.strip()} in s3://{self.bucket}/{self.prefix}"
        try:
            yield
        except _RAISED as e:
            raise self._explain(e, what) from e

    def _explain(self, error: Exception, what: str) -> errors.JobError:
        cause = error
        if isinstance(error, boto3.exceptions.Boto3Error) and isinstance(
            error.__context__, botocore.exceptions.ClientError
        ):
            cause = error.__context__  # upload_file wraps what the server said
        if isinstance(cause, botocore.exceptions.ClientError):
            return self._refused(cause, what)
        if isinstance(cause, (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)):
            return errors.DeniedError(
                f"{what}: no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or give the machine a role"
            )
        if isinstance(cause, _UNREACHED):
            return errors.StoreError(
                f"{what}: cannot reach {self._endpoint()}: {cause}. Check AWS_ENDPOINT_URL and the network"
            )
        if isinstance(cause, boto3.exceptions.Boto3Error):
            return errors.StoreError(f"{what}: {cause}")
        if isinstance(cause, _MISCONFIGURED):
            return errors.PermanentError(f"{what}: {cause}. Check the URL and the AWS settings")
        return errors.StoreError(f"{what}: {cause}")

    def _refused(self, error: botocore.exceptions.ClientError, what: str) -> errors.JobError:
        code, message = _code(error), error.response.get("Error", {}).get("Message", "")
        kind, advice = _REFUSALS.get(code, (errors.StoreError, "a new start may succeed"))
        said = f"{self._endpoint()} answered {code} {message}".rstrip(" .")
        return kind(f"{what}: {said}: {advice}")

    def _endpoint(self) -> str:
        return self._client.meta.endpoint_url


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
