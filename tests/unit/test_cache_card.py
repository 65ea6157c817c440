"""The card of a cache is what the hub's own library reads, and its files are opened by others."""

import io
from dataclasses import replace

import datasets
import duckdb
import numpy as np
import pandas
import pytest
from huggingface_hub import DatasetCard

from stillroom.pipeline.cache.card import README, size_category
from stillroom.pipeline.cache.sharing.readable import readable_rows
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
