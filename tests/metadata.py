"""The metadata services of AWS, GCP and Azure, as a server on this machine."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GCP = {"/computeMetadata/v1/instance/id": "123", "/computeMetadata/v1/instance/preempted": "FALSE"}


class Metadata(BaseHTTPRequestHandler):
    """All three services. What there is to tell lies in `told`, by path; each insists on its header."""

    told: dict[str, str]
    token: str

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        lives = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(self.token if self.path == "/latest/api/token" and lives else None, 400)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        insists = {
            "/latest/": ("X-aws-ec2-metadata-token", self.token, 401),
            "/computeMetadata/": ("Metadata-Flavor", "Google", 403),
            "/metadata/": ("Metadata", "true", 400),
        }
        header, value, refusal = next(told for start, told in insists.items() if path.startswith(start))
        if self.headers.get(header) != value or (refusal == 400 and "api-version=20" not in query):
            self._answer(None, refusal)
        else:
            self._answer(self.told.get(path), 404)

    def _answer(self, body: str | None, otherwise: int) -> None:
        data = (body or "").encode()
        self.send_response(otherwise if body is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """Run it; yields what it tells, to be changed, and where it is under ``url``."""
    Metadata.told, Metadata.token = {}, "token-1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Metadata.told["url"] = f"http://127.0.0.1:{server.server_port}"
    yield Metadata.told
    server.shutdown()
    server.server_close()
