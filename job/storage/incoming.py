"""One file on its way here, in parts: each is written where it belongs, and the hash follows in order meanwhile.

Parts are kept over a kill. SHA-256 needs the bytes in order, so whoever completes the part that is next goes on hashing
from the page cache until a part is missing; the part at the head is hashed as its blocks pass by.
"""

import contextlib
import mmap
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import BinaryIO

from job import errors
from job.manifest import File
from job.storage import checksum, patience
from job.storage.crew import Crew
from job.storage.journal import Journal, Part
from job.storage.store import Entry, Source

_USEFUL_BYTES = 1 << 20  # what a try must bring at least
PART_BYTES = 32 << 20  # a multiple of every page size; the memory that a part needs is one block, not this


class Incoming:
    """The file `name` of a partial directory, to become what `entry` describes and, if known, what was `promised`."""

    def __init__(self, source: Source, entry: Entry, name: str, journal: Journal, promised: File | None) -> None:
        self.source, self.entry, self.name, self.path = source, entry, name, journal.directory / name
        self.damage: str | None = None  # how the whole file differs from what it should be
        self.verified_by = ""
        self._journal, self._promised, self._lock = journal, promised, threading.Lock()
        self._there: dict[int, Part] = {}
        self._hash = checksum.Running(None)
        self._hashed, self._hashing = 0, False

    def recover(self, crew: Crew) -> None:
        """Look at what an earlier start left, and ask the store for its checksum if there is nothing better."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        left = self._journal.parts(self.name, self.entry)
        if not (left and self.path.is_file()):
            self.path.unlink(missing_ok=True)
        self.path.touch()
        stops = {part.start: part.stop for part in self._parts()}
        self._there = {part.start: part for part in left.values() if self._is_whole(part, stops)}
        if self._promised is None:
            self._hash = checksum.Running(crew.keep_trying(lambda: self.source.checksum(self.entry)))
        self._follow(crew)
        if not self.entry.size:
            self._conclude()

    def missing(self) -> list[Part]:
        """The parts that have not arrived."""
        return [part for part in self._parts() if part.start not in self._there]

    def receive(self, part: Part, crew: Crew) -> None:
        """Bring one missing part here. What has arrived when the connection breaks is not asked for again."""
        at_head = self._claim(part)
        with self.path.open("r+b") as file:
            file.seek(part.start)
            coming = _Coming(self.source, self.entry, part, file, self._hash if at_head else None)
            while coming.position < part.stop:
                crew.keep_trying(partial(coming.attempt, crew))
        self._arrived(Part(part.start, part.stop, coming.crc), crew, hashed=at_head)

    @property
    def _where(self) -> str:
        return f"{self.source.url}/{self.entry.key}"

    def _parts(self) -> list[Part]:
        size = self.entry.size
        return [Part(start, min(start + PART_BYTES, size), 0) for start in range(0, size, PART_BYTES)]

    def _is_whole(self, part: Part, stops: Mapping[int, int]) -> bool:
        """A machine that lost its power may have lost bytes of which the journal speaks."""
        if stops.get(part.start) != part.stop or part.stop > self.path.stat().st_size:
            return False
        with self._on_disk(part) as piece:
            return checksum.crc(piece) == part.crc

    def _claim(self, part: Part) -> bool:
        """Is `part` the next to be hashed, and nobody at it? Then it is hashed while it arrives."""
        with self._lock:
            if self._hashing or self._hashed != part.start:
                return False
            self._hashing = True
            return True

    def _arrived(self, part: Part, crew: Crew, *, hashed: bool) -> None:
        self._journal.add_part(self.name, self.entry, part)
        with self._lock:
            self._there[part.start] = part
        if hashed:
            self._passed(part)
        self._follow(crew)

    def _follow(self, crew: Crew) -> None:
        """Hash what is there and next in order, unless somebody is at it: he will see what is there by then."""
        while part := self._next():
            crew.check()
            with self._on_disk(part) as piece:
                self._hash.update(piece)
            self._passed(part)

    def _next(self) -> Part | None:
        with self._lock:
            part = self._there.get(self._hashed)
            if self._hashing or part is None:
                return None
            self._hashing = True
            return part

    def _passed(self, part: Part) -> None:
        with self._lock:
            self._hashed, self._hashing = part.stop, False
        if part.stop == self.entry.size:
            self._conclude()

    @contextlib.contextmanager
    def _on_disk(self, part: Part) -> Iterator[memoryview]:
        with self.path.open("rb") as file:
            length = part.stop - part.start
            with (
                mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=part.start) as mapped,
                memoryview(mapped) as view,
            ):
                yield view

    def _conclude(self) -> None:
        """Judge the whole file, now that its last byte is hashed."""
        self.verified_by = "our SHA-256" if self._promised else self._hash.verified_by
        self.damage = self._hash.mismatch()
        if self._promised and self._promised != File(size=self.entry.size, sha256=self._hash.sha256):
            self.damage = f"SHA-256 is {self._hash.sha256}, its manifest says {self._promised.sha256}"
        if self.damage is None:
            self._journal.add_whole(self.name, self.entry, self._hash.sha256)
        else:
            self.damage = f"{self._where}: damaged on the way: {self.damage}"
            self._journal.forget(self.name, self.entry)
            self.path.unlink()


class _Coming:
    """A part that is arriving in `file`: how far it is, and its CRC so far. At the head, `digest` takes it too."""

    def __init__(
        self, source: Source, entry: Entry, part: Part, file: BinaryIO, digest: checksum.Running | None
    ) -> None:
        self.position, self.crc = part.start, 0
        self._source, self._entry, self._stop, self._file, self._digest = source, entry, part.stop, file, digest
        self._where = f"{source.url}/{entry.key}"

    def attempt(self, crew: Crew) -> None:
        """Go on where the last try ended. After one that brought something useful patience begins anew."""
        began = self.position
        try:
            self._bring(crew)
        except errors.StoreError as e:
            if self.position - began < _USEFUL_BYTES:
                raise
            crew.retried(e, 1)

    def _bring(self, crew: Crew) -> None:
        deadline = time.monotonic() + patience.PART_SECONDS
        for block in self._source.stream(self._entry, self.position, self._stop):
            crew.check()
            if len(block) > self._stop - self.position:
                raise errors.DamagedError(f"{self._where}: more bytes came than were asked for")
            self._file.write(block)
            self.crc = checksum.crc(block, self.crc)
            if self._digest:
                self._digest.update(block)
            self.position += len(block)
            crew.advance(len(block))
            if time.monotonic() > deadline:
                raise errors.StoreError(f"{self._where}: part not here after {patience.PART_SECONDS:.0f} s")
        if self.position < self._stop:
            raise errors.DamagedError(f"{self._where}: broke off after {self.position} of {self._entry.size} bytes")
