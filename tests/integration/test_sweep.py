"""Sweeps: arms are runs of their own, stopped ones go on, results stand side by side."""

import json
import shutil

import pytest

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Teacher
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.student import choosing_blocks
from stillroom.pipeline.training import arms
from stillroom.pipeline.training.result import TrainResult
from stillroom.pipeline.training.run import corpus_of
from stillroom.pipeline.training.trainer import Interrupted
from stillroom.stages.__main__ import run as command
from tests import memory_cache, tiny_models

BASE = """
name = "base"
directory = "{directory}"
[teacher]
model = "{teacher}"
dtype = "float32"
[student]
keep_layers = [0]
[[objective]]
name = "forward_kl"
[train]
cache = "{cache}"
steps = 2
batch_tokens = 96
workers = 0
"""
SWEEP = """
base = "base.toml"
side_by_side = {side_by_side}
[[arm]]
name = "as-it-is"
[[arm]]
name = "reverse"
objective = [{{ name = "reverse_kl" }}]
train = {{ learning_rate = 1e-4 }}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_llama):
    captured = memory_cache.captured(tiny_llama, memory_cache.examples(12))
    return captured.write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def files(tmp_path, tiny_llama, cache):
    def write(side_by_side=1, text=SWEEP):
        names = {"directory": tmp_path / "run", "teacher": tiny_llama, "cache": cache}
        (tmp_path / "base.toml").write_text(BASE.format(**names))
        (tmp_path / "sweep.toml").write_text(text.format(side_by_side=side_by_side))
        return tmp_path / "sweep.toml"

    return write


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_arm_is_trained_and_compared(files, tmp_path, side_by_side, capsys):
    assert command(["train", "--sweep", str(files(side_by_side))]) == 0
    results = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert list(results) == ["as-it-is", "reverse"]
    assert results["as-it-is"]["final_loss"] != results["reverse"]["final_loss"]
    assert (tmp_path / "run" / "sweep.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "reverse" in shown
    assert "as-it-is" in shown
    for name in results:
        assert (tmp_path / "run" / "sweep" / name / "student" / "model.safetensors").exists()


READ = """
name = "read"
directory = "{root}/read"
[teacher]
model = "{teacher}"
[prepare]
window = 48
heldout = 0.5
[[prepare.source]]
name = "texts"
path = "{root}/texts.jsonl"
"""


def test_arms_are_measured_on_the_text_that_evaluate_names(files, tmp_path, tiny_llama, capsys):
    english = tiny_models.english()
    texts = [english[n * 300 :][:300] for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
    (tmp_path / "read.toml").write_text(READ.format(root=tmp_path, teacher=tiny_llama))
    assert command(["prepare", str(tmp_path / "read.toml")]) == 0
    sweep, base = files(), tmp_path / "base.toml"
    assert command(["train", "--sweep", str(sweep)]) == 0
    assert "not measured against the teacher: " in capsys.readouterr().err
    corpus = tmp_path / "read" / "corpus"
    base.write_text(base.read_text() + f'[evaluate]\ncorpus = "{corpus}"\nexamples = 3\n')
    assert command(["train", "--sweep", str(sweep), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    students = {name: str(tmp_path / "run" / "sweep" / name / "student") for name in
                ("as-it-is", "reverse")}  # fmt: skip
    chosen = list(Corpus.open(corpus).split("heldout"))[:3]
    wanted = measure(Teacher(model=str(tiny_llama), dtype="float32"), students, chosen)
    for row in rows:
        assert row["KL to teacher"].startswith(f"{wanted[row['arm']].kl:.4f} ")
    base.write_text(base.read_text().replace(str(corpus), str(tmp_path / "nowhere")))
    assert command(["train", "--sweep", str(sweep)]) == 2
    assert "nowhere: no prepared corpus" in capsys.readouterr().err


def test_a_capture_that_is_not_the_caches(files, tmp_path, cache, capsys):
    """Arms read the base run's own cache, and [capture] is about that."""
    shutil.copytree(cache, tmp_path / "run" / "cache")
    sweep, base = files(), tmp_path / "base.toml"
    kept = [line for line in base.read_text().splitlines() if not line.startswith("cache")]
    base.write_text("\n".join([*kept, "[capture]", "k = 8"]))
    assert command(["train", "--sweep", str(sweep)]) == 2
    assert "with k = 16; expected k = 8, as [capture] says" in capsys.readouterr().err


def test_a_stopped_sweep_goes_on(files, tmp_path):
    path, asked = files(), iter(range(100))
    with pytest.raises(Interrupted):
        arms.run_sweep(path, stop=lambda: next(asked) >= 3)
    first = (tmp_path / "run" / "sweep" / "as-it-is" / "train.json").read_bytes()
    assert set(arms.run_sweep(path)) == {"as-it-is", "reverse"}
    assert (tmp_path / "run" / "sweep" / "as-it-is" / "train.json").read_bytes() == first


BAD = (
    SWEEP
    + """
[[arm]]
name = "bad"
train = {{ freeze = ["nothing"] }}
[[arm]]
name = "last"
train = {{ learning_rate = 2e-4 }}
"""
)


@pytest.mark.parametrize("side_by_side", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_bad_arm_leaves_the_others(files, tmp_path, side_by_side, capsys):
    path = files(side_by_side, BAD)
    assert command(["train", "--sweep", str(path)]) == 3
    results = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert list(results) == ["as-it-is", "reverse", "bad", "last"]
    assert "'nothing' fits no weight" in results["bad"]["failed"]
    assert results["last"]["steps"] == 2
    shown, told = capsys.readouterr()
    assert "failed" in shown
    assert "1 of 4 arms failed" in told
    assert "bad: [train] freeze: 'nothing' fits no weight" in told
    path.write_text(path.read_text().replace('freeze = ["nothing"]', 'freeze = ["*norm*"]'))
    assert command(["train", "--sweep", str(path)]) == 0


def test_an_arm_that_breaks_is_told_as_it_broke():
    def broken():
        raise MemoryError("too much")

    assert arms.attempt(broken) == arms.FailedArm("MemoryError: too much")


MEASURED = """
base = "base.toml"
side_by_side = {side_by_side}
[[arm]]
name = "as-it-is"
[[arm]]
name = "one-more"
student = {{ leave_out = 2 }}
"""


@pytest.fixture
def measuring(files, tmp_path, tiny_llama):
    """A sweep whose base measures which block its student goes without, on a corpus of its own."""
    english = tiny_models.english()
    texts = [english[n * 300 :][:300] for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
    (tmp_path / "read.toml").write_text(READ.format(root=tmp_path, teacher=tiny_llama))
    assert command(["prepare", str(tmp_path / "read.toml")]) == 0

    def write(side_by_side=1, text=MEASURED):
        sweep, base = files(side_by_side, text), tmp_path / "base.toml"
        wished = "leave_out = 1\nleave_out_tokens = 64"
        base.write_text(base.read_text().replace("keep_layers = [0]", wished))
        shutil.copytree(tmp_path / "read" / "corpus", tmp_path / "run" / "corpus")
        return sweep

    return write


def kept(directory) -> list[int]:
    receipt = json.loads((directory / "student-initial" / "student.json").read_text())
    return receipt["student"]["keep_layers"]


def test_blocks_are_measured_once_for_the_base_and_its_arms(measuring, tmp_path, monkeypatch):
    """Of three blocks: three passes for the first that goes, two more for the second."""
    added = []
    add = choosing_blocks._Passes.add
    monkeypatch.setattr(
        choosing_blocks._Passes,
        "add",
        lambda own, gone, kl: (added.append(gone), add(own, gone, kl)),
    )
    sweep, run = measuring(), tmp_path / "run"
    assert command(["student", str(tmp_path / "base.toml")]) == 0
    assert len(added) == 3
    assert command(["train", "--sweep", str(sweep)]) == 0
    assert len(added) == 5
    assert kept(run / "sweep" / "as-it-is") == kept(run)
    assert set(kept(run / "sweep" / "one-more")) < set(kept(run))
    assert not (run / "sweep" / "as-it-is" / choosing_blocks.FILE).exists()


@pytest.mark.slow
def test_arms_side_by_side_measure_blocks_once(measuring, tmp_path):
    twin = MEASURED.replace("student = {{ leave_out = 2 }}", "train = {{ learning_rate = 1e-4 }}")
    assert command(["train", "--sweep", str(measuring(2, twin))]) == 0
    run = tmp_path / "run"
    assert len(json.loads((run / choosing_blocks.FILE).read_text())["passes"]) == 3
    assert kept(run / "sweep" / "as-it-is") == kept(run / "sweep" / "one-more")


def test_an_arm_reads_the_corpus_that_it_names(measuring, tmp_path):
    other = str(tmp_path / "read" / "corpus")
    text = MEASURED.replace(
        "student = {{ leave_out = 2 }}", f'train = {{{{ corpus = "{other}" }}}}'
    )
    _, base, made = arms.load(measuring(text=text))
    assert corpus_of(made["as-it-is"]) == base.path("corpus")
    assert corpus_of(made["one-more"]) == tmp_path / "read" / "corpus"
    assert set(arms.run_sweep(tmp_path / "sweep.toml")) == {"as-it-is", "one-more"}
    # Measured on other text, they are not the base run's passes.
    assert (tmp_path / "run" / "sweep" / "one-more" / choosing_blocks.FILE).exists()
    shutil.rmtree(tmp_path / "run" / "corpus")
    results = arms.run_sweep(tmp_path / "sweep.toml")
    assert all(isinstance(one, TrainResult) for one in results.values())


def test_arms_of_a_base_that_names_its_corpus_read_that(files, tmp_path):
    sweep, base = files(), tmp_path / "base.toml"
    base.write_text(base.read_text() + 'corpus = "elsewhere"\n')
    _, run, made = arms.load(sweep)
    assert {corpus_of(one) for one in made.values()} == {corpus_of(run)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SWEEP.replace("side_by_side", "sidebyside", 1), "unknown key 'sidebyside'.*side_by_side"),
        (SWEEP.replace('"reverse"', '"as-it-is"', 1), "two arms have one name"),
        (SWEEP.replace("learning_rate", "learning_rte"), "arm 'reverse'.*learning_rate"),
        (SWEEP.replace("base.toml", "bse.toml"), "no such file"),
        (
            SWEEP.replace('[{{ name = "reverse_kl" }}]', '"jsd"'),
            "arm.1.objective': expected a list",
        ),
        ('base = "base.toml"', "arm"),
        (BASE, "names no base run and no arm; expected a sweep file: .*without --sweep"),
    ],
)
def test_mistakes_are_named(files, text, message):
    path = files()
    path.write_text(text.format(directory="run", teacher="teacher", cache="cache", side_by_side=1))
    with pytest.raises(ConfigError, match=message):
        arms.load(path)
