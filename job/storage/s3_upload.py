"""A file on its way into S3: in one request if it is small, else in parts that a later start can go on with."""

import io
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import botocore.exceptions
from awscrt import checksums

from job import errors, log
from job.storage import checksum, patience, s3_errors
from job.storage.s3_target import MD5, Target, md5
from job.storage.store import Check

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_BLOCK = 1 << 18


class Whole:
    """An upload in one request."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def send(self, _number: int, data: bytes, check: Check) -> None:
        self._target.once("writing", lambda s3: self._target.put(s3, _Body(data, check), data))

    def finish(self) -> None:
        """Nothing is left to do: the one request made it whole."""

    def abort(self) -> None:
        """Nothing is left there: the one request made it whole or failed."""

    leave = abort


class Parts:
    """A multipart upload of `size` bytes."""

    def __init__(self, target: Target, size: int) -> None:
        self._target, self._size = target, size
        self._sent: dict[int, tuple[str, int, int]] = {}  # ETag, CRC and length of each part, by number from 0
        self._id, self._there = self._unfinished() or (self._begin(), {})

    def send(self, number: int, data: bytes, check: Check) -> None:
        proof = self._target.proof(data)
        there = self._there.get(number)
        etag = there["ETag"] if there and _same(there, data, proof) else self._write(number, data, proof, check)
        self._sent[number] = (etag, checksum.crc(data), len(data))

    def finish(self) -> None:
        crc = self._target.crc
        parts = [
            {"PartNumber": number + 1, "ETag": etag, **({"ChecksumCRC64NVME": checksum.crc_text(part)} if crc else {})}
            for number, (etag, part, _) in sorted(self._sent.items())
        ]
        whole = {"ChecksumCRC64NVME": self._crc(), "ChecksumType": "FULL_OBJECT"} if crc else {}
        request = {**self._target.place, "UploadId": self._id, "MultipartUpload": {"Parts": parts}, **whole}
        request |= self._target.condition
        self._target.once("putting the parts together", lambda s3: self._complete(s3, request))

    def abort(self) -> None:
        abort(self._target, self._id)

    def leave(self) -> None:
        """S3 keeps the parts for the next upload to the same key, or until a lifecycle rule removes them."""

    def _write(self, number: int, data: bytes, proof: Mapping[str, Any], check: Check) -> str:
        place = {**self._target.place, "UploadId": self._id, "PartNumber": number + 1}
        reply = self._target.once(
            f"writing part {number + 1}", lambda s3: s3.upload_part(**place, Body=_Body(data, check), **proof)
        )
        self._target.written(reply, data)
        return str(reply["ETag"])

    def _complete(self, s3: "S3Client", request: Mapping[str, Any]) -> None:
        try:
            s3.complete_multipart_upload(**request)
        except botocore.exceptions.ClientError as e:
            lost = s3_errors.code(e) in (*s3_errors.LOST, *s3_errors.MISSING)
            if (lost or s3_errors.code(e) == "NoSuchUpload") and self._is_there(s3):
                return  # an earlier try of ours did it, and its reply was lost
            if lost:
                raise self._target.lost() from e
            if s3_errors.code(e) in s3_errors.UNABLE and self._target.condition:
                self._target.look(s3)  # which is as good as long as nobody writes in between
                s3.complete_multipart_upload(**{k: v for k, v in request.items() if k not in self._target.condition})
                return
            if s3_errors.code(e) in ("BadDigest", "InvalidPart", "NoSuchUpload"):
                raise errors.ChangedError(
                    f"{self._target}: the parts there are not those that were sent ({s3_errors.code(e)}): "
                    "does another job write to the same URL? Start again"
                ) from e
            raise

    def _is_there(self, s3: "S3Client") -> bool:
        try:
            head = s3.head_object(**self._target.place, ChecksumMode="ENABLED")
        except botocore.exceptions.ClientError:
            return False
        crc = head.get("ChecksumCRC64NVME")
        same = crc == self._crc() if crc else head["ETag"].strip('"') == self._etag()
        return same and head["ContentLength"] == self._size

    def _crc(self) -> str:
        whole = 0
        for _, (_, crc, length) in sorted(self._sent.items()):
            whole = checksums.combine_crc64nvme(whole, crc, length)
        return checksum.crc_text(whole)

    def _etag(self) -> str:
        """MD5 of the parts' MD5s, which most stores give to what was put together."""
        etags = [etag.strip('"') for _, (etag, _, _) in sorted(self._sent.items())]
        if not all(MD5.match(etag) for etag in etags):
            return ""
        return f"{md5(b''.join(map(bytes.fromhex, etags))).hexdigest()}-{len(etags)}"

    def _begin(self) -> str:
        kind: dict[str, Any] = (
            {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if self._target.crc else {}
        )
        reply = self._target.patiently(
            "beginning an upload", lambda s3: s3.create_multipart_upload(**self._target.place, **kind)
        )
        return str(reply["UploadId"])

    def _unfinished(self) -> tuple[str, dict[int, Mapping[str, Any]]] | None:
        """An upload to this key that a killed start left, and its parts by number from 0; any others are given up."""
        left = [upload for key, upload in unfinished(self._target) if key == self._target.place["Key"]]
        for upload in left[:-1]:
            abort(self._target, upload)
        if not left:
            return None

        def request(s3: "S3Client") -> list[Any]:
            return list(s3.get_paginator("list_parts").paginate(**self._target.place, UploadId=left[-1]))

        try:
            pages = self._target.patiently("looking at an unfinished upload", request)
        except errors.JobError as e:
            log.event("push.unfinished", f"{e}. Beginning this upload anew")
            pages = []
        ours = "CRC64NVME" if self._target.crc else None
        if not pages or pages[0].get("ChecksumAlgorithm", ours) != ours:
            abort(self._target, left[-1])
            return None
        return left[-1], {part["PartNumber"] - 1: part for page in pages for part in page.get("Parts", [])}


def unfinished(target: Target) -> list[tuple[str, str]]:
    """Key and id of every upload that was begun at the target's key or below and not finished, oldest first.

    None if the store does not tell, or the credentials may not ask: no reason to fail, what was sent is sent again.
    """

    def request(s3: "S3Client") -> list[tuple[str, str]]:
        pages = s3.get_paginator("list_multipart_uploads").paginate(
            Bucket=target.place["Bucket"], Prefix=target.place["Key"]
        )
        begun = sorted((u for page in pages for u in page.get("Uploads", [])), key=lambda u: u["Initiated"])
        return [(u["Key"], u["UploadId"]) for u in begun]

    if target.untold.is_set():
        return []
    try:
        return list(target.briefly("looking for unfinished uploads", request))
    except errors.JobError as e:
        if not isinstance(e, errors.StoreError):
            target.untold.set()
        log.warn("push.unfinished", f"{e}. Uploads that a kill cut off are not gone on with, and stay in the bucket")
        return []


def abort(target: Target, upload: str) -> None:
    """Give up the multipart upload with the id `upload`, so that its parts do not stay there; say if they do."""

    def request(s3: "S3Client") -> None:
        try:
            s3.abort_multipart_upload(**target.place, UploadId=upload)
        except botocore.exceptions.ClientError as e:
            if s3_errors.code(e) != "NoSuchUpload":
                raise

    try:
        target.briefly("giving up an upload", request)
    except errors.JobError as e:
        log.warn("push.left", f"{e}. Its parts stay in the bucket")


class _Body(io.BytesIO):
    """Bytes whose sending can be stopped between two blocks.

    http.client asks for 16 KiB at a time, and each costs a switch of threads; it takes what it gets.
    """

    def __init__(self, data: bytes, check: Check) -> None:
        super().__init__(data)
        self._check, self._deadline = check, time.monotonic() + patience.PART_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        if time.monotonic() > self._deadline:
            raise errors.StoreError(f"a part was not sent after {patience.PART_SECONDS:.0f} s")
        return super().read(max(size, _BLOCK) if size and size > 0 else size)


def _same(there: Mapping[str, Any], data: bytes, proof: Mapping[str, str]) -> bool:
    """True if a part in the store is what would be sent."""
    if there["Size"] != len(data):
        return False
    crc = there.get("ChecksumCRC64NVME")
    if crc and "ChecksumCRC64NVME" in proof:
        return bool(crc == proof["ChecksumCRC64NVME"])
    return bool(there["ETag"].strip('"') == md5(data).hexdigest())
