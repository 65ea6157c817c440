"""Real servers for tests: S3 and HTTP from rclone, and a proxy between that can misbehave.

One idea: faults are injected where they happen in life, on the wire, so that the code under test
and its libraries are the ones that ship.
"""

import contextlib
import http.client
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.wire_faults import Exchange, Fault

ACCESS_KEY, SECRET_KEY = "ACCESSKEY1234567890", "SECRETKEY1234567890abcdef"
FAULTS = ("reset", "truncate", "unavailable", "drip")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def rclone(kind: str, directory: Path, *options: str) -> Iterator[str]:
    """Address of an rclone server (`s3` or `http`) over a directory."""
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
    address = f"127.0.0.1:{free_port()}"
    command = [program, "serve", kind, "--addr", address, *options, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(address, process)
        yield address
    finally:
        process.terminate()
        process.wait()


def s3_options(address: str, secret: str = SECRET_KEY) -> dict:
    """fsspec options of a local S3 server."""
    return {"key": ACCESS_KEY, "secret": secret, "endpoint_url": f"http://{address}"}


def _wait_for(address: str, process: subprocess.Popen) -> None:
    """Return when something answers at the address."""
    for _ in range(400):
        assert process.poll() is None, "the server ended"
        try:
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"http://{address}/", timeout=5).close()
            return
        except OSError:
            threading.Event().wait(0.05)
    raise AssertionError("the server does not answer")


class Proxy:
    """An HTTP proxy in front of one server.

    Attributes:
        address: where it listens.
        requests: "METHOD path range" of every request so far.
        fault: called with (how many requests came before, method, path); returns one of `FAULTS`,
            a fault of `wire_faults`, or None.
        conditional: when True, a PUT with `If-None-Match: *` of a name that was put before is
            answered 412, as Amazon's S3 does and rclone's does not.
    """

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.requests: list[str] = []
        self.fault: Callable[[int, str, str], str | Fault | None] = lambda *request: None
        self.conditional = False
        self.taken: set[str] = set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # a client may hang up when it likes
                super().handle()

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            count = len(proxy.requests)
            proxy.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
            fault = proxy.fault(count, self.command, self.path)
            if self._is_taken():
                error = b"<Error><Code>PreconditionFailed</Code><Message>taken</Message></Error>"
                self._answer(412, [("Content-Type", "application/xml")], error, None)
            elif fault == "reset":
                self._reset()
            elif fault == "unavailable":
                self._answer(503, [("Retry-After", "0")], b"try later", None)
            elif callable(fault):
                fault(Exchange(self, *self._ask(body)))
            else:
                self._answer(*self._ask(body), fault)

        def _is_taken(self) -> bool:
            if not proxy.conditional or self.headers.get("If-None-Match") != "*":
                return False
            with proxy.lock:
                known = self.path in proxy.taken
                proxy.taken.add(self.path)
            return known

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(proxy.upstream, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            skipped = {"transfer-encoding", "connection", "keep-alive"}
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in skipped]
            return answer.status, headers, data

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str | None
        ) -> None:
            self.send_response(status)
            names = {name.lower() for name, _ in headers}
            for name, value in headers:
                self.send_header(name, value)
            if "content-length" not in names:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "truncate" and data:
                self.wfile.write(data[: len(data) // 2])
                self._reset()
            elif fault == "drip":
                for start in range(0, len(data), max(len(data) // 7, 1)):
                    self.wfile.write(data[start : start + max(len(data) // 7, 1)])
                    self.wfile.flush()
            else:
                self.wfile.write(data)

        def _reset(self) -> None:
            """Close with RST, as a dying server does."""
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    return Handler
