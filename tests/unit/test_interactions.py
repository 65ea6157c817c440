"""Interactions become sequences, a catalogue and questions; every doubt has a rule."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas.errors import CorpusError, PlanMismatch
from stillroom.pipeline.config import Prepare
from stillroom.pipeline.corpus.histories import (
    check_catalogue,
    open_catalogue,
    open_histories,
    open_items,
)
from stillroom.pipeline.corpus.preparing import Corpus, prepare
from tests import small_interactions
from tests.small_interactions import jsonl

TITLES = [{"item": name, "title": title} for name, title in small_interactions.titles()]


def made(tmp_path, tiny_llama, source, name="corpus", **more) -> Corpus:
    settings = {"source": [source], "window": 128} | more
    return prepare(Prepare.model_validate(settings), str(tiny_llama), tmp_path / name)


def of_rows(tmp_path, tiny_llama, rows, titles=TITLES, **interactions) -> Corpus:
    """A corpus of (user, item, time) rows."""
    named = [dict(zip(("user", "item", "time"), row)) for row in rows]
    path = jsonl(tmp_path / "log.jsonl", named)
    catalogue = jsonl(tmp_path / "items.jsonl", titles)
    empty = interactions.pop("empty_documents", "error")
    settings = {"k_core": 1, "history": 3, "catalogue": str(catalogue)} | interactions
    source = {"name": "log", "kind": "interactions", "path": str(path), "interactions": settings}
    return made(tmp_path, tiny_llama, source, empty_documents=empty)


def sequence_of(corpus, user):
    histories, catalogue = open_histories(corpus), open_catalogue(corpus)
    u = histories.users.index(user)
    places = histories.items[histories.offsets[u] : histories.offsets[u + 1]]
    return [catalogue.item_ids[place] for place in places]


ROWS = [("a", "3", 1), ("a", "1", 2), ("a", "2", 3), ("a", "4", 4), ("b", "1", 1), ("b", "4", 2)]
ROWS += [("b", "2", 3)]


def test_the_last_item_is_the_tests_and_the_last_but_one_the_validations(tmp_path, tiny_llama):
    corpus = of_rows(tmp_path, tiny_llama, ROWS)
    histories, catalogue = open_histories(corpus), open_catalogue(corpus)
    assert sequence_of(corpus, "a") == ["3", "1", "2", "4"]

    def named(part):
        return [catalogue.item_ids[histories.items[row]] for row in histories.rows(part)]

    assert named("train") == ["1"]  # b has one item to start from, one each to choose and to test
    assert named("validation") == ["2", "4"]
    assert named("test") == ["4", "2"]
    padding = len(catalogue)
    window = histories.windows(histories.rows("test"), 3, padding)
    ids = [[*catalogue.item_ids, "-"][place] for place in window.ravel()]
    assert ids == ["3", "1", "2", "-", "1", "4"]
    assert len(corpus.split("train")) == 1
    assert len(corpus.split("heldout")) == 2


def test_a_question_is_prompt_and_title_and_named_by_its_content(
    tmp_path, tiny_llama, tiny_tokenizer
):
    corpus = of_rows(tmp_path, tiny_llama, ROWS)
    histories = open_histories(corpus)
    row = histories.rows("test")[0]
    (example,) = (
        e for e in corpus.split("heldout") if e.example_id == histories.example_ids[row].as_py()
    )
    text = tiny_tokenizer.decode(example.token_ids)
    asked = tiny_tokenizer.decode(example.token_ids[~example.loss_mask])
    title = dict(small_interactions.titles())
    assert asked == (
        "One person chose these, one after the other:\n\n"
        f"{title['3']}\n{title['1']}\n{title['2']}\n"
    )
    assert text == asked + title["4"] + "\n"


def test_the_order_of_lines_means_nothing(tmp_path, tiny_llama):
    rows = [(u, i, t) for u, i, _, t in small_interactions.lines()]
    corpora = []
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        (tmp_path / str(seed)).mkdir()
        titles = random.Random(seed).sample(TITLES, len(TITLES))
        corpora.append(of_rows(tmp_path / str(seed), tiny_llama, rows, titles))
    assert corpora[0].digest == corpora[1].digest
    again = prepare(
        Prepare.model_validate({"source": corpora[0].facts["settings"]["source"], "window": 128}),
        str(tiny_llama),
        corpora[0].directory,
    )
    assert again.facts == corpora[0].facts


def test_ties_are_ordered_by_item_and_counted(tmp_path, tiny_llama):
    rows = [("a", item, 7) for item in ("10", "2", "1", "3")]
    corpus = of_rows(tmp_path, tiny_llama, rows)
    assert sequence_of(corpus, "a") == ["1", "2", "3", "10"]
    assert corpus.facts["interactions"]["interactions_at_one_time_with_another_of_their_user"] == 3


def test_what_is_left_out_is_counted(tmp_path, tiny_llama):
    rows = [*ROWS, ROWS[0], ("c", "5", 1), ("c", "6", 2), ("d", "nothing", 1)]
    corpus = of_rows(tmp_path, tiny_llama, rows, unknown_items="skip")
    dropped = corpus.facts["dropped"]
    assert dropped["repeated_interactions"] == 1
    assert dropped["users_with_fewer_than_three_interactions"] == 1
    assert dropped["interactions_of_users_with_fewer_than_three"] == 2
    assert dropped["interactions_with_items_outside_the_catalogue"] == 1
    assert dropped["items_that_nobody_took"] == len(TITLES) - 4


def test_k_core_and_ratings(tmp_path, tiny_llama):
    path = small_interactions.save(tmp_path / "films")
    source = small_interactions.source(path, k_core=4, min_rating=2)
    corpus = made(tmp_path, tiny_llama, source)
    histories = open_histories(corpus)
    assert np.diff(histories.offsets).min() >= 4
    assert np.bincount(histories.items).min() >= 4
    low = sum(rating < 2 for *_, rating, _ in small_interactions.lines())
    assert corpus.facts["dropped"]["interactions_rated_too_low"] == low > 0


def test_an_item_outside_the_catalogue_stops(tmp_path, tiny_llama):
    with pytest.raises(CorpusError, match=r"1 interactions.*first with 'x'.*unknown_items"):
        of_rows(tmp_path, tiny_llama, [*ROWS, ("a", "x", 9)])


def test_an_empty_title_stops_or_is_counted(tmp_path, tiny_llama):
    titles = [*TITLES[:-1], TITLES[-1] | {"title": "  "}]
    with pytest.raises(CorpusError, match=r"items\.jsonl:16: item '16' has no title"):
        of_rows(tmp_path, tiny_llama, ROWS, titles)
    corpus = of_rows(tmp_path, tiny_llama, ROWS, titles, empty_documents="skip")
    assert corpus.facts["dropped"]["items_without_a_title"] == 1


def test_duplicate_titles_are_two_items_and_a_duplicate_id_is_a_mistake(tmp_path, tiny_llama):
    same = [TITLES[0], TITLES[1] | {"title": TITLES[0]["title"]}, *TITLES[2:]]
    corpus = of_rows(tmp_path, tiny_llama, ROWS, same)
    assert corpus.facts["interactions"]["items_that_share_a_title"] == 1
    catalogue = open_catalogue(corpus)
    assert catalogue.key(0) != catalogue.key(1)
    with pytest.raises(CorpusError, match=r"item '1' is there twice \(first at .*:1\)"):
        of_rows(tmp_path, tiny_llama, ROWS, [*TITLES, TITLES[0]])


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (("a", "1", "soon"), r":8: column 'time' holds 'soon'; expected a number"),
        (("", "1", 5), r":8: column 'user' is empty"),
    ],
)
def test_bad_cells_are_named(tmp_path, tiny_llama, row, found):
    with pytest.raises(CorpusError, match=found):
        of_rows(tmp_path, tiny_llama, [*ROWS, row])


def test_nothing_left_says_why(tmp_path, tiny_llama):
    with pytest.raises(CorpusError, match=r"no interaction is left.*9_core|9 core"):
        of_rows(tmp_path, tiny_llama, ROWS, k_core=9)


def test_latin_1_is_asked_for_by_name_and_read_from_movielens_own_files(tmp_path, tiny_llama):
    folder = small_interactions.save(tmp_path / "films")
    text = (folder / "movies.csv").read_text().replace("The river", "Les Misérables")
    (folder / "movies.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorpusError, match=r"movies\.csv:2: byte 0xe9.*encoding = 'latin-1'"):
        made(tmp_path, tiny_llama, small_interactions.source(folder))
    corpus = made(
        tmp_path, tiny_llama, small_interactions.source(folder, encoding="latin-1"), "csv"
    )
    assert any("Misérables" in title for title in open_catalogue(corpus).titles)
    old = tmp_path / "old"
    old.mkdir()
    rows = ["::".join(map(str, line)) for line in small_interactions.lines()]
    (old / "ratings.dat").write_text("\n".join(rows) + "\n")
    named = [
        f"{item}::{title.replace('river', 'rivière')}::Drama"
        for item, title in small_interactions.titles()
    ]
    (old / "movies.dat").write_bytes("\n".join(named).encode("latin-1"))
    found = made(tmp_path, tiny_llama, small_interactions.source(old), "dat")
    assert any("rivière" in title for title in open_catalogue(found).titles)


def test_every_layout_gives_the_same_sequences(tmp_path, tiny_llama):
    lines, titles = small_interactions.lines(), small_interactions.titles()
    small_interactions.save(tmp_path / "csv")
    for name in ("ml100k", "ml1m", "recbole", "parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "ml100k/u.data").write_text("\n".join("\t".join(map(str, x)) for x in lines))
    (tmp_path / "ml100k/u.item").write_text(
        "\n".join("|".join([i, t, "", "", "", *"0" * 19]) for i, t in titles)
    )
    (tmp_path / "ml1m/ratings.dat").write_text("\n".join("::".join(map(str, x)) for x in lines))
    (tmp_path / "ml1m/movies.dat").write_text("\n".join(f"{i}::{t}::x" for i, t in titles))
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "recbole/films.inter").write_text(
        "\n".join([head, *("\t".join(map(str, x)) for x in lines)])
    )
    (tmp_path / "recbole/films.item").write_text(
        "\n".join(["item_id:token\tmovie_title:token_seq", *(f"{i}\t{t}" for i, t in titles)])
    )
    columns = dict(zip(("user_id", "item_id", "rating", "timestamp"), zip(*lines)))
    pq.write_table(pa.table(columns), tmp_path / "parquet/log.parquet")
    pq.write_table(
        pa.table({"item_id": [i for i, _ in titles], "title": [t for _, t in titles]}),
        tmp_path / "parquet/items.parquet",
    )
    digests = set()
    for name in ("csv", "ml100k", "ml1m", "recbole"):
        source = small_interactions.source(tmp_path / name)
        digests.add(made(tmp_path, tiny_llama, source, f"corpus-{name}").digest)
    source = small_interactions.source(
        tmp_path / "parquet/log.parquet", catalogue=str(tmp_path / "parquet/items.parquet")
    )
    digests.add(made(tmp_path, tiny_llama, source, "corpus-parquet").digest)
    assert len(digests) == 1


def test_a_history_too_long_for_the_window_loses_its_oldest_items(
    tmp_path, tiny_llama, tiny_tokenizer
):
    path = small_interactions.save(tmp_path / "films")
    corpus = made(tmp_path, tiny_llama, small_interactions.source(path), window=48)
    assert max(len(e.token_ids) for e in corpus.split("train")) <= 48
    assert corpus.facts["dropped"]["histories_cut_to_the_window"] > 0
    with pytest.raises(CorpusError, match="a question about one item has"):
        made(tmp_path, tiny_llama, small_interactions.source(path), "short", window=16)


def test_a_changed_catalogue_is_refused(tmp_path, tiny_llama):
    corpus = of_rows(tmp_path, tiny_llama, ROWS)
    other = [TITLES[0] | {"title": "Another"}, *TITLES[1:]]
    (tmp_path / "b").mkdir()
    changed = of_rows(tmp_path / "b", tiny_llama, ROWS, other)
    with pytest.raises(PlanMismatch, match="catalogue of 4 items"):
        check_catalogue(corpus.facts["catalogue"], changed.facts["catalogue"], "cache")
    facts = json.loads((corpus.directory / "corpus.json").read_text())
    facts["catalogue"]["digest"] = "0" * 64
    (corpus.directory / "corpus.json").write_text(json.dumps(facts))
    with pytest.raises(PlanMismatch):
        open_catalogue(Corpus.open(corpus.directory))


def test_items_are_texts_with_one_token_behind(tmp_path, tiny_llama, tiny_tokenizer):
    corpus = of_rows(tmp_path, tiny_llama, ROWS)
    catalogue = open_catalogue(corpus)
    for place, example in enumerate(open_items(corpus)):
        assert example.example_id == catalogue.key(place)
        assert tiny_tokenizer.decode(example.token_ids[:-1]) == catalogue.titles[place]
        assert example.first_row == len(example.token_ids) - 2
