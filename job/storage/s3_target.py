"""One key of a bucket, to be written: with a checksum that the store compares, and only if nobody else was faster.

The checksum is CRC-64/NVME; MD5 where the AWS setting ``request_checksum_calculation`` is ``when_required``, for stores
that know no newer one.
"""

import base64
import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from job import errors
from job.storage import checksum, s3_errors
from job.storage.store import ANY

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Request = Callable[["S3Client"], Any]
Ask = Callable[[str, Request], Any]  # what is being done, and the request
MD5 = re.compile(r"^[0-9a-f]{32}$")
_WRITER = "written-by"  # the metadata by which a conditional write knows itself again


class Target:
    """Where something is written, and how requests are made there: `once`, `patiently`, or `briefly`.

    `over` is the version that it replaces, as in `Store.upload`.
    """

    def __init__(
        self, place: tuple[str, str], over: str | None, once: Ask, patiently: Ask, briefly: Ask,
        untold: threading.Event, *, crc: bool,
    ) -> None:  # fmt: skip
        self.place: dict[str, Any] = {"Bucket": place[0], "Key": place[1]}
        self.condition: dict[str, Any] = {"IfMatch": over} if over else {"IfNoneMatch": "*"}
        if over == ANY:
            self.condition = {}
        self._mark = uuid.uuid4().hex
        self.once, self.patiently, self.briefly, self.crc = once, patiently, briefly, crc
        self.untold = untold  # set when the store did not tell what is unfinished there

    def proof(self, data: bytes) -> dict[str, Any]:
        """The checksum of `data` as a parameter of the request that brings it there."""
        if self.crc:
            return {"ChecksumCRC64NVME": checksum.crc_text(checksum.crc(data))}
        return {"ContentMD5": base64.b64encode(md5(data).digest()).decode()}

    def written(self, reply: Mapping[str, Any], data: bytes) -> None:
        """Raise `errors.DamagedError` if the store took something else than `data`, as far as it tells.

        Most stores refuse a wrong checksum; some ignore the kinds that they do not know, but their ETag is an MD5.
        """
        etag = str(reply["ETag"]).strip('"')
        encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
        if "ChecksumCRC64NVME" not in reply and MD5.match(etag) and not encrypted:
            mine = md5(data).hexdigest()
            if etag != mine:
                raise errors.DamagedError(f"{self}: damaged on the way: MD5 was {mine}, the store has {etag}")

    def __str__(self) -> str:
        return f"s3://{self.place['Bucket']}/{self.place['Key']}"

    def put(self, s3: "S3Client", body: Any, data: bytes) -> None:  # noqa: ANN401 - bytes, or a file that holds them
        """Write `data`, sent as `body`, in one request.

        A conditional write whose reply was lost is tried again, and then loses against itself. So each carries a mark,
        by which it is known whose write it was that won; `errors.ConflictError` if it was another's.
        """
        more = {**self.condition, "Metadata": {_WRITER: self._mark}} if self.condition else {}
        try:
            self.written(s3.put_object(**self.place, Body=body, **self.proof(data), **more), data)
        except botocore.exceptions.ClientError as e:
            if not self.condition or s3_errors.code(e) not in (*s3_errors.LOST, *s3_errors.MISSING):
                raise
            there = self._there(s3)
            if there is None or there["Metadata"].get(_WRITER) != self._mark:
                raise self.lost() from e
            self.condition = {"IfMatch": there["ETag"]}  # where it arrived damaged, the next try replaces it
            self.written(there, data)

    def look(self, s3: "S3Client") -> None:
        """Raise `errors.ConflictError` if the condition does not hold now; for a store that cannot judge it itself."""
        there = self._there(s3)
        if (there["ETag"] if there else None) != self.condition.get("IfMatch"):
            raise self.lost()

    def lost(self) -> errors.ConflictError:
        """What a write ends with whose condition does not hold any more."""
        return errors.ConflictError(
            f"{self} {'was changed by somebody else' if 'IfMatch' in self.condition else 'exists already'}"
        )

    def _there(self, s3: "S3Client") -> Mapping[str, Any] | None:
        try:
            return s3.head_object(**self.place)
        except botocore.exceptions.ClientError as e:
            if s3_errors.code(e) in s3_errors.MISSING:
                return None
            raise


def md5(data: bytes) -> "hashlib._Hash":
    """MD5, against damage and not against people."""
    return hashlib.md5(data, usedforsecurity=False)
