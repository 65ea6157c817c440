"""Recommenders from a cache with the project's own trainer: resume, selection, export, control."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchmetrics.functional.retrieval as published
from typer.testing import CliRunner

from stillroom.cache_schemas.errors import CacheMissing, ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.config import Run
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import open_catalogue, open_histories
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.evaluation.ranking import (
    Ranking,
    evaluate_recommender,
    popular_ranks,
    recommend,
    student_ranks,
    teacher_ranks,
)
from stillroom.pipeline.student.recommenders.export import load
from stillroom.pipeline.student.recommenders.ranks import measures, rank_of
from stillroom.pipeline.training.arms import run_sweep
from stillroom.pipeline.training.opening import train
from stillroom.pipeline.training.recommending import train_recommender
from stillroom.pipeline.training.trainer import Interrupted
from stillroom.stages.__main__ import app
from stillroom.stages.demos.recsys_arms import shuffle, write_lists
from tests import small_interactions

STEPS = 30


def run_in(directory, teacher, films, *objectives, train=None, **recommender) -> Run:
    settings = {"steps": STEPS, "evaluate_every": 10, "checkpoint_every": 7, "schedule": "constant"}
    settings |= {"learning_rate": 5e-3, "warmup": 0.0}
    lines = objectives or ({"name": "next_item"},)
    return Run.model_validate(
        {
            "name": "films",
            "directory": str(directory),
            "prepare": {"source": [small_interactions.source(films)], "window": 128},
            "teacher": {"model": str(teacher)},
            "recommender": {"width": 16, "batch": 16} | recommender,
            "objective": list(lines),
            "train": settings | (train or {}),
        }
    )


RANKED = {"name": "ranking_distillation", "cache": "candidates", "options": {"k": 3}}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return small_interactions.save(tmp_path_factory.mktemp("films"), users=30)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, films):
    """A run with a corpus, and lists of a teacher that knows the next item half of the time."""
    run = run_in(tmp_path_factory.mktemp("base"), tiny_llama, films)
    corpus = prepare(run.prepare, run.teacher.model, run.path("corpus"))
    histories, random = open_histories(corpus), np.random.default_rng(0)
    rows, done = [], set()
    for row in histories.rows("train")[::2]:
        name = histories.example_ids[row].as_py()
        if name in done:
            continue
        done.add(name)
        ids = random.permutation(16)[:3]
        if random.random() < 0.5 and histories.items[row] not in ids:
            ids[0] = histories.items[row]
        rows.append((name, ids, np.sort(random.uniform(0, 3, 3))))
    write_lists(run.path("candidates"), corpus, rows, "made up")
    return run


@pytest.fixture
def copied(base, tmp_path):
    """A directory with the base's corpus and lists, and a function that makes runs in it."""

    def make(*objectives, name="run", **more) -> Run:
        directory = tmp_path / name
        for part in ("corpus", "candidates"):
            if not (directory / part).exists():
                shutil.copytree(base.path(part), directory / part)
        films = base.prepare.source[0].path
        return run_in(directory, base.teacher.model, films, *objectives, **more)

    return make


def weights_of(run):
    return load(run.path("student"))[0].state_dict()


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_a_stopped_run_ends_in_the_same_bits(copied, kind):
    objectives = ({"name": "next_item"}, {"name": "dros", "weight": 0.5}, RANKED)
    whole = copied(*objectives, name="whole", kind=kind, dropout=0.2)
    train_recommender(whole)
    parts = copied(*objectives, name="parts", kind=kind, dropout=0.2)
    for stop_after in (4, 12):
        left = iter(range(stop_after))
        with pytest.raises(Interrupted):
            train_recommender(parts, stop=lambda left=left: next(left, None) is None)
    train_recommender(parts)
    assert_equal_bits(weights_of(whole), weights_of(parts))
    logged = [
        [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
        for run in (whole, parts)
    ]
    assert [line["loss"] for line in logged[0]] == [line["loss"] for line in logged[1]]
    assert len(logged[0]) == STEPS
    again = train_recommender(parts)
    assert again.seconds == 0


def test_a_copied_run_has_a_student_of_its_own_behind_a_link_too(copied, tmp_path):
    first = copied(train={"steps": 2})
    train_recommender(first)
    shutil.copytree(first.path(), tmp_path / "second")
    result = train_recommender(copied(name="second", train={"steps": 2}))
    student = tmp_path / "second" / "student"
    assert (result.student, result.initial, result.seconds) == (str(student), "", 0)
    shutil.move(student, tmp_path / "far")
    student.symlink_to(tmp_path / "far")
    longer = copied(name="second", train={"steps": 4})
    assert train_recommender(longer).steps == 4
    assert student.is_symlink()
    assert load(tmp_path / "far")[1]["chosen"]["step"] == train_recommender(longer).best_step
    assert_equal_bits(weights_of(longer), load(tmp_path / "far")[0].state_dict())


def test_a_killed_run_forgets_the_best_of_the_steps_it_takes_again(copied):
    """Killed before the first checkpoint: the best weights of that life do not count."""
    run = copied(train={"checkpoint_every": 1000, "evaluate_every": 2})

    def die(now):
        if now.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_recommender(run, on_progress=die)
    assert run.path("best.safetensors").exists()
    train_recommender(run)
    other = copied(name="other", train={"checkpoint_every": 1000, "evaluate_every": 2})
    train_recommender(other)
    assert_equal_bits(weights_of(run), weights_of(other))


def test_the_weights_that_go_out_are_the_best_on_validation(copied):
    run = copied(train={"evaluate_every": 5})
    train_recommender(run)
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    seen = {
        line["step"]: line["validation/ndcg@20"] for line in lines if "validation/ndcg@20" in line
    }
    assert sorted(seen) == [5, 10, 15, 20, 25, 30]
    best = max(seen, key=lambda step: (seen[step], -step))
    _, config = load(run.path("student"))
    assert config["chosen"] == {"step": best, "ndcg@20": seen[best]}
    assert config["history"] == 4


def test_test_items_are_never_looked_at(copied, base):
    """Other test items, same student: bit for bit."""
    run = copied(RANKED, {"name": "next_item"})
    train_recommender(run)
    other = copied(RANKED, {"name": "next_item"}, name="other")
    path = other.path("corpus", "sequences.arrow")
    from stillroom.pipeline.corpus.histories import Histories

    corpus = Corpus.open(other.path("corpus"))
    histories = open_histories(corpus)
    items = histories.items.copy()
    items[histories.rows("test")] = (items[histories.rows("test")] + 1) % 16
    path.unlink()
    Histories(histories.users, histories.offsets, items, histories.example_ids).write(path.parent)
    train_recommender(other)
    assert_equal_bits(weights_of(run), weights_of(other))


def test_distilled_tables_are_folded_and_serve_alike(base, tiny_llama, tmp_path):
    from stillroom.pipeline.capture.items import capture_items

    run = run_in(
        tmp_path / "run",
        tiny_llama,
        base.prepare.source[0].path,
        {"name": "next_item"},
        {"name": "item_hint", "cache": "items", "weight": 0.1},
        distilled={"cache": "items"},
    )
    shutil.copytree(base.path("corpus"), run.path("corpus"))
    run = run.model_copy(
        update={"items": Run.model_validate({"name": "x", "directory": "x", "items": {}}).items}
    )
    with pytest.raises(
        CacheMissing, match=r"run/items: there is no cache.*Run `stillroom capture`"
    ):
        train_recommender(run)
    capture_items(run, engine="reference")
    with pytest.raises(StudentError, match=r"needs signal 'item\.final'"):
        train_recommender(copy_with_lists(run, base))
    shutil.rmtree(run.path("candidates"))
    train_recommender(run)
    state = weights_of(run)
    assert not any(name.startswith("distilled") for name in state)
    assert (state["items.weight"][-1] == 0).all()
    rank = student_ranks(run.path("student"), Corpus.open(run.path("corpus")))
    assert len(rank) == len(open_histories(Corpus.open(run.path("corpus"))).users)


def copy_with_lists(run, base):
    """The hint pointed at lists, which hold no embeddings."""
    if not run.path("candidates").exists():
        shutil.copytree(base.path("candidates"), run.path("candidates"))
    line = run.objective[1].model_copy(update={"cache": "candidates"})
    return run.model_copy(update={"objective": (run.objective[0], line)})


def test_another_setting_is_refused_by_name(copied):
    run = copied()
    train_recommender(run)
    other = copied(train={"evaluate_every": 3})
    with pytest.raises(PlanMismatch, match=r"train\.evaluate_every"):
        train_recommender(other)
    with pytest.raises(ConfigError, match="ema does nothing"):
        train_recommender(copied(train={"ema": 0.9}))


def test_another_length_of_history_is_another_student(copied, tiny_llama, films):
    """No sequence is so long, so the corpus has the same digest: nothing else would tell."""
    run = copied(kind="gru4rec", train={"steps": 2, "evaluate_every": 0})
    settings = [
        run.prepare.model_validate({"source": [small_interactions.source(films, history=length)]})
        for length in (40, 50)
    ]
    digests = []
    for changed in settings:
        digests.append(prepare(changed, str(tiny_llama), run.path("corpus")).digest)
        shutil.rmtree(run.path("candidates"), ignore_errors=True)
        if len(digests) == 1:
            train_recommender(run)
    assert digests[0] == digests[1]
    with pytest.raises(PlanMismatch, match="was trained with corpus history = 40; expected 50"):
        train_recommender(run)


def test_the_whole_of_a_list_is_used_where_no_k_is_given(copied):
    without = {name: value for name, value in RANKED.items() if name != "options"}
    whole, same = copied(without, name="whole"), copied(RANKED, name="same")
    train_recommender(whole)
    train_recommender(same)
    assert_equal_bits(weights_of(whole), weights_of(same))


def test_a_catalogue_changed_since_capture_is_refused(copied, tiny_llama, films, tmp_path):
    run = copied(RANKED, {"name": "next_item"})
    changed = tmp_path / "films"
    shutil.copytree(films, changed)
    text = (changed / "movies.csv").read_text().replace('engine of number 2"', 'motor"')
    (changed / "movies.csv").write_text(text)
    source = small_interactions.source(changed)
    settings = run.prepare.model_validate({"source": [source], "window": 128})
    prepare(settings, str(tiny_llama), run.path("corpus"))
    with pytest.raises(PlanMismatch, match="The catalogue has changed"):
        train_recommender(run)


def test_lists_of_another_prompt_answer_nothing(copied, tiny_llama, films):
    run = copied(RANKED, {"name": "next_item"})
    source = small_interactions.source(films, prompt="Books:\n{history}\n")
    settings = run.prepare.model_validate({"source": [source], "window": 128})
    prepare(settings, str(tiny_llama), run.path("corpus"))
    with pytest.raises(StudentError, match="answers none of the"):
        train_recommender(run)


def test_a_shuffled_teacher_is_another_cache_with_the_same_questions(copied, base):
    run = copied()
    shuffle(base.path("candidates"), run.path("shuffled"))
    from stillroom.pipeline.cache.reader import TeacherCache

    ours, theirs = (
        TeacherCache.open(run.path("shuffled")),
        TeacherCache.open(base.path("candidates")),
    )
    assert ours.plan.digest != theirs.plan.digest
    pairs = list(zip(ours, theirs))
    assert all(a.example == b.example for a, b in pairs)
    moved = [
        not np.array_equal(a.signals["candidate_distances"], b.signals["candidate_distances"])
        for a, b in pairs
    ]
    assert np.mean(moved) > 0.95


def test_measures_are_those_of_a_published_library():
    random = np.random.default_rng(1)
    scores = random.normal(size=(40, 30))
    targets = random.integers(0, 30, 40)
    rank = np.array([rank_of(s, int(t)) for s, t in zip(scores, targets)])
    found = measures(rank)
    for row in range(40):
        wanted = torch.zeros(30, dtype=torch.long)
        wanted[targets[row]] = 1
        given = torch.from_numpy(scores[row])
        for cut in (1, 5, 10, 20):
            hit = published.retrieval_hit_rate(given, wanted, top_k=cut)
            gain = published.retrieval_normalized_dcg(given, wanted, top_k=cut)
            assert found[f"hr@{cut}"][row] == float(hit)
            assert found[f"ndcg@{cut}"][row] == pytest.approx(float(gain), abs=1e-6)


def test_seen_items_are_out_and_ties_go_by_the_catalogue():
    scores = np.array([3.0, 2.0, 2.0, 1.0])
    assert [rank_of(scores, target) for target in range(4)] == [1, 2, 3, 4]
    assert rank_of(scores, 3, np.array([0, 1])) == 2
    assert rank_of(scores, 0, np.array([0, 1])) == 1  # the target itself is never left out
    assert Ranking.of(np.array([0, 1, 11])).mean["hr@10"] == pytest.approx(1 / 3)


def test_evaluation_compares_student_teacher_and_popularity(copied, base):
    run = copied()
    train_recommender(run)
    corpus = Corpus.open(run.path("corpus"))
    histories = open_histories(corpus)
    found = evaluate_recommender(run)
    assert set(found) == {"student", "most popular"}
    popular = popular_ranks(corpus, exclude_seen=False)
    counts = histories.training_counts(16)
    best = int(np.argmax(counts))
    targets = histories.items[histories.rows("test")]
    assert (popular[targets == best] == 1).all()
    with pytest.raises(Exception, match="has no list for question"):
        teacher_ranks(base.path("candidates"), corpus)


def test_recommend_names_items_that_were_not_taken(copied):
    run = copied()
    train_recommender(run)
    corpus = Corpus.open(run.path("corpus"))
    histories, catalogue = open_histories(corpus), open_catalogue(corpus)
    history, listed = recommend(run, 5, user="u3")
    u = histories.users.index("u3")
    taken = histories.items[histories.offsets[u] : histories.offsets[u + 1]]
    assert history == [catalogue.titles[i] for i in taken[-4:]]
    assert not {one.item_id for one in listed} & {catalogue.item_ids[i] for i in taken}
    assert [one.score for one in listed] == sorted((one.score for one in listed), reverse=True)
    own = tuple(catalogue.item_ids[i] for i in taken)
    assert recommend(run, 5, items=own)[1] == listed
    with pytest.raises(StudentError, match="no user 'nobody'"):
        recommend(run, 5, user="nobody")
    with pytest.raises(StudentError, match="no item 'nothing'"):
        recommend(run, 5, items=("nothing",))


def test_the_commands(copied, tmp_path):
    """train --sweep, evaluate and recommend from the console."""
    run = copied()
    toml = tmp_path / "run.toml"
    films = run.prepare.source[0].path
    toml.write_text(
        f"""name = "films"
directory = "{run.directory}"
[recommender]
width = 16
batch = 16
[[objective]]
name = "next_item"
[train]
steps = 6
evaluate_every = 3
[[prepare.source]]
name = "films"
kind = "interactions"
path = "{films}"
"""
    )
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        """base = "run.toml"
[[arm]]
name = "plain"
[[arm]]
name = "distilled"
recommender = { kind = "gru4rec" }
[[arm.objective]]
name = "next_item"
[[arm.objective]]
name = "ranking_distillation"
cache = "candidates"
options = { k = 3 }
"""
    )
    results = run_sweep(sweep)
    assert set(results) == {"plain", "distilled"}
    assert load(run.path("sweep", "distilled", "student"))[1]["recommender"]["kind"] == "gru4rec"
    answered = load(run.path("sweep", "distilled", "student"))[1]["answered"]["candidates"]
    assert 0.3 < answered < 0.7
    runner = CliRunner()
    for words in (["train", str(toml)], ["evaluate", str(toml)]):
        done = runner.invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    listed = runner.invoke(app, ["recommend", str(toml), "--user", "u3", "--top", "3"])
    assert listed.exit_code == 0, listed.output
    assert listed.output.count("number") >= 3


def test_a_language_model_is_not_trained_on_lists(copied, tiny_llama):
    run = copied()
    student = {"init": "model", "model": str(tiny_llama)}
    tables = {"recommender": None, "student": student, "objective": [{"name": "cross_entropy"}]}
    cache = {"cache": str(run.path("candidates")), "steps": 2}
    made = Run.model_validate(run.model_dump() | tables | {"train": cache})
    with pytest.raises(StudentError, match="is about items and holds no text"):
        train(made)
