"""Every mistake a person can make, through the command line: exit code 2, one message, no
traceback, nothing lost that was finished."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from stillroom.pipeline.cache.storage.disk import Disk
from stillroom.stages import __main__ as shell
from tests import tiny_models

GOLDEN = Path(__file__).parents[1] / "golden" / "cache-v1" / "small"
RUN = """
name = "job"
directory = "{directory}"
[teacher]
model = "{teacher}"
[prepare]
window = 64
heldout = 0.2
[[prepare.source]]
name = "texts"
kind = "jsonl"
path = "{texts}"
[capture]
k = 8
examples_per_shard = 4
[student]
keep_layers = [0, 2]
[[objective]]
name = "forward_kl"
[train]
steps = 2
batch_tokens = 128
"""


class Job:
    """A small run that can be changed one line at a time."""

    def __init__(self, root, teacher):
        self.root, self.teacher = root, teacher
        self.texts = root / "texts.jsonl"
        self.file, self.directory = root / "run.toml", root / "job"
        english = tiny_models.english()
        self.write(*(json.dumps({"text": english[i * 300 :][:300]}).encode() for i in range(10)))
        self.change()

    def write(self, *lines: bytes) -> None:
        self.texts.write_bytes(b"\n".join(lines) + b"\n")

    def change(self, old: str = "", new: str = "") -> None:
        """The run file as it was at first, with one piece replaced."""
        where = {"directory": self.directory, "teacher": self.teacher, "texts": self.texts}
        text = RUN.format(**where)
        assert old in text
        self.file.write_text(text.replace(old, new) if old else text)

    def prepare(self) -> int:
        return shell.run(["prepare", str(self.file)])

    def capture(self) -> int:
        return shell.run(["capture", str(self.file), "--engine", "reference"])

    def train(self) -> int:
        return shell.run(["train", str(self.file)])

    def finished(self) -> dict[str, bytes]:
        """Everything that is done: a finished corpus, committed shards, the seal."""
        kinds = ("corpus/*", "cache/receipts/**/*.json", "cache/rows/**/*.arrow", "cache/*.json")
        paths = {path for kind in kinds for path in self.directory.glob(kind) if path.is_file()}
        return {str(path): path.read_bytes() for path in paths}


@pytest.fixture
def job(tmp_path, tiny_llama):
    return Job(tmp_path, tiny_llama)


@pytest.fixture
def refused(capsys, job):
    """Runs stages that must fail with code 2, one message and everything finished still there."""

    def check(stage, *fragments: str) -> None:
        before = job.finished()
        capsys.readouterr()
        assert stage() == 2
        written = capsys.readouterr().err
        assert written.count("error: ") == 1
        assert "Traceback" not in written
        for fragment in fragments:
            assert fragment in written
        assert before.items() <= job.finished().items()

    return check


LINES = {
    "empty corpus": ([b""], "no example came out of the sources"),
    "empty document": ([b'{"text": "a b"}', b'{"text": " "}'], "texts.jsonl:2: document is empty"),
    "one token": ([b'{"text": "e"}'], "1 short windows"),
    "unknown column": ([b'{"txet": "a b"}'], "no column 'text'"),
    "bad UTF-8": ([b'{"text": "a b"}', b'{"text": "\xff"}'], "texts.jsonl:2: byte 0xff"),
}


@pytest.mark.parametrize("name", LINES)
def test_texts_that_cannot_be_used(name, job, refused):
    assert job.prepare() == 0
    lines, message = LINES[name]
    job.write(*lines)
    refused(job.prepare, message)


KEYS = {
    "misspelt key": ("window = 64", "windwo = 64", "Did you mean 'window'?"),
    "misspelt table": ("[capture]", "[captrue]", "Did you mean 'capture'?"),
    "wrong value": ("window = 64", "window = 'big'", "prepare.window"),
    "wrong choice": ('kind = "jsonl"', 'kind = "json"', "prepare.source.0.kind"),
    "longer than the context": ("window = 64", "window = 4096", "teacher's context of 512"),
    "nothing kept": ("k = 8", "k = 0", "k = 0 keeps no exact ids, so draws are needed"),
    "not TOML": ("window = 64", "window = = 64", "is not TOML"),
    "unnamed teacher": ("[teacher]\nmodel", "[teacher]\nmodle", "Did you mean 'model'?"),
}


@pytest.mark.parametrize("name", KEYS)
def test_run_files_that_cannot_be_meant(name, job, refused):
    old, new, message = KEYS[name]
    job.change(old, new)
    refused(job.prepare, message, "[prepare]" if "context" in message else "run.toml")


def test_a_run_file_that_is_not_there(job, refused):
    job.file.unlink()
    refused(job.prepare, "run.toml: no such file")


def test_a_missing_model_directory(job, refused):
    assert job.prepare() == 0
    job.change(f'model = "{job.teacher}"', f'model = "{job.root / "nowhere"}"')
    refused(job.prepare, "nowhere")
    refused(job.capture, "nowhere")


def test_capture_before_prepare(job, refused):
    refused(job.capture, "no prepared corpus", "stillroom prepare")


def test_train_before_capture(job, refused):
    refused(job.train, "cache")


def test_k_as_large_as_the_vocabulary(tmp_path, refused, job):
    small = tiny_models.save_llama(tmp_path / "small", vocab_size=300)
    job.change("k = 8", "k = 300")
    job.file.write_text(job.file.read_text().replace(str(job.teacher), str(small)))
    assert job.prepare() == 0
    refused(job.capture, "k = 300 of a vocabulary of 300")


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [("k = 8", "k = 9", "capture.k"), ("seed", "seed", "teacher.weights_sha256")],
)
def test_a_cache_of_another_plan(old, new, difference, job, refused, tmp_path):
    assert job.prepare() == 0
    assert job.capture() == 0
    if difference == "capture.k":
        job.change(old, new)
    else:
        other = tiny_models.save_llama(tmp_path / "other", seed=7)
        job.change(str(job.teacher), str(other))
    refused(job.capture, difference)


def changed_teacher(job, directory, **config):
    """A copy of the job's teacher with other keys in its config; the run names it."""
    other = shutil.copytree(job.teacher, directory)
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    job.change(str(job.teacher), str(other))
    return other


def test_the_same_weights_under_another_config(job, refused, tmp_path):
    assert job.prepare() == 0
    assert job.capture() == 0
    changed_teacher(job, tmp_path / "other", rms_norm_eps=0.5)
    refused(job.capture, "teacher.config.rms_norm_eps: found 1e-06, expected 0.5")


def test_a_cache_of_a_release_that_recorded_less(job, refused):
    assert job.prepare() == 0
    assert job.capture() == 0
    for path in (job.directory / "cache").glob("*.json"):
        path.unlink()
    for rest in ("receipts", "rows"):
        shutil.rmtree(job.directory / "cache" / rest)
    shutil.copy(GOLDEN / "plan.json", job.directory / "cache" / "plan.json")
    refused(job.capture, "teacher.config: not recorded there", "engine_args", "later release")


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}']
)
def test_a_generation_config_that_does_not_say_what_ends_a_turn(content, job, refused, tmp_path):
    other = shutil.copytree(job.teacher, tmp_path / "other")
    (other / "generation_config.json").write_text(content)
    job.change(str(job.teacher), str(other))
    refused(job.prepare, "generation_config.json: does not say which tokens end a turn")


def test_another_teacher_is_no_judge(job, refused, tmp_path):
    """Of a cache, by audit; of students, by evaluation."""
    assert job.prepare() == 0
    assert job.capture() == 0
    cache, file = str(job.directory / "cache"), str(job.file)
    audit = ["cache", "audit", cache, file, "--engine", "reference", "--sample", "2"]
    assert shell.run(audit) == 0
    changed_teacher(job, tmp_path / "other", rms_norm_eps=0.5)
    for name in ("student-initial", "student"):  # neither is loaded: the teacher is refused before
        (job.directory / name).mkdir()
        (job.directory / name / "config.json").write_text("{}")
    for stage in (audit, ["evaluate", file]):
        refused(lambda s=stage: shell.run(s), "config.rms_norm_eps: found 0.5, expected 1e-06")


def test_a_checkpoint_that_lacks_blocks(job, refused, tmp_path):
    from safetensors.torch import load_file, save_file

    assert job.prepare() == 0
    path = changed_teacher(job, tmp_path / "other") / "model.safetensors"
    kept = {name: w for name, w in load_file(path).items() if ".layers.1." not in name}
    save_file(kept, path, {"format": "pt"})
    for engine in ("reference", "vllm"):
        message = "9 weights of LlamaForCausalLM are not in the checkpoint"
        refused(lambda e=engine: shell.run(["capture", str(job.file), "--engine", e]), message)
        assert not (job.directory / "cache").exists()  # nothing that another plan would meet


ENDS = {
    "no adapter": ('model = "{}"', 'model = "{}"\nadapter = "nowhere"', "no adapter_config.json"),
    "said twice": (
        'model = "{}"',
        'model = "{}"\nengine_args = {{trust_remote_code = true}}',
        "'trust_remote_code' is said by [teacher]",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_teachers_that_cannot_be_meant(name, job, refused):
    assert job.prepare() == 0
    old, new, message = ENDS[name]
    job.change(old.format(job.teacher), new.format(job.teacher))
    refused(job.capture, message)


def test_a_model_that_needs_its_own_code(job, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert job.prepare() == 0
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    other = changed_teacher(job, tmp_path / "other", model_type="own", auto_map=names)
    (other / "own.py").write_text("raise SystemExit('run')")
    refused(job.prepare, "trust_remote_code = true")
    refused(job.capture, "trust_remote_code = true")


def test_a_cache_of_another_text(job, refused):
    assert job.prepare() == 0
    assert job.capture() == 0
    job.change("window = 64", "window = 60")
    assert job.prepare() == 0
    refused(job.capture, "corpus.digest")


def test_a_cache_of_another_tokenizer(job, refused, tmp_path):
    assert job.prepare() == 0
    assert job.capture() == 0
    other = shutil.copytree(job.teacher, tmp_path / "other")
    tiny_models.save_tokenizer(other, vocab_size=700)
    job.change(str(job.teacher), str(other))
    refused(job.capture, "tokenizer")
    refused(job.train, "tokenizer")


def test_a_corrupt_shard(job, refused):
    assert job.prepare() == 0
    assert job.capture() == 0
    shard = next(path for path in (job.directory / "cache" / "rows").rglob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    refused(lambda: shell.run(["cache", "verify", str(job.file)]), "shard")
    assert shell.run(["cache", "repair", str(job.file)]) in (0, 3)
    assert job.capture() == 0
    assert shell.run(["cache", "verify", str(job.file)]) == 0


def test_no_disk_space(job, refused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.directory))

    with monkeypatch.context() as broken:
        broken.setattr("stillroom.pipeline.corpus.preparing.ExampleFile.write", full)
        refused(job.prepare, "No space left on device", "Free some space")
    assert job.prepare() == 0
    written, write = [0], Disk.write

    def full_after_a_while(disk, path, data):
        written[0] += 1
        return full() if written[0] > 7 else write(disk, path, data)

    with monkeypatch.context() as broken:
        broken.setattr(Disk, "write", full_after_a_while)
        refused(job.capture, "No space left on device", "finished work is kept")
    kept = {path: data for path, data in job.finished().items() if "receipts" in path}
    assert kept
    assert job.capture() == 0
    assert kept.items() <= job.finished().items()
    assert job.train() == 0
