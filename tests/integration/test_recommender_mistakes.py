"""Recommenders that were changed, mixed up or asked for what cannot be: refused, and by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.config import Run
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import open_histories
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.evaluation.ranking import evaluate_recommender, recommend, student_ranks
from stillroom.pipeline.student.recommenders.export import load
from stillroom.pipeline.training.arms import run_sweep
from stillroom.pipeline.training.recommending import train_recommender
from stillroom.pipeline.training.trainer import Interrupted
from stillroom.stages.__main__ import run as command
from stillroom.stages.demos import recsys_arms
from stillroom.stages.demos.recsys_arms import write_lists
from tests import small_interactions

RANKED = {"name": "ranking_distillation", "cache": "candidates", "options": {"k": 3}}
LINES = ({"name": "next_item"}, RANKED)


def run_in(directory, teacher, films, lines=LINES, train=None, **interactions) -> Run:
    source = small_interactions.source(films, **interactions)
    settings = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 2, "warmup": 0.0}
    tables = {
        "name": "films",
        "directory": str(directory),
        "prepare": {"source": [source], "window": 128},
        "teacher": {"model": str(teacher)},
        "recommender": {"width": 8, "batch": 16},
        "objective": list(lines),
        "train": settings | (train or {}),
    }
    return Run.model_validate(tables)


def prepared(run: Run) -> Run:
    corpus = prepare(run.prepare, run.teacher.model, run.path("corpus"))
    histories, random = open_histories(corpus), np.random.default_rng(0)
    names = dict.fromkeys(histories.example_ids.take(histories.rows("train")).to_pylist())
    rows = [
        (name, random.permutation(16)[:3], np.sort(random.uniform(0, 3, 3)))
        for name in list(names)[::2]
    ]
    write_lists(run.path("candidates"), corpus, rows, "made up")
    return run


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return small_interactions.save(tmp_path_factory.mktemp("films"), users=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, films):
    run = prepared(run_in(tmp_path_factory.mktemp("run") / "run", tiny_llama, films))
    train_recommender(run)
    return run


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained.path(), tmp_path / "run")
    return trained.model_copy(update={"directory": str(tmp_path / "run")})


def changed_config(**changes):
    def change(student: Path) -> None:
        facts = json.loads((student / "config.json").read_text()) | changes
        facts = {name: value for name, value in facts.items() if value is not None}
        (student / "config.json").write_text(json.dumps(facts))

    return change


def changed_weights(name: str, value: float | None):
    def change(student: Path) -> None:
        tensors = load_file(student / "model.safetensors")
        tensors[name].fill_(value) if value is not None else tensors.pop(name)
        save_file(tensors, student / "model.safetensors")

    return change


def with_bytes(name: str, data: bytes):
    return lambda student: (student / name).write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        changed_config(history=3),
        changed_config(history=-1),
        changed_config(items=15),
        changed_config(items=10**13),
        changed_config(chosen={"step": 1, "ndcg@20": 1.0}),
        with_bytes("items.json", b'["1", "2"]'),
        changed_config(catalogue=None),
        changed_config(identity=None),
        changed_config(recommender={"wdth": 8}),
        changed_config(recommender=None),
        changed_weights("head.weight", float("nan")),
        changed_weights("items.weight", float("inf")),
        changed_weights("head.bias", None),
        with_bytes("model.safetensors", b"x" * 50),
        with_bytes("model.safetensors", b""),
        with_bytes("config.json", b"{"),
        with_bytes("config.json", b"[]"),
        lambda student: (student / "model.safetensors").unlink(),
        lambda student: shutil.rmtree(student),
    ],
)
def test_a_student_that_was_changed_by_hand_recommends_nothing(copied, change):
    change(copied.path("student"))
    for ask in (lambda: recommend(copied, 3, user="u3"), lambda: evaluate_recommender(copied)):
        with pytest.raises(StudentError, match=r"cannot be loaded|train"):
            ask()


@pytest.mark.parametrize(
    ("kind", "change"),
    [("gru4rec", {"history": 3}), ("gru4rec", {"history": 5}), ("sasrec", {"heads": 2})],
)
def test_what_no_tensors_shape_tells_is_not_believed(trained, tmp_path, kind, change):
    table = trained.recommender.model_copy(update={"kind": kind})
    run = trained.model_copy(update={"directory": str(tmp_path), "recommender": table})
    for part in ("corpus", "candidates"):
        shutil.copytree(trained.path(part), run.path(part))
    train_recommender(run)
    assert load(run.path("student"))
    path = run.path("student", "config.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts))  # laid out otherwise, and the same
    assert load(run.path("student"))
    facts["recommender"] |= change if "heads" in change else {}
    facts |= {} if "heads" in change else change
    path.write_text(json.dumps(facts))
    with pytest.raises(StudentError, match=r"config\.json or items\.json is not as it was written"):
        load(run.path("student"))


def test_a_student_is_written_again_from_its_checkpoint(copied):
    before = (copied.path("student") / "model.safetensors").read_bytes()
    with_bytes("model.safetensors", b"x" * 50)(copied.path("student"))
    with pytest.raises(StudentError, match="once this directory is deleted"):
        recommend(copied, 3, user="u3")
    shutil.rmtree(copied.path("student"))
    train_recommender(copied)
    assert (copied.path("student") / "model.safetensors").read_bytes() == before


def test_a_language_model_is_no_recommender(copied, tiny_llama):
    shutil.rmtree(copied.path("student"))
    shutil.copytree(tiny_llama, copied.path("student"))
    with pytest.raises(StudentError, match="cannot be loaded"):
        recommend(copied, 3, user="u3")


def test_a_student_is_judged_on_the_corpus_that_it_was_trained_on(trained, films, tmp_path):
    """The same catalogue, but other sequences: its training items are test items there."""
    lines = (films / "ratings.csv").read_text().splitlines()
    (tmp_path / "films").mkdir()
    shutil.copy(films / "movies.csv", tmp_path / "films")
    backwards = [line.rsplit(",", 1) for line in lines[1:]]
    text = [lines[0], *(f"{left},{-int(time)}" for left, time in backwards)]
    (tmp_path / "films" / "ratings.csv").write_text("\n".join(text))
    other = run_in(tmp_path / "other", trained.teacher.model, tmp_path / "films")
    corpus = prepare(other.prepare, other.teacher.model, other.path("corpus"))
    own = Corpus.open(trained.path("corpus"))
    assert corpus.facts["catalogue"] == own.facts["catalogue"]
    with pytest.raises(PlanMismatch, match="sequences of another corpus"):
        student_ranks(trained.path("student"), corpus)
    shutil.copytree(trained.path("student"), other.path("student"))
    elsewhere = other.train.model_copy(update={"corpus": str(trained.path("corpus"))})
    there = other.model_copy(update={"train": elsewhere})
    assert evaluate_recommender(there)["student"] == evaluate_recommender(trained)["student"]
    assert recommend(there, 4, user="u3") == recommend(trained, 4, user="u3")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep_best", "ndcg@20"),
        ("patience", 2),
        ("batch_tokens", 512),
        ("freeze", ["items.*"]),
        ("heldout_cache", "somewhere"),
    ],
)
def test_settings_of_language_models_are_refused(copied, films, key, value):
    run = run_in(copied.directory, copied.teacher.model, films, train={key: value})
    with pytest.raises(ConfigError, match=f"{key} does nothing for a recommender"):
        train_recommender(run)


def test_more_candidates_than_a_list_has_are_refused(copied, films):
    lines = ({"name": "next_item"}, RANKED | {"options": {"k": 4}})
    shutil.rmtree(copied.path("checkpoints"))
    copied.path("train.json").unlink()
    run = run_in(copied.directory, copied.teacher.model, films, lines)
    with pytest.raises(ConfigError, match=r"k = 4 candidates of lists of 3.*options = \{ k = 3 \}"):
        train_recommender(run)


def test_how_many_rows_a_teacher_answers_is_told(tmp_path, tiny_llama, films):
    notes = []
    run = prepared(run_in(tmp_path / "run", tiny_llama, films))
    train_recommender(run, on_note=notes.append)
    rows = len(open_histories(Corpus.open(run.path("corpus"))).rows("train"))
    (note,) = notes
    assert note.startswith("cache 'candidates' answers ")
    assert note.endswith(f" of {rows} training rows")


def test_rows_without_an_item_that_did_not_come_are_refused(tmp_path, tiny_llama):
    films = tmp_path / "films"
    films.mkdir()
    rows = [f"u{user},{(user + time) % 3},5,{time}" for user in range(6) for time in range(6)]
    (films / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    (films / "movies.csv").write_text("movieId,title\n0,None\n1,One\n2,Two\n")
    run = run_in(tmp_path / "run", tiny_llama, films, LINES[:1])
    prepare(run.prepare, run.teacher.model, run.path("corpus"))
    with pytest.raises(StudentError, match=r"training rows hold every one of the \d items"):
        train_recommender(run)


@pytest.mark.parametrize("data", [b"", b"x" * 50, None])
def test_the_best_weights_so_far_must_be_whole(tmp_path, tiny_llama, films, data):
    run = prepared(run_in(tmp_path / "run", tiny_llama, films))
    left = iter(range(4))
    with pytest.raises(Interrupted):
        train_recommender(run, stop=lambda: next(left, None) is None)
    run.path("best.safetensors").unlink()
    if data is not None:
        run.path("best.safetensors").write_bytes(data)
    with pytest.raises(StudentError, match="the best weights so far cannot be read"):
        train_recommender(run)


def test_results_of_other_settings_are_not_taken_for_these(tmp_path, tiny_llama, films):
    run = prepared(run_in(tmp_path / "run", tiny_llama, films))
    first = recsys_arms.measured(run, "none", 0, 2)
    assert recsys_arms.measured(run, "none", 0, 2) == first
    faster = run.train.model_copy(update={"learning_rate": 0.01})
    with pytest.raises(PlanMismatch, match="was measured with other settings"):
        recsys_arms.measured(run.model_copy(update={"train": faster}), "none", 0, 2)


def test_the_commands_refuse_what_cannot_be(trained, tmp_path, capfd):
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'name = "films"\ndirectory = "{trained.directory}"\n[items]\n[recommender]\nwidth = 8\n'
    )
    ratings = {
        ("recommend", str(toml), "--items", " , "): "whose list?",
        ("recommend", str(toml), "--items", "1,99"): "no item '99'",
        ("recommend", str(toml), "--user", "nobody"): "no user 'nobody'",
        ("capture", str(toml), "--cache", "elsewhere"): "--cache elsewhere of a run without",
    }
    for words, message in ratings.items():
        assert command(list(words)) == 2
        assert message in capfd.readouterr().err


def test_all_that_is_left_is_listed(trained):
    _, listed = recommend(trained, 1000, user="u3")
    histories = open_histories(Corpus.open(trained.path("corpus")))
    u = histories.users.index("u3")
    taken = histories.items[histories.offsets[u] : histories.offsets[u + 1]]
    model, _ = load(trained.path("student"))
    assert len(listed) == model.num_items - len(set(taken.tolist()))
    assert torch.isfinite(model.head.weight).all()


def test_one_bad_arm_stops_no_other(trained, films, tmp_path):
    base = tmp_path / "run.toml"
    base.write_text(
        f'name = "films"\ndirectory = "{tmp_path / "run"}"\n[recommender]\nwidth = 8\nbatch = 16\n'
        f'[train]\nsteps = 2\ncorpus = "{trained.path("corpus")}"\n'
        '[[objective]]\nname = "next_item"\n'
    )
    arms = {
        "missing": 'objective = [{ name = "ranking_distillation", cache = "nothing" }]',
        "blows_up": "train = { learning_rate = 1e38, warmup = 0.0 }",
        "good": 'recommender = { kind = "caser" }',
    }
    lines = [f'[[arm]]\nname = "{name}"\n{table}\n' for name, table in arms.items()]
    (tmp_path / "sweep.toml").write_text('base = "run.toml"\n' + "".join(lines))
    results = run_sweep(tmp_path / "sweep.toml")
    assert "no cache 'nothing'" in results["missing"].failed
    assert "finite" in results["blows_up"].failed
    assert load(Path(results["good"].student))[1]["recommender"]["kind"] == "caser"
