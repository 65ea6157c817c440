"""The card of a cache is what the hub's own library reads, and its files are opened by others."""

import io
from dataclasses import replace
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas
import pytest
from huggingface_hub import DatasetCard

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.card import README, SHOWS_INDEX, SHOWS_ROWS, card, size_category
from stillroom.pipeline.cache.sharing.copying import copy
from stillroom.pipeline.cache.sharing.published_card import About, published_card
from stillroom.pipeline.cache.sharing.readable import readable_rows
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from tests.synthetic_records import make_record


def test_the_hub_reads_the_card(original):
    card = DatasetCard((original / README).read_text())
    told = card.data.to_dict()
    assert told["size_categories"] == ["n<1K"]
    assert told["task_categories"] == ["text-generation"]
    assert [one["config_name"] for one in told["configs"]] == ["index"]
    assert told["configs"][0]["default"] is True
    assert told["license"] == "unknown"


@pytest.mark.parametrize(
    ("rows", "word"), [(1, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")]
)
def test_sizes_are_the_hubs_words(rows, word):
    assert size_category(rows) == word


def test_others_open_the_table_that_the_viewer_shows(original, tmp_path):
    files = original / "index"
    table = pandas.read_parquet(files)
    assert len(table) == 10
    rows = duckdb.connect().sql(f"select example_id from '{files}/*.parquet'").fetchall()
    assert sorted(one for (one,) in rows) == sorted(table["example_id"])
    loaded = datasets.load_dataset(str(original), cache_dir=str(tmp_path))
    assert loaded["train"]["example_id"][:] == table["example_id"].tolist()


def test_a_long_text_is_cut_where_the_viewer_would_not_show_it(plan):
    made = make_record(plan, 0)
    long = replace(made.example, token_ids=np.zeros(300_000, np.int32))
    long = replace(long, loss_mask=np.ones(300_000, bool))
    file = readable_rows([replace(made, example=long)], lambda ids: "word " * len(ids), 5)
    (row,) = pandas.read_parquet(io.BytesIO(file)).to_dict("records")
    assert row["num_tokens"] == 300_000
    assert len(row["tokens"]) == len(row["guesses"]) < 100_000
    assert len(row["text"]) + sum(map(len, row["tokens"])) < 2_000_000


def put(plan, own=None, there=None, about=About(), has_rows=False) -> Any:  # noqa: B008
    return published_card(plan, own, there, about, has_rows, "there")


def read(data: bytes) -> Any:
    return DatasetCard(data.decode())


def test_a_card_keeps_what_people_wrote_on_it(plan):
    """Whatever is said, and not said, the next time."""
    said = About("apache-2.0", ("en",), ("me/chats",))
    made = card(plan)
    first = put(plan, made, None, said, has_rows=True)
    edited = read(first)
    edited.data.pretty_name, edited.text = "My cache", edited.text + "\n\nA paragraph of mine.\n"
    edited.data.configs.append({"config_name": "mine", "data_files": "mine/*.parquet"})
    again = read(put(plan, made, str(edited).encode(), has_rows=True))
    assert again.data.to_dict() == edited.data.to_dict()
    assert "A paragraph of mine." in again.text
    other = read(put(plan, made, str(again).encode(), About("mit"), True))
    assert (other.data.license, other.data.language) == ("mit", ["en"])
    assert other.data.source_datasets == ["me/chats"]


def test_a_card_lists_the_tables_that_are_there(plan):
    made = card(plan)
    rows = put(plan, made, made, has_rows=True)
    assert SHOWS_ROWS in rows.decode()
    assert SHOWS_INDEX not in rows.decode()
    listed = read(rows).data.configs
    assert [one["config_name"] for one in listed] == ["readable", "index"]
    assert [one.get("default", False) for one in listed] == [True, False]
    gone = read(put(plan, rows, None)).data.configs
    assert gone == read(made).data.configs
    chosen = read(rows)
    chosen.data.configs = [listed[0] | {"default": False}, listed[1] | {"default": True}]
    kept = read(put(plan, made, str(chosen).encode(), has_rows=True)).data.configs
    assert [one.get("default", False) for one in kept] == [False, True]


def test_of_two_cards_that_contradict_none_is_taken(plan):
    made = card(plan).decode()
    mine, theirs = made + "\nMine.\n", made + "\nTheirs.\n"
    with pytest.raises(CacheError, match=r"there: README.md has words .*'Theirs.'; 'Mine.'"):
        put(plan, mine.encode(), theirs.encode())
    both = (mine + "\nTheirs.\n").encode()  # as the remedy says
    assert put(plan, both, theirs.encode()).decode().count("Mine.") == 1
    assert b"Theirs." in put(plan, None, theirs.encode())
    mit, own = (made.replace("license: unknown", f"license: {name}") for name in ("mit", "gpl"))
    with pytest.raises(CacheError, match=r"license: 'mit', and the cache's own 'gpl'.*--license"):
        put(plan, own.encode(), mit.encode())
    said = put(plan, own.encode(), mit.encode(), About("mit"))
    assert read(said).data.license == "mit"


def test_a_card_that_somebody_else_began_keeps_its_words(plan):
    found = read(put(plan, card(plan), b"---\nlicense: mit\n---\n# My data\n"))
    assert (found.data.license, found.text.strip()) == ("mit", "# My data")
    assert [one["config_name"] for one in found.data.configs] == ["index"]


def test_a_copy_in_a_directory_keeps_its_card_too(original, tmp_path):
    source, target = DirectoryStorage(original), DirectoryStorage(tmp_path / "copy")
    copy(source, target, readme=True)
    assert target.read(README) == source.read(README)
    target.replace(README, target.read(README) + b"\nMine.\n")
    copy(source, target, readme=True)
    assert b"Mine." in target.read(README)
