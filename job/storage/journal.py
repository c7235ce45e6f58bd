"""What of a half-pulled directory is there: a line for every part and every whole file, written after its bytes.

A kill loses the parts that were under way and nothing else; a line that a kill cut is as good as none.
"""

import contextlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.manifest import File
from job.storage.store import Entry


@dataclass(frozen=True)
class Part:
    """A range of a file that is on the disk: where it begins and ends, and its CRC-64/NVME as it arrived."""

    start: int
    stop: int
    crc: int


class Journal:
    """The journal at `path` of the partial directory `directory`, on a machine whose start is named `boot`."""

    def __init__(self, directory: Path, path: Path, boot: str) -> None:
        self.directory, self._path, self._lock = directory, path, threading.Lock()
        self._parts: dict[tuple[str, str], dict[int, Part]] = {}
        self._whole: dict[tuple[str, str], File] = {}
        self._boot: str | None = None
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._take(json.loads(line))
        if text and not text.endswith("\n"):
            self._write("\n")  # ends the line that was cut
        if self._boot != boot:
            # Files are not flushed: after a restart of the machine only parts can be believed, by their CRC.
            self._whole.clear()
            self._append({"boot": boot})

    def parts(self, name: str, entry: Entry) -> dict[int, Part]:
        """The parts of `name` that were written of this version of `entry`, by where they begin."""
        return dict(self._parts.get((name, entry.version), {}))

    def add_part(self, name: str, entry: Entry, part: Part) -> None:
        self._append({"name": name, "version": entry.version, "part": [part.start, part.stop, part.crc]})

    def whole(self, name: str, entry: Entry) -> File | None:
        """What is known of `name` if all of this version of `entry` is there and was verified."""
        file, path = self._whole.get((name, entry.version)), self.directory / name
        there = path.is_file() and path.stat().st_size == entry.size
        return file if there else None

    def add_whole(self, name: str, entry: Entry, sha256: str) -> None:
        self._append({"name": name, "version": entry.version, "size": entry.size, "sha256": sha256})

    def forget(self, name: str, entry: Entry) -> None:
        """What arrived of `name` is not what it should be."""
        self._append({"name": name, "version": entry.version, "forget": True})

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._write(json.dumps(line) + "\n")
            self._take(line)

    def _write(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _take(self, line: dict[str, Any]) -> None:
        if "boot" in line:
            self._boot = line["boot"]
            self._whole.clear()
            return
        key = (str(line["name"]), str(line["version"]))
        if line.get("forget"):
            self._parts.pop(key, None)
            self._whole.pop(key, None)
        elif "part" in line:
            part = Part(*map(int, line["part"]))
            self._parts.setdefault(key, {})[part.start] = part
        else:
            self._whole[key] = File(size=int(line["size"]), sha256=str(line["sha256"]))
