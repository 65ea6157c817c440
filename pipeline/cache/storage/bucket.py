"""A cache in a bucket, through fsspec.

One idea: every call is retried a bounded number of times and ends in a bounded time, its answer's
length is checked, and a file is created with a conditional put where the service has one. What a
person reads never shows a credential. It keeps nothing between calls. Web servers are `web.py`.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from stillroom.cache_schemas.errors import CacheError, CacheIncomplete
from stillroom.cache_schemas.scrubbing import remember, scrub
from stillroom.pipeline.cache.storage.directory import locked
from stillroom.pipeline.cache.storage.patience import within
from stillroom.pipeline.cache.storage.protocol import TRIES, Claim, check_whole, most_bytes
from stillroom.pipeline.cache.storage.services import (
    check_no_credentials,
    defaults,
    missing_package,
)

ATTEMPTS = 6
PATIENCE_SECONDS = 150.0
"""After so long no attempt is begun."""
GRACE_SECONDS, LEAST_RATE = 60.0, 1 << 14
"""An attempt may take so long, and a second more for every 16 KiB."""
NO_RIGHTS = (401, 403, 407)
NO_NAME = "ParamValidation"
"""In the name of an S3 client's error about a bucket that cannot be."""
STAGING = "stillroom-"
FINAL = (FileNotFoundError, FileExistsError, NotImplementedError, TypeError, CacheError)
"""Failures that another attempt does not mend."""

Answer = TypeVar("Answer")


class RefusedError(OSError):
    """A service's answer that says no rather than not now.

    Args:
        said: in its words.
        status: of HTTP.
    """

    def __init__(self, said: str, status: int):
        super().__init__(said)
        self.status = status


class BucketStorage:
    """Named bytes below a fsspec URL.

    Args:
        url: such as `s3://bucket/cache`, `hf://datasets/owner/name`.
        options: passed to the file system; credentials belong there or in the environment.
        pause: waits between attempts.
    """

    rights = "Check the credentials and their rights on this bucket."
    """What to do where access is denied."""

    def __init__(
        self,
        url: str,
        options: dict[str, Any] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.url, self.location, self.pause = url.rstrip("/"), scrub(url).rstrip("/"), pause
        self.options = options or {}
        remember(url)
        check_no_credentials(url, self.location)
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple:
        return type(self), (self.url, self.options, self.pause)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        most, tries = most_bytes(name), itertools.count(1)
        # Of a file read whole one byte more than any of its kind has is enough to know.
        size = most + 1 - start if length is None else length

        def attempt() -> bytes:
            data = self._call("cat_file", name, size, start=start or None, end=start + size)
            check_length(data, length)
            if length is not None and len(data) > length:
                self._sent_more(name, len(data), length, next(tries))
            return data

        data = self._retry(attempt, name, "read")
        if length is None:
            check_whole(f"{self.location}/{name}", start + len(data), most)
        return data

    def forget(self, name: str, start: int = 0, length: int | None = None) -> None:
        """Nothing of a file is kept."""

    def size(self, name: str) -> int | None:
        try:
            return self._retry(lambda: self._call("info", name), name, "read")["size"]
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> dict[str, int]:
        try:
            found = self._retry(lambda: self._call("ls", folder, detail=True), folder, "listed")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        prefix = f"{folder}/" if folder else ""
        files = [entry for entry in found if entry["type"] == "file"]
        return {prefix + entry["name"].rsplit("/", 1)[1]: entry["size"] for entry in files}

    def create(self, name: str, source: bytes | Path) -> bool:
        if self.size(name) is not None:
            return False
        try:
            self._retry(lambda: self._put(source, name, mode="create"), name, "written")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        self._retry(lambda: self._put(data, name), name, "written")

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retry(lambda: self._call("rm_file", name), name, "deleted")

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=STAGING) as folder, locked(Path(folder)):
            yield Path(folder)

    def sweep(self) -> None:
        """Staging is on this machine's own disk; what nobody holds there has lost its owner."""
        for left in Path(tempfile.gettempdir()).glob(f"{STAGING}*"):
            with contextlib.suppress(OSError):
                if not left.is_symlink() and left.stat().st_uid == os.getuid():
                    with locked(left):
                        shutil.rmtree(left)

    def strangers(self) -> tuple[str, ...]:
        return tuple(sorted(self.list("")))

    def claim(self, name: str) -> Claim:
        """Always granted: a bucket cannot tell whether a claimant is alive."""
        return Claim()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A bucket has no locks."""
        return contextlib.nullcontext()

    def _files(self) -> tuple[Any, str]:
        """The file system and the root in it, anew after a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                options = defaults(self.url) | self.options
                self._opened = (os.getpid(), *url_to_fs(self.url, **options))
            except (ValueError, ImportError) as error:
                raise CacheError(
                    f"cannot be opened ({scrub(str(error))[:200]})",
                    where=self.location,
                    remedy=f"Check the URL{missing_package(self.url)}.",
                ) from None
        return self._opened[1], self._opened[2]

    def _call(self, verb: str, name: str, num_bytes: int = 0, **options: Any) -> Any:
        """Ask the file system, without trusting what it remembers of its folders; but a finished
        file never changes, so reading one may. `num_bytes` may come."""
        files, root = self._files()
        path = f"{root}/{name}".rstrip("/")
        if verb == "cat_file":
            with contextlib.suppress(FileNotFoundError):
                return _within(files, verb, num_bytes, path, **options)
        files.invalidate_cache()
        return _within(files, verb, num_bytes, path, **options)

    def _put(self, source: bytes | Path, name: str, **options: Any) -> None:
        files, root = self._files()
        path = f"{root}/{name}"
        try:
            if isinstance(source, bytes):
                _within(files, "pipe_file", len(source), path, source, **options)
            else:
                size = source.stat().st_size
                _within(files, "put_file", size, str(source), path, **options)
        except FileNotFoundError:
            raise CacheError(
                "cannot be written: the service knows no such place",
                where=f"{self.location}/{name}",
                remedy="Make the bucket, or check the URL.",
            ) from None
        except Exception as error:
            if _is_taken(error):
                raise FileExistsError(path) from error
            raise

    def _retry(self, attempt: Callable[[], Answer], name: str, verb: str) -> Answer:
        began = time.monotonic()
        for count in range(ATTEMPTS):
            try:
                return attempt()
            except FINAL:
                raise
            except Exception as error:
                if isinstance(error, PermissionError) or _is_final(error):
                    raise self._forbidden(name, verb, error) from None
                last = error
            if time.monotonic() - began > PATIENCE_SECONDS:
                break
            self.pause(0.1 * 2**count)  # seconds: 0.1, 0.2, 0.4, ...
        raise CacheIncomplete(f"cannot be {verb} ({_told(last)})", where=f"{self.location}/{name}")

    def _sent_more(self, name: str, found: int, length: int, tries: int) -> NoReturn:
        """Refuse, for this once or at last, an answer that is more than was asked for."""
        told = f"{found:,} bytes came where {length:,} were asked for"
        if tries < TRIES:
            raise OSError(told)
        raise CacheError(
            told,
            expected="a service that sends parts of files",
            where=f"{self.location}/{name}",
            remedy="Copy the cache to a disk by other means, and use it there.",
        )

    def _forbidden(self, name: str, verb: str, error: Exception) -> CacheError:
        is_no_name = NO_NAME in type(error).__name__
        rights = not is_no_name and getattr(error, "status", 403) in NO_RIGHTS
        return CacheError(
            f"{'may not' if rights else 'cannot'} be {verb} ({scrub(str(error))[:200]})",
            where=f"{self.location}/{name}",
            remedy=self.rights if rights else "Check the URL.",
        )


def check_length(data: bytes, length: int | None) -> None:
    """Refuse, for this once, an answer that ends too early."""
    if length is not None and len(data) < length:
        raise OSError(f"{len(data)} bytes came of {length}")


def _within(files: Any, verb: str, num_bytes: int, *more: Any, **options: Any) -> Any:
    """A call of a file system, with an end."""
    seconds = GRACE_SECONDS + num_bytes / LEAST_RATE
    if not getattr(files, "async_impl", False):
        return within(seconds, lambda: getattr(files, verb)(*more, **options))
    return sync(files.loop, getattr(files, f"_{verb}"), *more, timeout=seconds, **options)


def _told(error: Exception) -> str:
    """What went wrong, in few words."""
    if isinstance(error, TimeoutError):
        return f"{type(error).__name__}: too little came in {GRACE_SECONDS:g} seconds"
    return f"{type(error).__name__}: {scrub(str(error))[:200]}"


def _is_taken(error: BaseException | None) -> bool:
    """True for the answer to a conditional put of a name that is taken (HTTP 412)."""
    if error is None:
        return False
    code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code")
    taken = code == "PreconditionFailed" or getattr(error, "status", None) == 412
    return taken or _is_taken(error.__cause__)


def _is_final(error: Exception) -> bool:
    """True for an answer of the service that says no rather than not now."""
    status = getattr(error, "status", None)
    no = isinstance(error, RefusedError) or status in NO_RIGHTS
    return no or any(word in type(error).__name__ for word in ("Credentials", NO_NAME))
