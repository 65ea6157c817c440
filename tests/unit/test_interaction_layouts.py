"""Files of interactions as the world writes them: encodings, quotes, dates, types, templates."""

import codecs
import datetime
import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config import Prepare
from stillroom.pipeline.config.plain_template import PlainTemplate
from stillroom.pipeline.config.recommending import Interactions
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.corpus.interaction_files import USUAL as USUAL_NAMES
from stillroom.pipeline.corpus.item_questions import _read, settings_of

LOG = [("u1", 1, 10), ("u1", 2, 11), ("u1", 3, 12), ("u1", 4, 13)]
LOG += [("u2", 2, 1), ("u2", 3, 2), ("u2", 4, 3), ("u2", 1, 4)]
TITLES = [(item, f"Title {item}") for item in range(1, 5)]
USUAL = {"u1": ["1", "2", "3", "4"], "u2": ["2", "3", "4", "1"]}


def rows(head, lines, between=",", end="\n"):
    return end.join([head, *(between.join(map(str, line)) for line in lines)]) + end


LOG_CSV, TITLES_CSV = rows("userId,movieId,timestamp", LOG), rows("movieId,title", TITLES)


def write(directory, **files):
    """Files by name, `__` for a dot; the first is the log, the second the catalogue."""
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names = [str(directory / name.replace("__", ".")) for name in files]
    return names[0], names[1]


def found(paths, empty="error", **interactions):
    """(user -> item ids, everything) as the corpus would have it."""
    settings = {"k_core": 1, "history": 3, "catalogue": paths[1]} | interactions
    source = {"name": "x", "kind": "interactions", "path": paths[0], "interactions": settings}
    tables = {"source": [source], "window": 128, "empty_documents": empty}
    config = validate(Prepare, tables, "run.toml")
    read = _read(config, settings_of(config.source[0]))
    parts = zip(read.users, np.split(read.items, read.offsets[1:-1]))
    return {user: [read.catalogue.item_ids[i] for i in items] for user, items in parts}, read


@pytest.mark.parametrize(
    ("encoding", "mark", "named"),
    [
        ("utf-8", codecs.BOM_UTF8, ""),
        ("utf-8", codecs.BOM_UTF8, "UTF-8"),
        ("utf-16-le", codecs.BOM_UTF16_LE, ""),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16-le"),
        ("utf-32-le", codecs.BOM_UTF32_LE, ""),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, encoding, mark, named):
    log, titles = (mark + text.encode(encoding) for text in (LOG_CSV, TITLES_CSV))
    paths = write(tmp_path, log__csv=log, titles__csv=titles)
    assert found(paths, encoding=named)[0] == USUAL


def test_a_mark_before_movielens_own_layout_makes_no_new_user(tmp_path):
    lines = "".join(f"{u}\t{i}\t5\t{t}\n" for u, i, t in LOG)
    films = "".join("|".join([str(i), t, "", "", "", *"0" * 19]) + "\r\n" for i, t in TITLES)
    paths = write(tmp_path, u__data=codecs.BOM_UTF8 + lines.encode(), u__item=films)
    assert found(paths)[0] == USUAL


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_end_of_line_is_one(tmp_path, end):
    log, titles = (text.replace("\n", end) for text in (LOG_CSV, TITLES_CSV))
    assert found(write(tmp_path, log__csv=log, titles__csv=titles))[0] == USUAL


def test_quoted_fields_hold_anything(tmp_path):
    """More than a block of the parser, every title on two lines."""
    names = [(i, f'"Say ""{i}"",\n{"long " * 60}"') for i in range(1, 9000)]
    for suffix, between in (("csv", ","), ("tsv", "\t")):
        head = f'movieId{between}"title"'
        titles = {f"titles__{suffix}": rows(head, names, between)}
        _, read = found(write(tmp_path, log__csv=LOG_CSV, **titles))
        assert read.catalogue.titles[1] == 'Say "2", ' + " ".join(["long"] * 60)
    broken = rows("movieId,title", [(1, '"A\nB"'), (2, "")])
    with pytest.raises(CorpusError, match=r"titles\.csv row:2: item '2' has no title"):
        found(write(tmp_path, log__csv=LOG_CSV, titles__csv=broken))


def test_recbole_fields_are_as_they_stand(tmp_path):
    inter = rows("user_id:token\titem_id:token\ttimestamp:float", LOG, "\t")
    head = "item_id:token\tmovie_title:token_seq\tclass:token_seq"
    item = rows(head, [(i, f'"{t}" it\'s', "a b") for i, t in TITLES], "\t")
    assert found(write(tmp_path, x__inter=inter, x__item=item))[0] == USUAL
    _, read = found(write(tmp_path, x__inter=inter, x__item=item))
    assert read.catalogue.titles[0] == '"Title 1" it\'s'


def test_names_of_files_are_read_in_any_case_and_compressed(tmp_path):
    paths = write(tmp_path, LOG__CSV=LOG_CSV, titles__csv__gz=gzip.compress(TITLES_CSV.encode()))
    assert found(paths)[0] == USUAL


BACKWARDS = {"u1": ["4", "3", "2", "1"], "u2": ["1", "4", "3", "2"]}


@pytest.mark.parametrize(
    "when",
    [
        lambda t: 1_700_000_000_000_000_000 - t,  # nanoseconds
        lambda t: 1_700_000_000_000_000 - t,
        lambda t: -t,
        lambda t: f"{1.5 - t / 100:.4e}",
        lambda t: f"2024-02-{28 - t:02d}",
        lambda t: f"2024-02-28T00:00:{59 - t}Z",
        lambda t: f"2024-02-28 00:00:00.{999_999_999 - t}+01:00",
    ],
)
def test_times_are_ordered_to_the_last_digit(tmp_path, when):
    log = rows("userId,movieId,timestamp", [(u, i, when(t)) for u, i, t in LOG])
    assert found(write(tmp_path, log__csv=log, titles__csv=TITLES_CSV))[0] == BACKWARDS


@pytest.mark.parametrize(
    "when", [10**25, "1.7e18", "nan", "1_000", "٣", "05/31/2024", "2024-05-31"]
)
def test_times_whose_order_is_not_known_are_refused(tmp_path, when):
    """The last one is a date among numbers."""
    log = rows("userId,movieId,timestamp", [*LOG, ("u1", 3, when)])
    with pytest.raises(CorpusError, match=r"log\.csv:10: column 'timestamp' holds"):
        found(write(tmp_path, log__csv=log, titles__csv=TITLES_CSV))


@pytest.mark.parametrize(
    ("usual", "odd", "expected"),
    [
        ("2024-05-{:02d}", "1714521600", "a date without a zone"),
        ("2024-05-{:02d}T10:00:00Z", "2024-05-31", "a date with a zone"),
        ("2024-05-{:02d}", "2024-05-31T10:00:00+02:00", "a date without a zone"),
        ("17145216{:02d}", "2024-05-31", "a number"),
        ("2024-05-{:02d}", "31.5.2024", "a date without a zone"),
    ],
)
def test_of_two_ways_to_write_a_time_the_rarer_one_is_named(tmp_path, usual, odd, expected):
    lines = [(u, i, usual.format(t)) for u, i, t in LOG]
    for place in (0, 4, len(lines)):
        log = rows("userId,movieId,timestamp", [*lines[:place], ("u2", 3, odd), *lines[place:]])
        message = (
            rf"log\.csv:{place + 2}: .* holds '{re.escape(odd)}'; expected {expected}, as are 8"
        )
        with pytest.raises(CorpusError, match=message):
            found(write(tmp_path, log__csv=log, titles__csv=TITLES_CSV))


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ('userId,timestamp,movieId\nu1,1,1\nu1,2,"2\nu1,3,3\nu2,1,1\n', 3),
        ('userId,timestamp,movieId\nu1,1,"1\nu1,2,2\nu1,3,"3"\nu2,1,1\n', 2),
        ('movieId,timestamp,userId\n1,1,"u1\n2,2,u1\n', 2),
        ('userId,timestamp,"movieId\nu1,1,1\n', 1),
    ],
)
@pytest.mark.parametrize("unknown", ["error", "skip"])
def test_a_quote_that_does_not_close_swallows_no_rows(tmp_path, log, line, unknown):
    paths = write(tmp_path, log__csv=log, titles__csv=TITLES_CSV)
    with pytest.raises(CorpusError, match=rf"log\.csv:{line}: a quote that opens in this row"):
        found(paths, unknown_items=unknown)
    titles = write(tmp_path, l__csv=LOG_CSV, t__csv='movieId,title\n1,"A\n2,B\n3,C\n4,D\n')
    with pytest.raises(CorpusError, match=r"t\.csv:2: a quote"):
        found(titles, unknown_items=unknown)


def test_a_name_with_rows_inside_is_refused_though_its_quotes_close(tmp_path):
    log = 'userId,movieId,timestamp\nu1,1,1\n"u1,2,2\nu1",3,3\nu2,1,1\n'
    with pytest.raises(CorpusError, match="column 'userId' holds a line end: 'u1,2,2"):
        found(write(tmp_path, log__csv=log, titles__csv=TITLES_CSV), unknown_items="skip")
    titles = 'movieId,title\n1,A\n"2\n3",B\n4,C\n'
    with pytest.raises(CorpusError, match="column 'movieId' holds a line end"):
        found(write(tmp_path, log__csv=LOG_CSV, titles__csv=titles), unknown_items="skip")


def test_the_reference_lists_the_usual_names_of_every_column():
    for column, names in USUAL_NAMES.items():
        said = Interactions.model_fields[column].description
        assert said
        assert all(f"`{name}`" in said for name in names), (column, said)


def columns(**changed):
    usual = dict(zip(("user", "item", "time"), map(list, zip(*LOG))))
    return pa.table(usual | changed)


TIMES = [t for *_, t in LOG]


@pytest.mark.parametrize(
    "changed",
    [
        {"user": pa.array([u for u, *_ in LOG]).dictionary_encode()},
        {"item": pa.array([float(i) for _, i, _ in LOG])},
        {"time": pa.array([datetime.datetime(2024, 1, 1, 0, 0, t) for t in TIMES])},
        {"time": pa.array([datetime.date(2024, 1, t) for t in TIMES])},
        {"time": pa.array(TIMES, pa.int64()).cast(pa.timestamp("ns", "Europe/Berlin"))},
        {"unread": pa.array([b"\xff"] * len(LOG))},
    ],
    ids=["dictionary", "float ids", "timestamp", "date", "zone", "bytes nobody asks for"],
)
def test_types_of_parquet_mean_what_text_means(tmp_path, changed):
    pq.write_table(columns(**changed), tmp_path / "log.pq")
    titles = pa.table({"item": [i for i, _ in TITLES], "title": [t for _, t in TITLES]})
    pq.write_table(titles, tmp_path / "titles.parquet")
    paths = str(tmp_path / "log.pq"), str(tmp_path / "titles.parquet")
    assert found(paths)[0] == USUAL


def test_what_is_no_number_is_no_user(tmp_path):
    pq.write_table(columns(user=pa.array([1.0] * 7 + [float("nan")])), tmp_path / "log.parquet")
    _, titles = write(tmp_path, unread__csv="", titles__csv=rows("item,title", TITLES))
    with pytest.raises(CorpusError, match=r"row:8: column 'user' is empty"):
        found((str(tmp_path / "log.parquet"), titles))


def test_nested_values_are_json_in_parquet_and_jsonl(tmp_path):
    kinds = [{"item": i, "title": t, "kinds": ["a", "é"]} for i, t in TITLES]
    pq.write_table(pa.Table.from_pylist(kinds), tmp_path / "titles.parquet")
    lines = "".join(json.dumps(one) + "\n" for one in kinds)
    log, titles = write(tmp_path, log__csv=LOG_CSV.replace("movieId", "item"), titles__jsonl=lines)
    for catalogue in (titles, str(tmp_path / "titles.parquet")):
        settings = {"item_text": "{title} {kinds}", "text_columns": ["kinds"]}
        _, read = found((log, catalogue), **settings)
        assert read.catalogue.texts[0] == 'Title 1 ["a", "é"]'


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        ("movieId,title,title\n1,A,B\n", "2 columns are called 'title'"),
        ("", r"has no column for the item.*there is none"),
        ("movieId,title\n,A\n", "an item without an id"),
        ("movieId,title\n1,A,B\n", "a line end in it needs quotes"),
    ],
)
def test_catalogues_that_cannot_be_read_say_why(tmp_path, titles, message):
    with pytest.raises(CorpusError, match=message):
        found(write(tmp_path, log__csv=LOG_CSV, titles__csv=titles))


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"item": 9, "title": "\\ud800"}', "half of a character"), ("[" * 100_000, "is not JSON")],
)
def test_broken_json_is_named_by_its_line(tmp_path, line, message):
    titles = "\n\n" + '{"item": 1, "title": "A"}\n' + line + "\n"
    with pytest.raises(CorpusError, match=rf"titles\.jsonl:4: .*{message}"):
        found(write(tmp_path, log__csv=LOG_CSV, titles__jsonl=titles))


def test_items_without_an_id_are_not_one_item_twice(tmp_path):
    titles = TITLES_CSV + ",x\n,y\n"
    paths = write(tmp_path, log__csv=LOG_CSV, titles__csv=titles)
    assert found(paths, empty="skip")[1].dropped["items_without_a_title"] == 2


def test_ids_are_kept_whatever_their_length_and_blanks(tmp_path):
    for name in ("9" * 5000, "a  b"):
        log = rows("userId,movieId,timestamp", [(u, f"{name}{i}", t) for u, i, t in LOG])
        titles = rows("movieId,title", [(f"{name}{i}", t) for i, t in TITLES])
        sequences, _ = found(write(tmp_path, log__csv=log, titles__csv=titles))
        assert sequences["u1"] == [f"{name}{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "settings",
    [
        {"line": "{title} ({year})"},
        {"line": "{title"},
        {"line": "{title!r}"},
        {"line": "{title} {title}"},
        {"line": "{{title}}"},
        {"line": "{title}\n"},
        {"item_text": "film"},
        {"item_text": "{title.upper}"},
        {"item_text": "{title} {kinds}"},
        {"item_text": "{kinds}", "text_columns": ["kinds"]},
        {"prompt": "hello"},
        {"history": 0},
        {"min_rating": float("nan")},
    ],
)
def test_templates_with_other_places_are_refused_before_any_work(tmp_path, settings):
    paths = write(tmp_path, log__csv=LOG_CSV, titles__csv=TITLES_CSV)
    with pytest.raises(ConfigError, match="interactions"):
        found(paths, **settings)


def test_what_stands_in_a_place_is_not_looked_into(tmp_path):
    titles = rows("movieId,title", [(i, "{history} {title} {0}" + str(i)) for i, _ in TITLES])
    paths = write(tmp_path, log__csv=LOG_CSV, titles__csv=titles)
    _, read = found(paths, item_text="{{{title}}}")
    assert read.catalogue.texts[0] == "{{history} {title} {0}1}"
    template = PlainTemplate.of('- "{title}"{{!}}', ["title"])
    assert template.fill({"title": "{x}"}) == '- "{x}"{!}'
    assert template.around("title") == ('- "', '"{!}')
