"""A web server's answer made of a fuzzer's bytes, and what a cache's storage makes of it.

One idea: the first line of the bytes is the answer's head (status, lengths, Content-Range) and the
rest its body, so a fuzzer bends both; whatever comes, a read gives the part that was asked for or
refuses. No socket is opened.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from fsspec.asyn import get_loop

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.cache.storage.web import WebStorage

STATUSES = (200, 206, 204, 301, 401, 404, 416, 429, 500, 999)
LENGTHS = (None, 0, 1, 1 << 40)
"""Content-Length that is said, where it is not the body's own."""


class Answer:
    """What aiohttp's response is to the storage.

    Args:
        data: head, a line break, and body.
    """

    def __init__(self, data: bytes):
        head, _, self.body = data.partition(b"\n")
        first, second = (head[at] if len(head) > at else 0 for at in (0, 1))
        self.status, self.reason = STATUSES[first % len(STATUSES)], "said so"
        self.headers = {"Content-Range": head[2:].decode("utf-8", "replace")}
        said = second % (len(LENGTHS) + 1)
        self.content_length = len(self.body) if said == len(LENGTHS) else LENGTHS[said]
        self.content = self

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *about: object) -> None:
        """Nothing to close."""

    async def iter_any(self) -> AsyncIterator[bytes]:
        """The body in pieces."""
        for start in range(0, len(self.body), 7):
            yield self.body[start : start + 7]


class Files:
    """fsspec's file system, session and all, whose every answer is the same."""

    loop, kwargs = get_loop(), {}

    def __init__(self, data: bytes):
        self.data = data

    async def set_session(self) -> "Files":
        """Itself."""
        return self

    def encode_url(self, url: str) -> str:
        """As it is."""
        return url

    def request(self, verb: str, address: str, **options: Any) -> Answer:
        """The answer."""
        return Answer(self.data)


def http(data: bytes) -> None:
    """Any verb of reading, from such a server."""
    storage = WebStorage("http://localhost/cache", pause=lambda seconds: None)
    storage._files = lambda: (Files(data), "http://localhost/cache")  # type: ignore[method-assign]
    asked = (
        lambda: len(storage.read("rows/000/000000.arrow", 3, 5)) == 5,
        lambda: isinstance(storage.read("manifest.json"), bytes),
        lambda: (storage.size("plan.json") or 0) >= 0,
        lambda: isinstance(storage.list("receipts/000"), dict),
    )
    if not sum(map(_taken, asked)):  # every one is tried
        raise StillroomError("refused")


def _taken(ask: Callable[[], bool]) -> bool:
    try:
        assert ask(), "not what was asked for"
    except (StillroomError, FileNotFoundError):
        return False
    return True


SEEDS = [
    b"\x01\x04bytes 3-7/12\nabcde",
    b"\x00\x04\nabcdefghijkl",
    b'\x00\x00\n<a href="manifest.json">',
]
