"""Hub data sets through the real hub client, against a hub on this machine."""

import json
import os
import subprocess
import sys

import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Source
from stillroom.pipeline.corpus.hub import choose, open_hub
from tests import fake_hub, tiny_models

RUN = """
name = "hub"
directory = "{directory}"
[teacher]
model = "{teacher}"
[prepare]
window = 64
[[prepare.source]]
name = "hub"
kind = "hub"
path = "{path}"
{more}
"""


def rows(first: int, count: int = 4) -> bytes:
    texts = [tiny_models.english()[i * 400 :][:400] for i in range(first, first + count)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


REPOS = {
    "org/plain": {"main": {"README.md": b"# x", "train.jsonl": rows(0), "test.jsonl": rows(9)}},
    "org/converted": {
        "main": {"loader.py": b"raise SystemExit"},
        "refs/convert/parquet": {"default/train/0000.jsonl": rows(20)},
    },
    "org/two": {"main": {"en/data/train.jsonl": rows(0), "de/data/train.jsonl": rows(5)}},
}


class Hub:
    """Runs `stillroom prepare` on a hub data set in a process with its own hub cache."""

    def __init__(self, root, teacher):
        self.root, self.teacher, self.address = root, teacher, "http://127.0.0.1:9"

    def prepare(self, path: str, more: str = "", offline: bool = False):
        directory = self.root / path.replace("/", "-")
        file = self.root / "run.toml"
        values = {"directory": directory, "teacher": self.teacher, "path": path, "more": more}
        file.write_text(RUN.format(**values))
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.root / "hf")}
        settings |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "stillroom.stages", "prepare", str(file)],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        facts = directory / "corpus" / "corpus.json"
        return done, json.loads(facts.read_text()) if facts.exists() else {}


@pytest.fixture
def hub(tmp_path, tiny_llama):
    return Hub(tmp_path, tiny_llama)


def test_a_data_set_is_fetched_once_and_then_read_without_a_network(hub):
    with fake_hub.serve(REPOS) as hub.address:
        done, facts = hub.prepare("org/plain")
    assert done.returncode == 0, done.stderr
    assert facts["sources"][0]["commit"] == fake_hub.commit_of("main")
    assert sum(count["documents"] for count in facts["counts"].values()) == 4
    for offline in (True, False):
        (hub.root / "org-plain" / "corpus" / "corpus.json").unlink()
        done, again = hub.prepare("org/plain", offline=offline)
        assert done.returncode == 0, done.stderr
        assert again == facts


def test_the_hubs_own_copy_is_read_where_a_data_set_is_code(hub):
    with fake_hub.serve(REPOS) as hub.address:
        done, facts = hub.prepare("org/converted")
    assert done.returncode == 0, done.stderr
    assert facts["counts"]["train"]["documents"] == 3


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("org/none", "", "no such data set"),
        ("org/plain", 'split = "tset"', "Did you mean 'test'?"),
        ("org/two", "", "has 2 configurations: de, en"),
        ("org/plain", 'revision = "v9"', "no such revision 'v9'"),
    ],
)
def test_what_the_hub_does_not_have_is_named(path, more, message, hub):
    with fake_hub.serve(REPOS) as hub.address:
        done, facts = hub.prepare(path, more)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not facts


def test_a_hub_that_does_not_answer_is_told_in_one_message(hub):
    done, _ = hub.prepare("org/plain")
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_or_a_copy_the_remedy_is_named():
    source = Source(name="x", kind="hub", path="org/plain")
    with pytest.raises(CorpusError, match="use kind 'parquet'"):
        open_hub(source)


@pytest.mark.parametrize(
    ("names", "split", "subset", "chosen"),
    [
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "train",
            "",
            2,
        ),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "train", "", 1),
        (["train.jsonl", "train.parquet"], "train", "", 1),
        (["en/train.jsonl", "de/train.jsonl"], "train", "de", 1),
        (["training.jsonl", "README.md"], "train", "", 0),
    ],
)
def test_files_belong_to_a_split_by_the_words_of_their_path(names, split, subset, chosen):
    assert len(choose(names, split, subset)) == chosen
