"""A model hub on this machine: just enough of its HTTP interface for the real client to talk to.

One idea: the loading code is the one that runs against the real hub; only the address differs.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


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
        """`paths-info`: which of the paths asked for there are; everything else writes."""
        text = self._body()
        if "/paths-info/" in self.path:
            self._answer(body=True, asked=json.loads(text)["paths"])
        else:
            self._say(*self.server.inbox.answer(self.path, text))  # type: ignore[attr-defined]

    def do_PUT(self) -> None:
        """A large file's bytes."""
        self.server.inbox.large[self.path.rsplit("/", 1)[1]] = self._body()  # type: ignore[attr-defined]
        self._say(200, b"", {})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_) -> None:
        pass

    def _answer(self, body: bool, asked: list[str] | None = None) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        status, data, headers = self._found(path, asked)
        if status == 200 and (wanted := self.headers.get("Range")):
            start, end = wanted.removeprefix("bytes=").split("-")
            headers |= {"Content-Range": f"bytes {wanted[6:]}/{len(data)}"}
            status, data = 206, data[int(start) : int(end or len(data)) + 1]
        self._say(status, data, headers, body)

    def _say(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
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
            if folder and not found:
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            return _json(found)
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


LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "unknown", "other")
"""Of the hub's own list."""


def _faults(card: str) -> Iterator[dict[str, str]]:
    """What the hub would say of a card's front matter."""
    told = yaml.safe_load(card.split("---")[1])
    if told.get("license", "unknown") not in LICENCES:
        yield {"message": f"license {told['license']}"}
    if any(len(code) not in (2, 3) for code in told.get("language", ())):
        yield {"message": f"language {told['language']}"}
    if not re.fullmatch(r"n<1K|n>1T|1*0*[KMBT]<n<1*0*[KMBT]", told["size_categories"][0]):
        yield {"message": "size_categories"}
    if sum(bool(one.get("default")) for one in told["configs"]) != 1:
        yield {"message": "configs: one default"}


def _json(value) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


class Inbox:
    """What is written to a hub's data sets.

    Attributes:
        large: content by SHA-256, as sent.
        commits: titles, in order.
        refuse: called with a commit's title; a status other than 200 turns it down.
    """

    def __init__(self, repos: dict[str, dict[str, dict[str, bytes]]]):
        self.repos, self.address = repos, ""
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.refuse: Callable[[str], int] = lambda title: 200

    def answer(self, path: str, text: bytes) -> tuple[int, bytes, dict[str, str]]:
        """What the hub says to a POST."""
        path = path.partition("?")[0]
        if path == "/api/validate-yaml":
            return _json({"errors": list(_faults(json.loads(text)["content"])), "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(text)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos[name] = {"main": {}}
            return _json({"url": f"{self.address}/datasets/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            return _json({"objects": [self._large(one) for one in json.loads(text)["objects"]]})
        repo, _, verb = path.removeprefix("/api/datasets/").rpartition("/")[0].rpartition("/")
        files = self.repos[repo]["main"]
        return self._modes(files, text) if verb == "preupload" else self._commit(repo, text)

    def _large(self, asked: dict) -> dict:
        href = f"{self.address}/large/{asked['oid']}"
        known = asked["oid"] in self.large
        return asked | ({} if known else {"actions": {"upload": {"href": href}}})

    def _modes(self, files: dict[str, bytes], text: bytes):
        def mode(path: str) -> dict:
            oid = _sha1(files[path]) if path in files else None
            kind = "lfs" if path.endswith(".arrow") else "regular"
            return {"path": path, "uploadMode": kind, "shouldIgnore": False, "oid": oid}

        return _json({"files": [mode(one["path"]) for one in json.loads(text)["files"]]})

    def _commit(self, repo: str, text: bytes) -> tuple[int, bytes, dict[str, str]]:
        files = self.repos[repo]["main"]
        head, *rest = [json.loads(line) for line in text.splitlines()]
        title = head["value"]["summary"]
        if (status := self.refuse(title)) != 200:
            return status, b"{}", {}
        self.commits.append(title)
        for line in rest:
            value = line["value"]
            large = line["key"] == "lfsFile"
            content = self.large[value["oid"]] if large else base64.b64decode(value["content"])
            files[value["path"]] = content
        commit = commit_of(title)
        url = f"{self.address}/datasets/{repo}/commit/{commit}"
        return _json({"commitUrl": url, "commitOid": commit})


@contextmanager
def serve(
    repos: dict[str, dict[str, dict[str, bytes]]], inbox: Inbox | None = None
) -> Iterator[str]:
    """Serve data sets (id -> revision -> path -> bytes), and take what is written to them into
    `inbox`; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repos = repos  # type: ignore[attr-defined]
    server.inbox = inbox = inbox or Inbox(repos)  # type: ignore[attr-defined]
    inbox.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
