"""A model hub on this machine: just enough of its HTTP interface for the real client to talk to.

One idea: the loading code is the one that runs against the real hub; only the address differs.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def commit_of(revision: str) -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Serves `self.server.repos`: id -> revision -> path -> bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """`paths-info`: which of the paths asked for there are."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self._answer(body=True, asked=asked)

    def log_message(self, *_) -> None:
        pass

    def _answer(self, body: bool, asked: list[str] | None = None) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        status, data, headers = self._found(path, asked)
        if status == 200 and (wanted := self.headers.get("Range")):
            start, end = wanted.removeprefix("bytes=").split("-")
            headers |= {"Content-Range": f"bytes {wanted[6:]}/{len(data)}"}
            status, data = 206, data[int(start) : int(end or len(data)) + 1]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _found(self, path: str, asked: list[str] | None) -> tuple[int, bytes, dict[str, str]]:
        for repo, revisions in self.server.repos.items():  # type: ignore[attr-defined]
            if path == f"api/datasets/{repo}":
                return self._listing(revisions, "revision", "main")
            if asked is not None and path.startswith(f"api/datasets/{repo}/paths-info/"):
                return _json(_entries(revisions["main"], lambda name: name in asked))
            if path.startswith(f"api/datasets/{repo}/"):
                return self._listing(
                    revisions, *path.removeprefix(f"api/datasets/{repo}/").split("/", 1)
                )
            if path.startswith(f"datasets/{repo}/resolve/"):
                return self._file(revisions, path.removeprefix(f"datasets/{repo}/resolve/"))
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def _listing(self, revisions, kind: str, rest: str) -> tuple[int, bytes, dict[str, str]]:
        known = revisions | {commit_of(name): files for name, files in revisions.items()}
        revision, folder = rest.replace("%2F", "/"), ""
        if kind == "tree" and revision not in known:
            revision, _, folder = revision.partition("/")
        files = known.get(revision)
        if files is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if kind == "tree":
            found = _entries(files, lambda name: not folder or name.startswith(f"{folder}/"))
            return _json(found) if found or not folder else (404, b"[]", {})
        facts = {
            "id": "x/y",
            "sha": commit_of(revision),
            "siblings": [{"rfilename": name} for name in files],
        }
        return _json(facts)

    def _file(self, revisions, rest: str) -> tuple[int, bytes, dict[str, str]]:
        commit, name = rest.split("/", 1)
        files = (revisions | {commit_of(name): files for name, files in revisions.items()})[commit]
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        headers = {"ETag": f'"{_sha1(files[name])}"', "X-Repo-Commit": commit}
        return 200, files[name], headers


def _entries(files: dict[str, bytes], wanted) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
        for name, data in files.items()
        if wanted(name)
    ]


def _json(value) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextmanager
def serve(repos: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[str]:
    """Serve data sets (id -> revision -> path -> bytes); yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repos = repos  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
