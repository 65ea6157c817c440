"""A cache in a bucket or behind a web server, through fsspec.

One idea: every call is retried a bounded number of times, its answer's length is checked, and a
file is created with a conditional put where the service has one. What a person reads never shows
a credential. It keeps nothing between calls.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.config
from fsspec.core import url_to_fs

from stillroom.cache_schemas.errors import CacheError, CacheIncomplete
from stillroom.pipeline.cache.storage.directory import Claim, cut_short
from stillroom.pipeline.cache.storage.scrubbing import scrub

ATTEMPTS = 6
READ_TIMEOUT_SECONDS = 60
FINAL = (FileNotFoundError, FileExistsError, NotImplementedError, TypeError, CacheError)
"""Failures that another attempt does not mend."""

Answer = TypeVar("Answer")


class BucketStorage:
    """Named bytes below a fsspec URL.

    Args:
        url: such as `s3://bucket/cache`, `hf://datasets/owner/name`, `https://host/cache`.
        options: passed to the file system; credentials belong there or in the environment.
        pause: waits between attempts.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, Any] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ):
        self.url, self.location, self.pause = url.rstrip("/"), scrub(url).rstrip("/"), pause
        self.options = options or {}
        self._opened: tuple[int, Any, str] | None = None

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        stop = None if length is None else start + length
        if length == 0:
            return b""

        def attempt() -> bytes:
            data = self._call("cat_file", name, start=start or None, end=stop)
            if length is not None and len(data) < length:
                raise OSError(f"{len(data)} bytes came of {length}")
            return data

        data = self._retry(attempt, name, "read")
        if length is not None and len(data) != length:
            cut_short(f"{self.location}/{name}", len(data), length)
        return data

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
        with tempfile.TemporaryDirectory(prefix="stillroom-") as folder:
            yield Path(folder)

    def sweep(self) -> None:
        """Staging is on this machine's own disk, and is removed with its owner's session."""

    def claim(self, name: str) -> Claim:
        """Always granted: a bucket cannot tell whether a claimant is alive."""
        return Claim()

    def _files(self) -> tuple[Any, str]:
        """The file system and the root in it, anew after a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                options = _defaults(self.url) | self.options
                self._opened = (os.getpid(), *url_to_fs(self.url, **options))
            except (ValueError, ImportError) as error:
                raise CacheError(
                    f"cannot be opened ({scrub(str(error))[:200]})",
                    where=self.location,
                    remedy=f"Check the URL{_missing_package(self.url)}.",
                ) from None
        return self._opened[1], self._opened[2]

    def _call(self, verb: str, name: str, **options: Any) -> Any:
        """Ask the file system, without trusting what it remembers of its folders; but a finished
        file never changes, so reading one may."""
        files, root = self._files()
        path = f"{root}/{name}".rstrip("/")
        if verb == "cat_file":
            with contextlib.suppress(FileNotFoundError):
                return files.cat_file(path, **options)
        files.invalidate_cache()
        return getattr(files, verb)(path, **options)

    def _put(self, source: bytes | Path, name: str, **options: Any) -> None:
        files, root = self._files()
        path = f"{root}/{name}"
        try:
            if isinstance(source, bytes):
                files.pipe_file(path, source, **options)
            else:
                files.put_file(str(source), path, **options)
        except Exception as error:
            if _is_taken(error):
                raise FileExistsError(path) from error
            raise

    def _retry(self, attempt: Callable[[], Answer], name: str, verb: str) -> Answer:
        for count in range(ATTEMPTS):
            try:
                return attempt()
            except FINAL:
                raise
            except PermissionError as error:
                raise self._forbidden(name, verb, error) from None
            except Exception as error:
                if _is_final(error):
                    raise self._forbidden(name, verb, error) from None
                last = error
                self.pause(0.1 * 2**count)  # seconds: 0.1, 0.2, 0.4, ...
        raise CacheIncomplete(
            f"cannot be {verb} ({type(last).__name__}: {scrub(str(last))[:200]})",
            where=f"{self.location}/{name}",
        )

    def _forbidden(self, name: str, verb: str, error: Exception) -> CacheError:
        return CacheError(
            f"may not be {verb} ({scrub(str(error))[:200]})",
            where=f"{self.location}/{name}",
            remedy="Check the credentials and their rights on this bucket.",
        )


def _missing_package(url: str) -> str:
    """What to install for a protocol that needs more than we do."""
    extras = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
    extra = extras.get(url.split("://", 1)[0])
    return f"; `pip install 'stillroom[{extra}]'` adds what it needs" if extra else ""


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
    return status in (401, 403) or "Credentials" in type(error).__name__


def _defaults(url: str) -> dict[str, Any]:
    """Time limits, and settings that S3 servers other than Amazon's need."""
    protocol = url.split("://", 1)[0]
    if protocol in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=READ_TIMEOUT_SECONDS)}}
    if protocol not in ("s3", "s3a"):
        return {}
    config = {
        "read_timeout": READ_TIMEOUT_SECONDS,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"config_kwargs": config | own}
