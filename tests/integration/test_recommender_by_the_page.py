"""The recommenders' page followed by somebody with data of their own, in and out of order."""

import json

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache_schemas.errors import TeacherError
from stillroom.pipeline.capture import items
from stillroom.pipeline.capture.candidates import capture_candidates
from stillroom.pipeline.config import load
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import Histories, open_histories
from stillroom.stages.__main__ import run as command
from stillroom.stages.demos.recsys_arms import write_lists
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


def lists_with(run, share: float, target: str, split: str = "train") -> None:
    """A teacher that wrote no title after all but a share of the histories."""
    corpus = Corpus.open(run.path("corpus"))
    names = list(dict.fromkeys(corpus.split(split).ids()))
    said = round(share * len(names))
    rows = [
        (name, np.arange(3), np.arange(3.0))
        if number < said
        else (name, np.full(3, -1), np.full(3, np.inf))
        for number, name in enumerate(names)
    ]
    write_lists(run.path(target), corpus, rows, "grounded", split)


def test_a_teacher_that_answered_almost_nothing_is_said_to(written, capfd, tmp_path):
    file = written()
    assert told(capfd, "prepare", file)[0] == 0
    run = load(file)
    lists_with(run, 0.1, "candidates")
    lists_with(run, 0.1, "candidates-test", "heldout")
    count = len(Corpus.open(run.path("corpus")).split("train"))
    empty = count - round(0.1 * count)
    said = f"{empty} of {count} lists are empty (the teacher wrote no title)"
    code, out, err = told(capfd, "cache", "show", str(run.path("candidates")), "--rows", "0")
    assert said in " ".join((out + err).split())
    code, out, err = told(capfd, "cache", "ls", str(tmp_path / "run"), "--json")
    assert {"empty": empty, "of": count} in [one["empty_lists"] for one in json.loads(out)]
    code, out, err = told(capfd, "train", file)
    assert code == 0
    assert f"cache 'candidates': {said}" in " ".join(err.split())
    facts = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    histories = open_histories(Corpus.open(run.path("corpus")))
    assert 0 < facts["answered"]["candidates"] < 0.2
    assert len(histories.rows("train")) >= count
    finished = json.loads((tmp_path / "run" / "train.json").read_text())
    assert finished["best_step"] == facts["chosen"]["step"] > 0
    code, out, err = told(capfd, "evaluate", file)
    assert "teacher (9 of 10 lists empty)" in " ".join((out + err).split())
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert measured["teacher"]["empty_lists"] == 9
    assert "empty_lists" not in measured["student"]


def test_a_teacher_that_answered_nothing_teaches_nobody(written, capfd, tmp_path):
    file = written()
    told(capfd, "prepare", file)
    lists_with(load(file), 0.0, "candidates")
    code, _, err = told(capfd, "train", file)
    assert code == 2
    assert "lists no item for any training row" in err
    assert not (tmp_path / "run" / "student").exists()


def test_a_capture_ends_with_the_number_of_empty_lists(written, capfd, monkeypatch):
    file = written()
    told(capfd, "prepare", file)
    monkeypatch.setattr(
        "stillroom.pipeline.capture.candidate_engines.Scored._shortlist",
        lambda *_: np.empty(0, dtype=np.int32),
    )
    code, _, err = told(capfd, "capture", file, "--engine", "reference")
    assert code == 0
    assert "10 of 10 lists are empty" in err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"next_item"', '"next_itm"', "unknown objective 'next_itm'"),
        ('"next_item"', '"forward_kl"', "'forward_kl' is an objective of language models"),
        ('cache = "candidates"', 'cache = "candidate"', "no cache 'candidate'"),
        ("width = 8", 'width = 8\ndistilled = { cache = "itms" }', "no cache 'itms'"),
        (
            'cache = "candidates"',
            'cache = "candidates"\noptions = { possition = 1 }',
            "unknown key 'possition'",
        ),
        ("[train]", "[capture]\n[train]", "[capture] beside [items] and [candidates]"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_done(
    written, capfd, tmp_path, before, after, message
):
    file = written()
    text = (tmp_path / "run.toml").read_text()
    (tmp_path / "run.toml").write_text(text.replace(before, after, 1))
    for stage in ("prepare", "capture", "train"):
        code, _, err = told(capfd, stage, file)
        assert code == 2
        assert message in " ".join(err.split())
    assert not (tmp_path / "run" / "corpus").exists()


def test_longer_lists_than_the_catalogue_are_refused_before_the_items(written, capfd, tmp_path):
    file = written()
    text = (tmp_path / "run.toml").read_text()
    assert told(capfd, "prepare", file)[0] == 0
    long = text.replace("k = 3\n", "k = 500\n").replace(
        "shortlist_size = 4", "shortlist_size = 999"
    )
    (tmp_path / "run.toml").write_text(long)
    for stage in (["prepare", file], ["capture", file, "--engine", "reference"]):
        code, _, err = told(capfd, *stage)
        assert code == 2
        assert "k = 500 candidates of 16 items in the catalogue" in err
    assert not (tmp_path / "run" / "items").exists()


def test_a_wrong_prompt_is_said_without_the_whole_table(written, capfd, tmp_path):
    file = written()
    text = (tmp_path / "run.toml").read_text()
    (tmp_path / "run.toml").write_text(text.replace("history = 4", 'history = 4\nprompt = "x"'))
    code, _, err = told(capfd, "prepare", file)
    assert code == 2
    assert "prompt needs {history}" in err
    assert "Value error" not in err
    assert "found" not in err


def test_a_question_of_two_users_is_asked_once_and_nobody_loses_the_row(written, capfd, tmp_path):
    file = written()
    log = tmp_path / "films" / "ratings.csv"
    lines = log.read_text().splitlines()
    user = lines[1].split(",")[0]
    twin = [f"twin{line[len(user) :]}" for line in lines if line.startswith(f"{user},")]
    log.write_text("\n".join([*lines, *twin]))
    _, _, err = told(capfd, "prepare", file)
    assert "as another user's and asked once" in " ".join(err.split())
    assert "left out" not in err
    corpus = Corpus.open(tmp_path / "run" / "corpus")
    histories = open_histories(corpus)
    asked = histories.example_ids.take(histories.rows("test")).to_pylist()
    assert len(asked) == 11
    assert len(set(asked)) == len(corpus.split("heldout")) == 10


def test_popularity_counts_first_items_too():
    items = np.array([3, 0, 1, 2, 3, 1, 0, 2], dtype=np.int32)
    histories = Histories(["a", "b"], np.array([0, 4, 8]), items, pa.array([""] * 8))
    assert histories.training_counts(4).tolist() == [1, 1, 0, 2]
