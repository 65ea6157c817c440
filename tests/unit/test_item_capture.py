"""Items and candidates are captured like anything else: keyed, resumed, verified, shared."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import CacheError, ConfigError, PlanMismatch, ShardCorrupt
from stillroom.cache_schemas.manifest import DefinitionCheck
from stillroom.cache_schemas.plan import Plan
from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.capture import candidates, items, job
from stillroom.pipeline.capture.candidate_engines import Grounded, line_ends, prompt_of
from stillroom.pipeline.capture.candidates import capture_candidates, questions
from stillroom.pipeline.capture.items import capture_items, read_items
from stillroom.pipeline.capture.nearest import Nearest
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import Interactions, Items
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import open_catalogue, open_histories
from stillroom.pipeline.corpus.preparing import prepare
from stillroom.pipeline.teacher.opening import open_writing_engine
from stillroom.pipeline.teacher.protocol import RejectedExample
from tests import small_interactions
from tests.synthetic_records import make_candidates_plan, make_plan


def run_in(directory, teacher, films, candidates=None, items=None, **interactions) -> Run:
    source = small_interactions.source(films, **interactions)
    return Run.model_validate(
        {
            "name": "films",
            "directory": str(directory),
            "prepare": {"source": [source], "window": 128},
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "items": {"codec": "bf16", "items_per_shard": 5} | (items or {}),
            "candidates": {"k": 3, "written_tokens": 6, "histories_per_shard": 8, "batch": 4}
            | (candidates or {}),
        }
    )


def prepared(run: Run) -> Run:
    prepare(run.prepare, run.teacher.model, run.path("corpus"))
    return run


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return small_interactions.save(tmp_path_factory.mktemp("films"), users=10)


@pytest.fixture(scope="module")
def captured(tmp_path_factory, tiny_llama, films):
    """A run with both caches made by the reference engine."""
    run = prepared(run_in(tmp_path_factory.mktemp("run"), tiny_llama, films))
    capture_items(run, engine="reference")
    capture_candidates(run, engine="reference")
    return run


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@torch.inference_mode()
def last_state(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model(ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy()


@torch.inference_mode()
def first_line(model, tokenizer, prompt, limit):
    """The most probable continuation, by plain definition."""
    ids, written = list(prompt), []
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        written.append(token)
        if "\n" in tokenizer.decode([token]) or token == tokenizer.eos_token_id:
            break
    return written


def test_an_items_embedding_is_the_state_of_its_last_token(captured, model, tiny_tokenizer):
    cache = TeacherCache.open(captured.path("items"))
    catalogue = open_catalogue(Corpus.open(captured.path("corpus")))
    vectors = read_items(cache)
    assert len(cache) == len(catalogue)
    for place in (0, 5, len(catalogue) - 1):
        expected = last_state(model, tiny_tokenizer, catalogue.titles[place])
        np.testing.assert_allclose(vectors[place], expected, rtol=2**-7, atol=2**-7)
        assert cache[place].example.example_id == catalogue.key(place)
        assert len(cache[place].example.token_ids) == 0


def test_grounded_candidates_are_the_items_nearest_to_the_title_that_is_written(
    captured, model, tiny_tokenizer
):
    corpus = Corpus.open(captured.path("corpus"))
    histories, cache = open_histories(corpus), TeacherCache.open(captured.path("candidates"))
    vectors = read_items(TeacherCache.open(captured.path("items"))).astype(np.float64)
    rows = {histories.example_ids[row].as_py(): row for row in histories.rows("train")}
    examples = {example.example_id: example for example in corpus.split("train")}
    assert len(cache) == len(examples)
    filled = 0
    for record in list(cache)[:12]:
        name = record.example.example_id
        prompt = prompt_of(examples[name]).tolist()
        written = first_line(model, tiny_tokenizer, prompt, 6)
        assert record.signals["written_ids"].tolist() == written
        title = " ".join(
            tiny_tokenizer.decode(written, skip_special_tokens=True).split("\n")[0].split()
        )
        if not title:
            assert (record.signals["candidate_ids"] == -1).all()
            continue
        filled += 1
        distances = np.linalg.norm(vectors - last_state(model, tiny_tokenizer, title), axis=1)
        window = histories.windows(np.array([rows[name]]), 4, -1)[0]
        distances[window[window >= 0]] = np.inf
        order = np.argsort(distances, kind="stable")[:3]
        found = record.signals["candidate_distances"]
        np.testing.assert_allclose(found, distances[order], rtol=1e-4)
        np.testing.assert_allclose(distances[record.signals["candidate_ids"]], found, rtol=1e-4)
    assert filled > 3


def test_scored_candidates_are_ordered_by_the_probability_of_their_titles(
    tmp_path, tiny_llama, films, model, tiny_tokenizer
):
    table = {"method": "scored", "shortlist_size": 5, "histories_per_user": 1, "seen": "keep"}
    run = prepared(run_in(tmp_path, tiny_llama, films, table))
    capture_candidates(run, engine="reference")
    corpus = Corpus.open(run.path("corpus"))
    catalogue, histories = open_catalogue(corpus), open_histories(corpus)
    counts = np.bincount(histories.items[histories.rows("train")], minlength=len(catalogue))
    shortlist = np.argsort(-counts, kind="stable")[:5]
    cache = TeacherCache.open(run.path("candidates"))
    examples = {example.example_id: example for example in corpus.split("train")}
    assert len(cache) == len({e.document_id for e in examples.values()})
    record = cache[2]
    prompt = prompt_of(examples[record.example.example_id]).tolist()
    expected = {}
    for place in shortlist.tolist():
        text = catalogue.titles[place] + "\n"
        answer = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected[place] = -float(logp[torch.arange(len(answer)), answer].sum())
    best = sorted(expected, key=expected.__getitem__)[:3]
    assert record.signals["candidate_ids"].tolist() == best
    wanted = [expected[place] for place in best]
    np.testing.assert_allclose(record.signals["candidate_distances"], wanted, rtol=1e-5)


def test_two_workers_one_of_them_killed_seal_the_same(captured, tmp_path):
    places = {}
    for kind, score in (("items", capture_items), ("candidates", capture_candidates)):
        other = places[kind] = tmp_path / kind
        options = {"engine": "reference", "location": str(other)}
        assert score(captured, rank=1, world_size=2, **options) is None
        left = iter(range(3))

        def interrupt(_progress, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score(captured, on_progress=interrupt, **options)
        assert score(captured, **options) is not None
        made = captured.path(kind, "manifest.json").read_bytes()
        assert (other / "manifest.json").read_bytes() == made
        assert verify(DirectoryStorage(other)).problems == []


def test_only_the_latest_histories_of_each_user_are_asked_about(captured):
    corpus = Corpus.open(captured.path("corpus"))
    histories = open_histories(corpus)
    asked = questions(corpus, histories, "train", 2)
    rows = histories.rows("train")
    by_user = {}
    for row, owner in zip(rows.tolist(), histories.owners(rows).tolist()):
        by_user.setdefault(owner, []).append(histories.example_ids[row].as_py())
    wanted = {name for names in by_user.values() for name in names[-2:]}
    assert {example.example_id for example in asked} == wanted
    assert len(questions(corpus, histories, "heldout", 1)) == len(histories.users)


def test_a_catalogue_changed_since_capture_is_refused(captured, tiny_llama, films, tmp_path):
    changed = tmp_path / "films"
    shutil.copytree(films, changed)
    text = (changed / "movies.csv").read_text()
    (changed / "movies.csv").write_text(text.replace('The river of number 1"', 'Another"'))
    run = run_in(tmp_path / "run", tiny_llama, changed)
    shutil.copytree(captured.path("items"), run.path("items"))
    prepared(run)
    with pytest.raises(PlanMismatch, match=r"catalogue\.digest"):
        capture_candidates(run, engine="reference")
    with pytest.raises(PlanMismatch, match=r"catalogue\.digest"):
        capture_items(run, engine="reference")


def test_candidates_wait_for_the_items(tiny_llama, films, tmp_path):
    run = prepared(run_in(tmp_path, tiny_llama, films))
    with pytest.raises(CacheError, match="there is no cache here"):
        capture_candidates(run, engine="reference")


@pytest.mark.parametrize("table", [{"k": 17}, {"method": "scored", "k": 4, "shortlist_size": 3}])
def test_more_candidates_than_there_can_be_are_refused(tiny_llama, films, tmp_path, table):
    run = prepared(run_in(tmp_path, tiny_llama, films, table))
    with pytest.raises(ConfigError, match=r"k = \d+ candidates of (16|3) "):
        capture_candidates(run, engine="reference")


def test_a_list_may_be_shorter_than_k_where_seen_items_are_left_out(tiny_llama, films, tmp_path):
    table = {"method": "scored", "k": 16, "shortlist_size": 16, "histories_per_user": 1}
    run = prepared(run_in(tmp_path, tiny_llama, films, table))
    capture_candidates(run, engine="reference")
    record = TeacherCache.open(run.path("candidates"))[0]
    used = int((record.signals["candidate_ids"] >= 0).sum())
    assert 12 <= used < 16
    assert (record.signals["candidate_ids"][used:] == -1).all()
    assert np.isinf(record.signals["candidate_distances"][used:]).all()


def test_places_outside_the_catalogue_are_damage(captured, tmp_path):
    cache = TeacherCache.open(captured.path("candidates"))
    record = cache[0]
    for ids in ([0, 16, 2], [0, 0, 2], [-1, 0, 1]):
        record.signals["candidate_ids"] = np.array(ids, dtype=np.int32)
        with pytest.raises(ShardCorrupt, match="candidate_ids names"):
            cache.form.encode(record)
    record.signals["candidate_ids"] = np.array([0, 1, 2], dtype=np.int32)
    record.signals["candidate_distances"] = np.array([2, 1, 3], dtype=np.float32)
    with pytest.raises(ShardCorrupt, match="does not rise"):
        cache.form.encode(record)


def test_an_unanswerable_item_is_set_aside_and_then_missed(captured, tmp_path, monkeypatch):
    from stillroom.pipeline.capture import items

    real = items.pooled

    def broken(record, table):
        vector = real(record, table)
        return vector * np.nan if record.example.document_id == "3" else vector

    monkeypatch.setattr(items, "pooled", broken)
    place = str(tmp_path / "items")
    with pytest.raises(Exception, match="NaN or infinite hidden states"):
        capture_items(captured, engine="reference", location=place)
    capture_items(captured, engine="reference", location=place, on_error="quarantine")
    lines = captured.path("item-notes", "rejects.jsonl").read_text().splitlines()
    assert "NaN" in json.loads(lines[-1])["reason"]
    with pytest.raises(CacheError, match="1 of 16 items have no embedding"):
        read_items(TeacherCache.open(place))


def test_the_graph_finds_what_the_whole_search_finds():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(500, 16)).astype(np.float32)
    vectors[7] = vectors[3]  # a tie
    exact, graph = Nearest(vectors), Nearest(vectors, exact=False)
    places, distances = exact.search(vectors[3], 5)
    assert places[:2].tolist() == [3, 7]
    assert distances[0] == 0
    brute = np.linalg.norm(vectors.astype(np.float64) - vectors[3], axis=1)
    np.testing.assert_allclose(distances, np.sort(brute)[:5])
    same = [
        len(set(exact.search(q, 10)[0]) & set(graph.search(q, 10)[0]))
        for q in random.normal(size=(20, 16)).astype(np.float32)
    ]
    assert np.mean(same) > 9
    assert 3 not in exact.search(vectors[3], 5, np.array([3]))[0]
    assert len(Nearest(vectors[:4]).search(vectors[0], 9)[0]) == 4


def test_any_number_of_items_of_one_vector_are_listed_in_the_catalogues_order():
    random = np.random.default_rng(1)
    for _ in range(60):
        vectors = random.normal(size=(int(random.integers(50, 1500)), 8)).astype(np.float32)
        alike = random.permutation(len(vectors))[: int(random.integers(20, len(vectors)))]
        vectors[alike] = vectors[3]
        query = vectors[3] + random.normal(size=8) * random.choice([0, 0.1, 2])
        query = query.astype(np.float32)
        gone = random.permutation(len(vectors))[: int(random.integers(0, 10))]
        far = np.linalg.norm(vectors.astype(np.float64) - query.astype(np.float64), axis=1)
        order = np.lexsort((np.arange(len(vectors)), far))
        wanted = order[~np.isin(order, gone)][:10]
        places, distances = Nearest(vectors).search(query, 10, gone)
        assert places.tolist() == wanted.tolist()
        np.testing.assert_allclose(distances, far[wanted], rtol=1e-12)
    zeros = np.zeros((50, 8), dtype=np.float32)
    zeros[::2] *= -1
    assert Nearest(zeros, exact=False).search(zeros[1], 4)[0].tolist() == [0, 1, 2, 3]


def test_what_a_line_has_around_a_title_is_no_part_of_what_was_written(tiny_tokenizer):
    def title(line, written):
        shelf = SimpleNamespace(
            tokenizer=SimpleNamespace(hf=tiny_tokenizer), settings=Interactions(line=line)
        )
        engine = Grounded(SimpleNamespace(close=None), shelf, Items())
        return engine._title(tiny_tokenizer(written, add_special_tokens=False)["input_ids"])

    assert title("{title}", " The  river \nAnother") == "The river"
    assert title("- {title}", "- The river\n") == "The river"
    assert title('"{title}",', '"The river",\n') == "The river"
    assert title('"{title}",', "The river") == "The river"
    assert title("- {title}", "- \nThe river") == ""


def test_histories_that_make_one_question_are_left_out_together(tmp_path, tiny_llama):
    """Two films of one title: whichever of them was taken, neither comes back as new."""
    films = tmp_path / "films"
    films.mkdir()
    rows = [
        (u, i, 5, t) for u, first in (("a", 1), ("b", 2)) for t, i in enumerate((first, 3, 4, 5))
    ]
    text = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    (films / "ratings.csv").write_text("\n".join(text))
    names = {1: "Twin", 2: "Twin", 3: "Three", 4: "Four", 5: "Five"}
    text = ["movieId,title", *(f"{item},{title}" for item, title in names.items())]
    (films / "movies.csv").write_text("\n".join(text))
    table = {"method": "scored", "shortlist_size": 5, "k": 5}
    run = prepared(run_in(tmp_path / "run", tiny_llama, films, table, keep_unused_items=True))
    capture_candidates(run, engine="reference")
    (record,) = TeacherCache.open(run.path("candidates"))
    assert sorted(record.signals["candidate_ids"].tolist()) == [-1, -1, 2, 3, 4]


def test_a_title_that_cannot_be_scored_is_told_by_its_history(captured, tmp_path, monkeypatch):
    from stillroom.pipeline.teacher.reference.engine import ReferenceEngine

    table = {"method": "scored", "shortlist_size": 3, "k": 2, "seen": "keep"}
    run = captured.model_copy(
        update={
            "directory": str(tmp_path),
            "candidates": captured.candidates.model_copy(update=table),
        }
    )
    shutil.copytree(captured.path("corpus"), run.path("corpus"))
    real, asked = ReferenceEngine._score, iter(range(10**6))

    def refuse(self, example):
        if next(asked) == 1:
            raise RejectedExample(example, "too long")
        return real(self, example)

    monkeypatch.setattr(ReferenceEngine, "_score", refuse)
    capture_candidates(run, engine="reference", on_error="quarantine")
    (line,) = run.path("candidate-notes", "rejects.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["example_id"] in set(Corpus.open(run.path("corpus")).split("train").ids())
    assert "with the title 'The " in told["reason"]


def test_nothing_is_written_beyond_the_teachers_context(captured, tmp_path):
    table = captured.candidates.model_copy(update={"written_tokens": 10**6})
    run = captured.model_copy(update={"candidates": table})
    with pytest.raises(RejectedExample, match=r"to be written; expected at most \d+"):
        capture_candidates(run, engine="reference", location=str(tmp_path / "candidates"))


@pytest.mark.vllm
def test_vllm_writes_and_embeds_as_the_reference_does(captured, tmp_path, tiny_tokenizer):
    caches = []
    run = captured.model_copy(update={"directory": str(tmp_path)})
    shutil.copytree(captured.path("corpus"), run.path("corpus"))
    capture_items(run, engine="vllm")
    capture_candidates(run, engine="vllm")
    for kind in ("items", "candidates"):
        caches = [TeacherCache.open(r.path(kind)) for r in (run, captured)]
        assert [r.example.example_id for r in caches[0]] == [
            r.example.example_id for r in caches[1]
        ]
        if kind == "items":
            found, expected = (read_items(cache) for cache in caches)
            np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-6)
            continue
        pairs = list(zip(*caches))
        names = ("written_ids", "candidate_ids")
        same = [all(np.array_equal(a.signals[n], b.signals[n]) for n in names) for a, b in pairs]
        assert np.mean(same) > 0.9


def test_writing_stops_at_the_end_of_a_line(tiny_llama, tiny_tokenizer, captured):
    ends = line_ends(tiny_tokenizer)
    assert tiny_tokenizer.eos_token_id in ends
    assert all("\n" in tiny_tokenizer.decode([i]) for i in ends if i != ends[0]) or ends
    engine = open_writing_engine(
        "reference", captured.teacher, captured.capture or _capture(), max_tokens=64
    )
    prompt = np.array(tiny_tokenizer("The river of")["input_ids"], dtype=np.int32)
    (free,) = engine.write([prompt], 5, [])
    assert len(free) == 5
    (stopped,) = engine.write([prompt], 5, [int(free[1])])
    assert stopped.tolist() == free[: free.tolist().index(free[1]) + 1].tolist()


def _capture():
    from stillroom.pipeline.config import Capture

    return Capture(k=1)


def rows_of(output):
    """Cells of the tables in an output, headers left out."""
    return [line.split("│") for line in output.splitlines() if line.startswith("│")]


def test_show_tells_the_history_the_list_and_the_truth_in_words(captured, capsys, tmp_path):
    from typer.testing import CliRunner

    from stillroom.stages.__main__ import app

    corpus = Corpus.open(captured.path("corpus"))
    titles, histories = open_catalogue(corpus).titles, open_histories(corpus)
    cache = TeacherCache.open(captured.path("candidates"))
    number = next(n for n, r in enumerate(cache) if r.signals["candidate_ids"][0] >= 0)
    arguments = ["cache", "show", cache.storage.location, "--example", str(number)]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    row = histories.example_ids.to_pylist().index(cache[number].example.example_id)
    assert f"then came: {titles[histories.items[row]]}" in shown.output
    assert titles[histories.items[row - 1]] in shown.output
    assert titles[cache[number].signals["candidate_ids"][0]] in shown.output
    assert "truth" in shown.output
    facts = {cells[1].strip(): cells[2].strip() for cells in rows_of(shown.output)}
    assert facts["histories"] == f"{len(cache)}"
    assert facts["lists"] == "grounded, k = 3, items seen left out"
    assert facts["bytes/history"].startswith("rows ")
    assert not {"tokens", "bytes/token", "temperatures"} & facts.keys()
    written = cache[number].signals["written_ids"].tolist()
    assert f"the teacher wrote tokens: {', '.join(map(str, written))}" in shown.output
    named = [*arguments, "--tokenizer", captured.teacher.model]
    in_words = CliRunner().invoke(app, named, catch_exceptions=False)
    assert "the teacher wrote: '" in in_words.output
    listed = CliRunner().invoke(app, ["cache", "ls", str(captured.path())], catch_exceptions=False)
    held = {cells[1].strip(): cells[4].strip() for cells in rows_of(listed.output)}
    assert held == {"candidates": f"{len(cache)} histories", "items": f"{len(titles)} items"}
    alone = tmp_path / "alone"
    shutil.copytree(captured.path("items"), alone)
    item = CliRunner().invoke(app, ["cache", "show", str(alone), "--example", "3"])
    assert item.exit_code == 0, item.output
    assert "pass --corpus" in item.output


@pytest.mark.parametrize(
    "change",
    [
        {"examples": ["candidate_ids"]},
        {"examples": ["candidate_ids", "candidate_distances"]},
        {"examples": ["candidate_distances", "candidate_ids", "more"]},
        {"examples": []},
    ],
)
def test_a_plan_of_half_a_list_or_of_nothing_known_is_refused(change):
    facts = make_candidates_plan().facts
    with pytest.raises(ShardCorrupt, match=r"example signals|candidates need"):
        Plan.from_facts(facts | {"signals": facts["signals"] | change}, "plan.json")


def test_a_plan_of_lists_names_its_catalogue():
    facts = make_candidates_plan().facts
    capture = {key: value for key, value in facts["capture"].items() if key != "catalogue"}
    with pytest.raises(ShardCorrupt, match="candidates need"):
        Plan.from_facts(facts | {"capture": capture}, "plan.json")
    assert "examples" not in make_plan().facts["signals"]


def test_items_and_candidates_are_held_against_the_definition(
    tmp_path, tiny_llama, films, monkeypatch
):
    """By whatever checks a capture of texts; here vLLM's part is played by the reference."""
    asked = []

    def compared(_engine, question):
        asked.append(question)
        return DefinitionCheck(done=True, tokens=len(question.examples))

    monkeypatch.setattr(job, "check_definition", compared)
    opens = items.open_engine
    monkeypatch.setattr(items, "open_engine", lambda _, *more, **named: opens("reference", *more))
    monkeypatch.setattr(
        candidates,
        "open_writing_engine",
        lambda _, *more: open_writing_engine("reference", *more),
    )
    run = prepared(run_in(tmp_path, tiny_llama, films))
    noted = [capture_items(run).definition, capture_candidates(run).definition]
    assert [found.tokens for found in noted] == [len(question.examples) for question in asked]
    assert asked[0].capture.hidden_layers == asked[1].capture.hidden_layers == ("final",)
    assert asked[0].examples[0].loss_mask.any()
