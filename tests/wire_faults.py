"""What a server, or what lies between, may answer: fifty ways to be wrong, one function each.

One idea: a fault takes the place of an answer that was right, on a real connection, so it says with
bytes what happens in life. `Proxy` calls it; nothing here knows what a cache is.
"""

import contextlib
import gzip
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

Headers = list[tuple[str, str]]
ENDLESS_BYTES = 1 << 31
"""Where an answer without an end gives up by itself."""
STALL_SECONDS = 30.0


@dataclass
class Exchange:
    """An answer that could be sent as it is."""

    handler: BaseHTTPRequestHandler
    status: int
    headers: Headers
    data: bytes

    def answer(self, status: int, headers: Headers, data: bytes, sent: int | None = None) -> None:
        """Send an answer whose Content-Length is that of `data`; `sent` bytes of it only."""
        self.begin(status, [*headers, ("Content-Length", str(len(data)))])
        if self.handler.command != "HEAD":
            self.raw(data[:sent])

    def begin(self, status: int, headers: Headers) -> None:
        """Status and headers alone."""
        self.handler.send_response(status)
        for name, value in headers:
            self.handler.send_header(name, value)
        self.handler.end_headers()

    def same(self, data: bytes, sent: int | None = None, *more: tuple[str, str]) -> None:
        """The right status and headers with another body."""
        self.answer(self.status, [*self.without("content-length"), *more], data, sent)

    def without(self, *names: str) -> Headers:
        """The right headers but some."""
        return [(name, value) for name, value in self.headers if name.lower() not in names]

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def close(self) -> None:
        """End the connection as a server does that thinks it is done."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_WR)

    def stall(self, seconds: float = STALL_SECONDS) -> None:
        """Say nothing until the other side leaves."""
        self.handler.connection.settimeout(seconds)
        with contextlib.suppress(OSError):
            self.handler.connection.recv(1)
        self.handler.close_connection = True


Fault = Callable[[Exchange], None]
FAULTS: dict[str, Fault] = {}


def fault(work: Fault) -> Fault:
    """Enter a fault under its name."""
    FAULTS[work.__name__] = work
    return work


def _status(code: int) -> None:
    FAULTS[f"status {code}"] = lambda x: x.answer(code, [("Retry-After", "0")], b"no")


for _code in (204, 400, 401, 403, 404, 407, 408, 410, 416, 418, 429, 500, 502, 503, 504):
    _status(_code)


@fault
def closed_before_the_answer(x: Exchange) -> None:
    x.close()


@fault
def closed_in_the_headers(x: Exchange) -> None:
    x.raw(b"HTTP/1.1 200 OK\r\nContent-Le")
    x.close()


@fault
def cut_in_the_middle(x: Exchange) -> None:
    x.same(x.data, len(x.data) // 2)
    x.close()


@fault
def half_a_body_that_says_it_is_all(x: Exchange) -> None:
    x.same(x.data[: len(x.data) // 2])


@fault
def an_empty_body(x: Exchange) -> None:
    x.same(b"")


@fault
def one_byte_too_few(x: Exchange) -> None:
    x.same(x.data[:-1])


@fault
def more_than_was_asked_for(x: Exchange) -> None:
    x.same(x.data + b"\0" * 1000)


@fault
def more_than_it_says(x: Exchange) -> None:
    x.same(x.data)
    x.raw(b"garbage" * 100)
    x.close()


@fault
def no_length(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Connection", "close")])
    x.raw(x.data)
    x.close()


@fault
def in_chunks(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Transfer-Encoding", "chunked")])
    for piece in (x.data[:7], x.data[7:]):
        if piece:
            x.raw(b"%x\r\n%s\r\n" % (len(piece), piece))
    x.raw(b"0\r\n\r\n")


@fault
def chunks_cut_off(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Transfer-Encoding", "chunked")])
    x.raw(b"%x\r\n%s" % (len(x.data) + 5, x.data))
    x.close()


@fault
def chunks_without_end(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Transfer-Encoding", "chunked")])
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    for _ in range(ENDLESS_BYTES >> 20):
        x.raw(piece)
    x.close()


@fault
def a_length_of_a_terabyte(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Content-Length", str(1 << 40))])
    for _ in range(ENDLESS_BYTES >> 20):
        x.raw(bytes(1 << 20))
    x.close()


@fault
def two_lengths(x: Exchange) -> None:
    x.begin(x.status, [("Content-Length", "3"), ("Content-Length", str(len(x.data)))])
    x.raw(x.data)
    x.close()


@fault
def a_negative_length(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Content-Length", "-5")])
    x.raw(x.data)
    x.close()


@fault
def byte_by_byte(x: Exchange) -> None:
    x.begin(x.status, [*x.without("content-length"), ("Content-Length", str(len(x.data)))])
    for byte in x.data:
        x.raw(bytes([byte]))
        if threading.Event().wait(0.5):
            return


@fault
def silent_before_the_answer(x: Exchange) -> None:
    x.stall()


@fault
def silent_in_the_middle(x: Exchange) -> None:
    x.same(x.data, len(x.data) // 2)
    x.stall()


@fault
def headers_byte_by_byte(x: Exchange) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 60:
        x.raw(bytes([byte]))
        if threading.Event().wait(0.5):
            return
    x.close()


@fault
def another_part(x: Exchange) -> None:
    x.answer(206, [("Content-Range", "bytes 1-9/10")], x.data[::-1])


@fault
def a_part_without_its_place(x: Exchange) -> None:
    x.answer(206, [], x.data)


@fault
def one_bit(x: Exchange) -> None:
    x.same(x.data[:-1] + bytes([x.data[-1] ^ 4]) if x.data else b"")


@fault
def zeros(x: Exchange) -> None:
    x.same(bytes(len(x.data)))


@fault
def bytes_in_another_order(x: Exchange) -> None:
    x.same(x.data[::-1])


@fault
def a_page(x: Exchange) -> None:
    x.answer(200, [("Content-Type", "text/html")], b"<html>Please log in</html>")


@fault
def a_redirect_to_itself(x: Exchange) -> None:
    x.answer(302, [("Location", x.handler.path)], b"")


@fault
def a_redirect_to_nowhere(x: Exchange) -> None:
    x.answer(302, [("Location", "http://127.0.0.1:9/x")], b"")


@fault
def a_redirect_to_a_file(x: Exchange) -> None:
    x.answer(302, [("Location", "file:///etc/hostname")], b"")


@fault
def packed(x: Exchange) -> None:
    x.same(gzip.compress(x.data), None, ("Content-Encoding", "gzip"))


@fault
def packed_zeros(x: Exchange) -> None:
    x.same(gzip.compress(bytes(1 << 28), 1), None, ("Content-Encoding", "gzip"))


@fault
def not_packed_as_it_says(x: Exchange) -> None:
    x.same(x.data, None, ("Content-Encoding", "gzip"))


@fault
def no_http(x: Exchange) -> None:
    x.raw(b"SSH-2.0-OpenSSH_9.9\r\n" + x.data[:100])
    x.close()


@fault
def a_body_without_headers(x: Exchange) -> None:
    x.raw(x.data)
    x.close()


@fault
def a_header_of_a_megabyte(x: Exchange) -> None:
    x.same(x.data, None, ("X-Large", "a" * (1 << 20)))


@fault
def ten_thousand_headers(x: Exchange) -> None:
    x.same(x.data, None, *[(f"X-{number}", "a") for number in range(10_000)])
