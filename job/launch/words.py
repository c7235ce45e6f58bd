"""The last lines that a worker's libraries wrote to stderr before the worker died."""

import os
import threading
from typing import IO

_BYTES = 1 << 16  # of each process; torch's own trace of an abort is some ten thousand
_BLOCK = 1 << 12
_STDERR = 2
_LATE_SECONDS = 1.0  # that words may take through the pipe when their process has ended


class LastWords:
    """Copies what arrives through `pipe` to this process's stderr, and keeps the end of it.

    Only C++ libraries write to this pipe. A worker writes Python's messages to the terminal itself,
    for progress bars need one.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._end = pipe, bytearray()
        self._reading = threading.Thread(target=self._read, daemon=True, name="last-words")
        self._reading.start()

    def text(self) -> str:
        """Return the end of what was written so far, complete once the process has ended."""
        # A process that the worker left behind may hold the pipe open: do not wait for its end.
        self._reading.join(_LATE_SECONDS)
        return self._end.decode("utf-8", "replace")

    def _read(self) -> None:
        with self._pipe:
            while block := os.read(self._pipe.fileno(), _BLOCK):
                self._end += block
                del self._end[:-_BYTES]
                _pass_on(block)


def _pass_on(block: bytes) -> None:
    """Write `block` to this process's stderr, where the worker would have written it."""
    while block:
        try:
            block = block[os.write(_STDERR, block) :]
        except OSError:  # nobody reads it any more; a worker must not be stopped by that
            return
