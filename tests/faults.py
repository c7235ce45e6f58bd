"""A proxy between the job and the S3 server that does to requests what networks and stores do to them."""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

_LONG = 8.0  # seconds; the tests' patience with a silent store is 1


@dataclass
class Request:
    """What came from the job, and what the server answered, for a fault to spoil."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    answer: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    send: int | None = None  # bytes of the content that are sent; all if None
    pause: float = 0.0  # seconds before the connection is closed
    pace: float = 0.0  # seconds before every byte of the content

    @property
    def part(self) -> bool:
        """True if data are transferred, and not a question about them."""
        return (self.method == "GET" and self.header("Range") != "") or (self.method == "PUT" and len(self.body) > 0)

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")


class DroppedError(Exception):
    """The connection breaks."""


Forward = Callable[[Request], None]
Fault = Callable[[Request, Forward], None]


def says(status: int, code: str) -> Fault:
    """The store refuses with an error."""

    def fault(request: Request, _forward: Forward) -> None:
        request.status = status
        request.content = f"<Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
        request.answer = {"Content-Type": "application/xml", "Content-Length": str(len(request.content))}
        if request.method == "HEAD":
            request.content = b""

    return fault


def reset(_request: Request, _forward: Forward) -> None:
    """The connection is reset before the request arrives."""
    raise DroppedError


def lose_reply(request: Request, forward: Forward) -> None:
    """The store does what is asked, and the answer gets lost."""
    forward(request)
    raise DroppedError


def truncate(request: Request, forward: Forward) -> None:
    """The body breaks off in the middle."""
    forward(request)
    request.send = len(request.content) // 2
    if not request.content:
        raise DroppedError


def shorten(request: Request, forward: Forward) -> None:
    """Half of the body comes, in an answer that says it is all of it."""
    forward(request)
    request.content = request.content[: len(request.content) // 2]
    request.answer["Content-Length"] = str(len(request.content))


def shorten_chunks(request: Request, forward: Forward) -> None:
    """Half of the body comes, in chunks that end as they should."""
    shorten(request, forward)
    request.content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(request.content), request.content)
    request.answer["Transfer-Encoding"] = "chunked"
    del request.answer["Content-Length"]


def ignore_range(request: Request, forward: Forward) -> None:
    """The whole file comes, a thousand times what was asked for."""
    forward(request)
    request.content *= 1000
    request.status, request.answer["Content-Length"] = 200, str(len(request.content))
    request.answer.pop("Content-Range", None)


def hide_checksum(request: Request, forward: Forward) -> None:
    """The object is encrypted with a key of KMS, so its ETag says nothing of the content."""
    forward(request)
    kept = {k: v for k, v in request.answer.items() if not k.lower().startswith("x-amz-checksum")}
    request.answer = {**kept, "x-amz-server-side-encryption": "aws:kms"}


def stall(request: Request, forward: Forward) -> None:
    """Half of the body comes, or no answer at all, and then nothing for longer than anybody waits."""
    forward(request)
    request.send, request.pause = len(request.content) // 2, _LONG
    if not request.content:
        time.sleep(_LONG)
        raise DroppedError


def trickle(request: Request, forward: Forward) -> None:
    """Every byte comes soon enough, and all of them never."""
    forward(request)
    request.pace = 0.2


def flip(request: Request, forward: Forward) -> None:
    """One byte of what is transferred, either way, is another one when it arrives."""
    request.body = _flipped(request.body) if request.method == "PUT" else request.body
    forward(request)
    request.content = _flipped(request.content) if request.method == "GET" else request.content


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


class Proxy:
    """Passes requests on to the server at `url`, and does `fault` to those that `chosen` picks."""

    def __init__(self, url: str) -> None:
        self._upstream = urlsplit(url).netloc
        self._lock, self.count, self.hurt = threading.Lock(), 0, 0
        self.chosen: Callable[[Request, int], Fault | None] = lambda _request, _number: None
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def hurt_part(self, fault: Fault, numbers: Iterator[int] | range) -> None:
        """Do `fault` to the transfers of data with these numbers, counted from 0."""
        wanted, seen = set(numbers), iter(range(1 << 30))

        def chosen(request: Request, _number: int) -> Fault | None:
            return fault if request.part and next(seen) in wanted else None

        self.chosen = chosen

    def hurt_at_random(self, faults: list[Fault], share: float, seed: int) -> None:
        """Do one of `faults` to a share of all requests."""
        dice = random.Random(seed)
        self.chosen = lambda _request, _number: dice.choice(faults) if dice.random() < share else None

    def pick(self, request: Request) -> Fault | None:
        with self._lock:
            self.count += 1
            fault = self.chosen(request, self.count)
            self.hurt += fault is not None
            return fault

    def forward(self, request: Request) -> None:
        """Ask the server; a connection of its own each time, so that nothing of one request reaches another."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)  # with the Host that was signed
            connection.endheaders(request.body or None)
            reply = connection.getresponse()
            request.status, request.content = reply.status, reply.read()
            request.answer = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "date", "server")}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement of its headers
    owner: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # every method alike
            return self._any
        raise AttributeError(name)

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(self.command, self.path, dict(self.headers.items()), self.rfile.read(length))
        fault = self.owner.pick(request)
        try:
            fault(request, self.owner.forward) if fault else self.owner.forward(request)
            self._answer(request)
        except (DroppedError, ConnectionError):
            self.close_connection = True
            # Linger of zero seconds: the kernel sends a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _answer(self, request: Request) -> None:
        self.send_response_only(request.status)
        for name, value in request.answer.items():
            self.send_header(name, value)
        self.end_headers()
        whole = request.content if request.send is None else request.content[: request.send]
        if self.command != "HEAD" and request.pace:
            for number in range(len(whole)):
                time.sleep(request.pace)
                self.wfile.write(whole[number : number + 1])
        elif self.command != "HEAD":
            self.wfile.write(whole)
        if request.send is not None:
            time.sleep(request.pause)
            raise DroppedError
