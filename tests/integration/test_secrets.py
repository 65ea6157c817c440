"""A run that is given twelve kinds of secrets leaves none of them anywhere."""

import base64
import contextlib
import http.server
import json
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from stillroom.pipeline.cache.storage.bucket import BucketStorage
from stillroom.stages import __main__ as shell
from tests import run_texts
from tests.services import free_port

KINDS = {
    "environment": "Env0/rEnv1+Env2=",
    "hub": "hf_" + "Qz" * 17,
    "key id": "AKIAQQQQWWWWEEEERRRR",
    "s3 secret": "abc/DEF+ghi/JKL=mno",
    "password": "pa/ss:wo@rdQ7",
    "encoded": "en%2Fco%20dedQ8",
    "token in a query": "tick-et-Q9-tick",
    "signature": "c0ffee" * 8,
    "engine argument": "engine-Q10-secret",
    "bearer": "bear.er/Q11.bearerbearer",
    "github": "ghp_" + "Zx" * 18,
    "fsspec": "fsspec/Q12/secret",
}
TABLES = """
[teacher.engine_args]
hf_token = "{engine}"
[prepare]
window = 48
heldout = 0.2
[[prepare.source]]
name = "help"
kind = "pydoc_topics"
limit = 6
[capture]
k = 4
examples_per_shard = 8
"""


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Files for who knows the name, the password and the token; without ranges."""

    password = "Basic " + base64.b64encode(f"alice:{KINDS['password']}".encode()).decode()

    def send_head(self):
        """Of GET and HEAD alike."""
        known = self.headers.get("Authorization") == self.password
        if known and KINDS["token in a query"] in self.path:
            return super().send_head()
        self.send_error(401, f"no: {self.path} {self.headers.get('Authorization')}")
        return None

    def log_message(self, *_):
        """Quiet."""


@contextlib.contextmanager
def guarded(directory: Path):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Guarded, directory=str(directory))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def given(monkeypatch):
    """An environment with secrets, and no patience."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KINDS["environment"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KINDS["key id"])
    monkeypatch.setenv("HF_TOKEN", KINDS["hub"])
    monkeypatch.setenv("MY_API_KEY", KINDS["bearer"])
    monkeypatch.setenv("GITHUB_TOKEN", KINDS["github"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(BucketStorage.__init__, "__defaults__", (None, lambda seconds: None))


def test_no_artefact_holds_a_secret(given, tiny_llama, tmp_path, capfd, monkeypatch):
    place = tmp_path / "job"
    with guarded(place / "cache") as address:
        password = KINDS["password"].replace("/", "%2F").replace("@", "%40").replace(":", "%3A")
        ticket, signature = KINDS["token in a query"], KINDS["signature"]
        url = f"http://alice:{password}@{address}/?token={ticket}&X-Amz-Signature={signature}"
        bad = f"http://bob:{KINDS['encoded']}@{address}/?token=x"
        s3 = f"s3://{KINDS['key id']}:{KINDS['s3 secret']}@bucket/cache"
        file = tmp_path / "run.toml"
        names = {"directory": place, "teacher": tiny_llama, "cache": url, "steps": 2}
        more = TABLES.format(engine=KINDS["engine argument"])
        text = run_texts.TRAIN.format(**names, more=more)
        file.write_text(text)
        codes = []
        for line in (
            ["prepare", str(file)],
            ["capture", str(file), "--engine", "reference"],
            ["cache", "show", str(place / "cache")],
            ["cache", "show", url, "--json"],
            ["cache", "pull", url, str(tmp_path / "copy")],
            ["cache", "pull", bad, str(tmp_path / "none")],
            ["cache", "push", str(place / "cache"), s3],
            ["cache", "push", str(place / "cache"), "hf://datasets/o/n"],
            ["cache", "verify", url],
            ["cache", "ls", str(tmp_path)],
            ["train", str(file)],
            ["train", str(file), "--tokn", KINDS["hub"]],
        ):
            monkeypatch.setattr(sys, "argv", ["stillroom", *line])
            codes.append(shell.run(line, "show" not in line))
    said = capfd.readouterr()
    assert codes == [0, 0, 0, 0, 0, 2, codes[6], codes[7], 0, 0, 0, 2], said.err
    assert {codes[6], codes[7]} <= {2, 3}
    assert "Run again to go on" in said.err or codes[6] == 2
    assert "401" in said.err
    file.unlink()
    texts = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    texts |= {"stdout": said.out.encode(), "stderr": said.err.encode()}
    secrets = {*KINDS.values(), password, "pa/ss", "rdQ7", Guarded.password.split()[1]}
    found = [
        (where, secret)
        for where, data in texts.items()
        for secret in secrets
        if secret.encode() in data
    ]
    assert found == []
    assert len(json.loads((place / "run.json").read_text())) >= 3
