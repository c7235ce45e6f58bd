"""One file on its way into the store, in parts: read once, hashed in order while earlier parts are under way."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from job.manifest import File
from job.storage.crew import Crew
from job.storage.store import Store, Upload

_LEAVE_SECONDS = 0.2


class Outgoing:
    """The local file at `path`, to become `key` in place of the version `over`, as in `Store.upload`.

    Each call of `send_next` holds one part in memory, so a crew needs as many parts as it has hands. `granted` is
    called before every request that writes, and raises if we may not any more.
    """

    def __init__(self, store: Store, path: Path, key: str, over: str | None, granted: Callable[[], None]) -> None:
        self.key, self.size = key, path.stat().st_size
        self.file: File | None = None  # known when all of it was sent
        self._store, self._path, self._over, self._lock = store, path, over, threading.Lock()
        self._granted = granted
        self._part_size = store.part_size(self.size)
        self._hash = hashlib.sha256()
        self._upload: Upload | None = None
        self._reading: BinaryIO | None = None
        self._taken, self._left = 0, self.parts

    @property
    def parts(self) -> int:
        """How many calls of `send_next` it takes."""
        return max(1, -(-self.size // self._part_size))

    def send_next(self, crew: Crew) -> None:
        """Send the next part; with the last one that arrives, the file is there."""
        number, data, upload = self._take(crew)
        crew.keep_trying(lambda: self._send(upload, number, data, crew))
        crew.advance(len(data))
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            crew.keep_trying(lambda: self._finish(upload))
            self.file, self._upload = File(self.size, self._hash.hexdigest()), None

    def abort(self) -> None:
        """Leave nothing unfinished in the store."""
        if upload := self._close():
            upload.abort()

    def leave(self) -> None:
        """Leave in the store what a later start can go on with."""
        if upload := self._close():
            upload.leave()

    def _send(self, upload: Upload, number: int, data: bytes, crew: Crew) -> None:
        self._granted()
        upload.send(number, data, crew.check)

    def _finish(self, upload: Upload) -> None:
        self._granted()
        upload.finish()

    def _close(self) -> Upload | None:
        """The upload under way. Where a silent store keeps the lock busy, it is not waited for."""
        if not self._lock.acquire(timeout=_LEAVE_SECONDS):
            return None
        try:
            upload, self._upload = self._upload, None
            if self._reading:
                self._reading.close()
            return upload
        finally:
            self._lock.release()

    def _take(self, crew: Crew) -> tuple[int, bytes, Upload]:
        with self._lock:
            crew.check()  # nothing is begun after the crew was stopped
            if self._upload is None or self._reading is None:
                self._upload = self._store.upload(self.key, self.size, self._over)
                self._reading = self._path.open("rb")
            number, data = self._taken, self._reading.read(self._part_size)
            self._hash.update(data)
            self._taken += 1
            if self._taken == self.parts:
                self._reading.close()
            return number, data, self._upload
