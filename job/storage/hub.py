"""A repository of a model or of data on the Hugging Face Hub, read-only.

Token and endpoint come from huggingface_hub's own chain.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx2
import huggingface_hub
import huggingface_hub.utils as hub_utils
from huggingface_hub import errors as hub_errors

from job import errors, log
from job.storage import patience
from job.storage.checksum import Expected
from job.storage.store import Block, Entry

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_SHA256_DIGITS = 64
_UNREACHED = (httpx2.TransportError, hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError)
_DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_MISSING = (
    hub_errors.RepositoryNotFoundError,
    hub_errors.RevisionNotFoundError,
    hub_errors.EntryNotFoundError,
    hub_errors.HFValidationError,
)


class Hub:
    """The repository at ``hf://org/name@revision`` (without a revision: main), or the folder `below` in it."""

    def __init__(self, repository: str, revision: str, kind: str = "model", below: str = "") -> None:
        self.repository, self.revision, self._kind, self._below = repository, revision or "main", kind, below
        self._commit = self.revision

    @property
    def url(self) -> str:
        kind = "" if self._kind == "model" else f"{self._kind}s/"
        return f"hf://{kind}{self.repository}@{self.revision}/{self._below}".rstrip("/")

    def list(self, prefix: str = "") -> list[Entry]:
        there = patience.FIRST.keep_trying(self._listing, _say_again)
        files = [f for f in there if f.rfilename.startswith(self._below + prefix)]
        # The version names the content: SHA-256 of large files, git's blob id of small ones.
        return sorted(
            (
                Entry(f.rfilename.removeprefix(self._below), f.size or 0, f.lfs.sha256 if f.lfs else f.blob_id or "")
                for f in files
            ),
            key=lambda e: e.key,
        )

    def stream(self, entry: Entry, start: int, stop: int) -> Iterator[Block]:
        where = huggingface_hub.hf_hub_url(
            self.repository, self._below + entry.key, repo_type=self._kind, revision=self._commit
        )
        headers = {
            **hub_utils.build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",  # a range of what is stored, not of what a proxy makes of it
        }
        with (
            self._explained(),
            hub_utils.get_session().stream(
                "GET", where, headers=headers, follow_redirects=True, timeout=patience.STALL_SECONDS
            ) as reply,
        ):
            hub_utils.hf_raise_for_status(reply)
            whole = start == 0 and stop == entry.size
            if reply.status_code != HTTPStatus.PARTIAL_CONTENT and not whole:
                raise errors.UnsupportedError(
                    f"{self.url}/{entry.key}: the Hub at {where} does not send parts of files"
                )
            yield from reply.iter_bytes()  # as they come: who collects larger blocks cannot see a trickle

    def checksum(self, entry: Entry) -> Expected:
        if len(entry.version) == _SHA256_DIGITS:
            return Expected("SHA256", entry.version, hashlib.sha256)
        return Expected("git blob id", entry.version, lambda: _blob(entry.size))

    def _listing(self) -> Sequence["RepoSibling"]:
        with self._explained():
            hub = huggingface_hub.HfApi()
            info = (hub.dataset_info if self._kind == "dataset" else hub.model_info)(
                self.repository, revision=self.revision, files_metadata=True
            )
        self._commit = info.sha or self.revision  # a branch may move while its files are read
        return info.siblings or []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _UNREACHED as e:
            raise errors.StoreError(
                f"{self.url}: cannot reach the Hub: {e}. Put the model in a bucket, or check HF_ENDPOINT "
                "and the network"
            ) from e
        except hub_errors.GatedRepoError as e:
            raise errors.DeniedError(
                f"{self.url}: the repository is gated: accept its terms on the Hub and set HF_TOKEN"
            ) from e
        except _MISSING as e:
            raise errors.NotFoundError(
                f"{self.url}: not found on the Hub: check organisation, name and revision, and HF_TOKEN if "
                "it is private"
            ) from e
        except hub_errors.HfHubHTTPError as e:
            if e.response is not None and e.response.status_code in _DENIED:
                raise errors.DeniedError(f"{self.url}: the Hub answered: {e}: check HF_TOKEN") from e
            raise errors.StoreError(f"{self.url}: the Hub answered: {e}") from e


def _blob(size: int) -> "hashlib._Hash":
    """The digest by which git names a file of `size` bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _say_again(error: errors.StoreError, tried: int) -> None:
    log.warn("store.retry", f"{error}; trying again", tried=tried)
