"""A cache behind a web server, read with an end to everything.

One idea: a web server is a stranger, so what it answers is bounded: in bytes by what was asked for,
or by what a file of that name may have; in time by a least rate. fsspec gives the session, with its
settings and credentials; the answer is read here. A server that sends whole files where a part was
asked for is put up with: small files are kept, of large ones the part is taken as it passes. It
does not write.
"""

import asyncio
import contextlib
import http
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from fsspec.asyn import sync

from stillroom.cache_schemas.scrubbing import scrub
from stillroom.pipeline.cache.storage.bucket import (
    GRACE_SECONDS,
    LEAST_RATE,
    BucketStorage,
    RefusedError,
    check_length,
)
from stillroom.pipeline.cache.storage.protocol import check_whole, most_bytes

KEPT_FILE_BYTES, KEPT_BYTES = 1 << 26, 1 << 28
"""Of a server that sends whole files: the largest that is kept in memory, and of all together."""
LISTING_BYTES = 1 << 24
LINK = re.compile(rb"""(?i)<a\s[^>]*?href\s*=\s*["']?([^"'?#>\s]+)""")
PART = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
GONE, NOT_NOW = (404, 410), (408, 425, 429)
NO_HEAD = (400, 403, 405, 501)
"""Answers of servers and signed links that know GET only."""


class WebStorage(BucketStorage):
    """Named bytes below a http or https URL; its query, if it has one, goes with every file."""

    rights = (
        "Ask whoever runs the server for access; name and password go into the URL, before the "
        "host and an @, and a signed link may have expired."
    )

    def __init__(self, url: str, *more: Any, **named: Any):
        super().__init__(url, *more, **named)
        self.location = scrub(url.partition("?")[0]).rstrip("/")
        self._kept = _Kept()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        data = self._kept.get(name) if start or length is not None else None
        if data is not None:
            return _part(data, start, length)
        return self._retry(lambda: self._ask(name, start, length), name, "read")

    def _ask(self, name: str, start: int, length: int | None) -> bytes:
        files, url = self._address(name)
        answer = _Answer(files, url, start, length, most_bytes(name))
        data = _waited(files, answer.read)
        if answer.is_whole_file:
            self._kept.put(name, data)
            return _part(data, start, length)
        check_length(data, length)
        return data

    def size(self, name: str) -> int | None:
        try:
            return self._retry(lambda: self._ask_size(name), name, "read")
        except FileNotFoundError:
            return None

    def _ask_size(self, name: str) -> int:
        files, url = self._address(name)
        answer = _Answer(files, url, 0, 1, most_bytes(name))
        found = _waited(files, answer.size)
        return len(self.read(name)) if found is None else found

    def list(self, folder: str) -> dict[str, int]:
        """Names that the server's page of a folder links to, if it has one; sizes are asked for."""
        files, url = self._address(f"{folder}/".lstrip("/"))
        answer = _Answer(files, url, 0, None, LISTING_BYTES)
        try:
            page = self._retry(lambda: _waited(files, answer.read), folder, "listed")
        except FileNotFoundError:
            return {}
        prefix = f"{folder}/" if folder else ""
        links = {link.decode("utf-8", "replace").removeprefix("./") for link in LINK.findall(page)}
        names = sorted(f"{prefix}{link}" for link in links if "/" not in link)
        return {name: size for name in names if (size := self.size(name)) is not None}

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        self._kept.drop(name)

    def _address(self, name: str) -> tuple[Any, str]:
        files, root = self._files()
        place, mark, query = root.partition("?")
        return files, f"{place.rstrip('/')}/{name}{mark}{query}"


def _waited(files: Any, work: Callable[[], Any]) -> Any:
    """What a coroutine gives, run in fsspec's thread."""
    return sync(files.loop, work)


def _part(data: bytes, start: int, length: int | None) -> bytes:
    part = data[start:] if length is None else data[start : start + length]
    check_length(part, length)
    return part


class _Kept:
    """Whole files in memory, of bounded size; those used longest ago go first."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            self._files[name] = data
            while sum(map(len, self._files.values())) > KEPT_BYTES:
                self._files.popitem(last=False)

    def drop(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)


class _Answer:
    """One question and what came.

    Attributes:
        is_whole_file: what `read` gave is the file from its start, though a part was asked for.
    """

    def __init__(self, files: Any, url: str, start: int, length: int | None, most: int):
        self.files, self.url, self.start, self.length, self.most = files, url, start, length, most
        self.is_whole_file = False

    async def read(self) -> bytes:
        """The part asked for, or the whole file where that came and is small."""
        async with self._timed() as limit, self._opened("GET", self._range()) as answer:
            self._check(answer)
            return await self._body(answer, limit)

    async def size(self) -> int | None:
        """Bytes of the file; None where the server does not tell."""
        async with self._timed():
            async with self._opened("HEAD", {}) as answer:
                if answer.status not in NO_HEAD:
                    self._check(answer)
                    return answer.content_length
            async with self._opened("GET", self._range()) as answer:
                if answer.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return 0  # no byte to be had of an empty file
                self._check(answer)
                return self._total(answer)

    def _timed(self) -> asyncio.Timeout:
        self.began = asyncio.get_running_loop().time()
        return asyncio.timeout_at(self.began + GRACE_SECONDS)

    @contextlib.asynccontextmanager
    async def _opened(self, verb: str, headers: dict[str, str]) -> AsyncIterator[Any]:
        """An answer; where it is not read to its end, its connection is closed."""
        session, settings = await self.files.set_session(), dict(self.files.kwargs)
        headers = {"Accept-Encoding": "identity"} | settings.pop("headers", {}) | headers
        address = self.files.encode_url(self.url)
        async with session.request(verb, address, headers=headers, **settings) as answer:
            yield answer

    def _range(self) -> dict[str, str]:
        if not self.start and self.length is None:
            return {}
        end = "" if self.length is None else self.start + self.length - 1
        return {"Range": f"bytes={self.start}-{end}"}

    def _check(self, answer: Any) -> None:
        """Refuse what is no answer to the question."""
        status = answer.status
        if status in GONE:
            raise FileNotFoundError(self.url)
        if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise OSError("the server's file ends before the part that was asked for")
        if status >= 500 or status in NOT_NOW:
            raise OSError(f"the server answers {status} {answer.reason}")
        if status not in (200, 206):
            raise RefusedError(f"the server answers {status} {answer.reason}", status)
        found = PART.fullmatch(answer.headers.get("Content-Range", ""))
        if status == 206 and not (found and int(found[1]) == self.start):
            raise OSError("the server sent another part than was asked for")

    def _total(self, answer: Any) -> int | None:
        found = PART.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status == 206 and found:
            return int(found[3]) if found[3].isdecimal() else None
        return answer.content_length

    async def _body(self, answer: Any, limit: asyncio.Timeout) -> bytes:
        asked_part = bool(self._range())
        if answer.status == 206 or not asked_part:
            return await self._joined(answer, limit, 0, self.length)
        size = answer.content_length
        self.is_whole_file = size is not None and size <= KEPT_FILE_BYTES
        if self.is_whole_file:
            return await self._joined(answer, limit, 0, size)
        return await self._joined(answer, limit, self.start, self.length)

    async def _joined(
        self, answer: Any, limit: asyncio.Timeout, skipped: int, length: int | None
    ) -> bytes:
        """`length` bytes after the first `skipped`, or all that follow; no more is read."""
        most = self.most if length is None else length
        if length is None and (answer.content_length or 0) > most:
            check_whole(self.url, answer.content_length, most)
        body = bytearray()
        async for piece in self._pieces(answer, limit):
            body += piece[skipped:] if skipped else piece
            skipped = max(skipped - len(piece), 0)
            if len(body) > most and length is None:
                check_whole(self.url, len(body), most)
            if length is not None and len(body) >= length:
                break
        return bytes(body[:length])

    async def _pieces(self, answer: Any, limit: asyncio.Timeout) -> AsyncIterator[bytes]:
        """What comes, for as long as it comes fast enough."""
        received = 0
        async for piece in answer.content.iter_any():
            received += len(piece)
            limit.reschedule(self.began + GRACE_SECONDS + received / LEAST_RATE)
            yield piece
