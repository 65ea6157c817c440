"""The recommenders' page followed by somebody with data of their own, in and out of order."""

import json

import pytest

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.capture import items
from stillroom.pipeline.capture.candidates import capture_candidates
from stillroom.pipeline.config import load
from stillroom.stages.__main__ import run as command
from stillroom.stages.whole_run import commands
from tests import small_interactions

TEXT = """name = "films"
directory = "{run}"
[teacher]
model = "{teacher}"
dtype = "float32"
[prepare]
window = 128
heldout = 0.0
[[prepare.source]]
name = "films"
kind = "interactions"
path = "{films}"
[prepare.source.interactions]
k_core = 1
history = 4
[items]
{items}
[candidates]
k = 3
method = "scored"
shortlist_size = 4
histories_per_user = 1
[recommender]
width = 8
batch = 16
[[objective]]
name = "next_item"
[[objective]]
name = "ranking_distillation"
cache = "candidates"
[train]
steps = 4
evaluate_every = 2
log_every = 1
{more}
"""


@pytest.fixture
def written(tiny_llama, tmp_path):
    """Writes the run file; further lines of [items], and tables at its end."""
    films = small_interactions.save(tmp_path / "films", users=10)

    def write(items="", more=""):
        names = {"run": tmp_path / "run", "teacher": tiny_llama, "films": films}
        (tmp_path / "run.toml").write_text(TEXT.format(**names, items=items, more=more))
        return str(tmp_path / "run.toml")

    return write


def told(capfd, *words) -> tuple[int, str, str]:
    capfd.readouterr()
    code = command(list(words))
    said = capfd.readouterr()
    return code, said.out, said.err


def test_every_step_says_what_comes_before_it(written, capfd, tmp_path):
    file = written()
    code, out, err = told(capfd, "prepare", file)
    assert code == 0
    assert "test" in out
    assert "heldout" not in out
    assert "at the same time" not in err
    assert "items that share a title" not in err
    code, _, err = told(capfd, "train", file)
    assert code == 2
    assert "run/candidates: there is no cache here. Run `stillroom capture`" in err
    assert told(capfd, "capture", file, "--engine", "reference")[0] == 0
    code, _, err = told(capfd, "train", file)
    assert code == 0
    assert "validation ndcg@10" in err
    assert "held-out" not in err
    code, out, err = told(capfd, "evaluate", file)
    assert code == 0
    assert "teacher" not in out
    asks = f"stillroom capture {file} --split test"
    assert f"no row for the teacher: it was not asked about test rows; {asks}" in err
    assert told(capfd, "capture", file, "--engine", "reference", "--split", "test")[0] == 0
    code, out, err = told(capfd, "evaluate", file)
    assert "teacher" in out
    assert "no row for the teacher" not in err
    assert (tmp_path / "run" / "candidates-test" / "manifest.json").exists()


def test_test_rows_captured_under_the_former_name_are_found(written, tmp_path, capfd):
    file = written()
    told(capfd, "prepare", file)
    assert told(capfd, "capture", file, "--engine", "reference", "--split", "heldout")[0] == 0
    (tmp_path / "run" / "candidates-test").rename(tmp_path / "run" / "candidates-heldout")
    assert told(capfd, "capture", file, "--engine", "reference", "--split", "test")[0] == 0
    assert not (tmp_path / "run" / "candidates-test").exists()


def test_a_run_asks_for_test_rows_and_evaluates_whatever_heldout_says(written):
    run = load(written())
    said = [" ".join(words) for words in commands(run, "x", "reference")]
    assert said[-3:] == ["capture x --engine reference --split test", "train x", "evaluate x"]


@pytest.mark.parametrize(
    ("items", "more", "options", "message"),
    [
        ('chek = "never"', "", [], r"chek.*check"),
        ("", "[capture]", [], "[capture] beside [items] and [candidates]: token logits of every"),
        ("", "", ["--dry-run"], "--dry-run of [items] and [candidates]"),
    ],
)
def test_what_a_capture_does_not_do_is_refused(written, capfd, items, more, options, message):
    file = written(items, more)
    code, _, err = told(capfd, "capture", file, "--engine", "reference", *options)
    assert code == 2
    parts = message.split(".*")
    assert all(part in err for part in parts), err


def test_test_rows_of_a_language_models_corpus_are_called_otherwise(written, capfd, tmp_path):
    text = f'name = "x"\ndirectory = "{tmp_path}"\n[capture]\n'
    (tmp_path / "text.toml").write_text(text)
    code, _, err = told(capfd, "capture", str(tmp_path / "text.toml"), "--split", "test")
    assert code == 2
    assert "--split heldout" in err


class _Wrong:
    """An engine whose answers nobody wants."""

    shape = None

    def close(self):
        pass


def test_a_refused_capture_leaves_nothing_that_stops_the_next(
    written, capfd, tmp_path, monkeypatch
):
    """The check refuses vLLM; the reference, whose plan is another, goes on."""
    run = load(written())
    told(capfd, "prepare", str(tmp_path / "run.toml"))
    asked = []

    def refuse(engine, question):
        asked.append((question.table, question.capture.check))
        raise TeacherError("vLLM does not say what the model's definition says")

    monkeypatch.setattr("stillroom.pipeline.capture.job.check_definition", refuse)
    monkeypatch.setattr(items, "open_engine", lambda *_, **__: _Wrong())
    monkeypatch.setattr(
        "stillroom.pipeline.capture.candidates.open_engine", lambda *_, **__: _Wrong()
    )
    for score, name in ((items.capture_items, "items"), (capture_candidates, "candidates")):
        with pytest.raises(TeacherError, match="does not say"):
            score(run, engine="vllm")
        assert not run.path(name).exists()
    monkeypatch.undo()
    assert items.capture_items(run, engine="reference") is not None
    assert capture_candidates(run, engine="reference") is not None
    assert asked == [("items", "auto"), ("candidates", "auto")]


def test_the_check_of_items_is_their_own_and_no_part_of_the_plan(written):
    from stillroom.pipeline.capture.items import make_plan
    from stillroom.pipeline.corpus.files import Corpus

    file = written('check = "never"')
    assert command(["prepare", file]) == 0
    never, auto = load(file), load(written())
    corpus = Corpus.open(auto.path("corpus"))
    assert never.items.check == "never"
    plans = [make_plan(run, corpus, "vllm").digest for run in (never, auto)]
    assert plans[0] == plans[1]


def test_ties_are_told_in_words_and_only_where_there_are_some(written, capfd, tmp_path):
    file = written()
    log = tmp_path / "films" / "ratings.csv"
    lines = log.read_text().splitlines()
    user = lines[1].split(",")[0]
    same = [
        ",".join([*line.split(",")[:3], "5"]) if line.startswith(f"{user},") else line
        for line in lines
    ]
    log.write_text("\n".join(same))
    _, _, err = told(capfd, "prepare", file)
    assert "interactions at the same time as another of their user (ordered by item id): " in err
    facts = json.loads((tmp_path / "run" / "corpus" / "corpus.json").read_text())
    assert facts["interactions"]["interactions_at_one_time_with_another_of_their_user"] > 0
