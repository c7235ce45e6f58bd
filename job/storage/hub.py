"""A model repository on the Hugging Face Hub, read-only. Token and endpoint: huggingface_hub's own chain."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub_errors

from job import errors, manifest
from job.storage.store import Advance, Entry, Seen

_SHA256_DIGITS = 64
_UNREACHED = (httpx2.TransportError, hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError)
_MISSING = (
    hub_errors.RepositoryNotFoundError,
    hub_errors.RevisionNotFoundError,
    hub_errors.EntryNotFoundError,
    hub_errors.HFValidationError,
)


class Hub:
    """The repository at ``hf://org/name@revision`` (without a revision: main)."""

    def __init__(self, repository: str, revision: str) -> None:
        self.repository, self.revision = repository, revision or "main"

    @property
    def url(self) -> str:
        return f"hf://{self.repository}@{self.revision}"

    def list(self, prefix: str = "") -> list[Entry]:
        with self._explained():
            info = huggingface_hub.HfApi().model_info(self.repository, revision=self.revision, files_metadata=True)
        files = [f for f in info.siblings or [] if f.rfilename.startswith(prefix)]
        # The version names the content: SHA-256 of large files, git's blob id of small ones.
        return sorted(
            (Entry(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else f.blob_id or "") for f in files),
            key=lambda e: e.key,
        )

    def download(self, entry: Entry, target: Path, advance: Advance) -> Seen:
        with self._explained(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".hub-") as scratch:
            path = huggingface_hub.hf_hub_download(
                self.repository, entry.key, revision=self.revision, local_dir=scratch
            )
            shutil.move(path, target)
        advance(entry.size)
        return self._verify(entry, target)

    def _verify(self, entry: Entry, path: Path) -> Seen:
        sha256 = manifest.sha256(path)
        if len(entry.version) == _SHA256_DIGITS:
            seen, kind = sha256, "SHA256"
        else:
            seen, kind = _blob_id(path), "git blob id"
        if seen != entry.version:
            raise errors.DamagedError(
                f"{self.url}/{entry.key}: damaged on the way or changed since it was listed ({kind} "
                f"{seen}, the Hub says {entry.version})"
            )
        return Seen(sha256, kind)

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
            raise errors.StoreError(f"{self.url}: the Hub answered: {e}") from e


def _blob_id(path: Path) -> str:
    data = path.read_bytes()  # the Hub keeps every large file elsewhere, so this one is small
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
