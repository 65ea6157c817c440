"""Layouts of interactions and catalogues as tables of text: CSV, TSV, JSONL, Parquet, MovieLens'
own (100K, 1M, 10M) and RecBole's atomic files.

One idea: nothing is taken for a number or a date here; a cell is the text that stands in the file
(`as_text`), so two layouts of one data set say the same. Which column means what is not known here.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from stillroom.cache_schemas.errors import CorpusError, first_line
from stillroom.pipeline.corpus.characters import decode
from stillroom.pipeline.corpus.compression import DAMAGE, open_bytes, plain_name
from stillroom.pipeline.corpus.documents import Rejected
from stillroom.pipeline.corpus.json_rows import read_json

GENRES = 19
BARE_COLUMNS = {
    "u.data": ("user_id", "item_id", "rating", "timestamp"),
    "u.item": ("item_id", "title", "release", "video", "url", *(f"g{n}" for n in range(GENRES))),
    "ratings.dat": ("user_id", "item_id", "rating", "timestamp"),
    "movies.dat": ("item_id", "title", "genres"),
}
"""Columns of MovieLens' files without a header."""
SEPARATORS = {".dat": "::", ".data": "\t", ".item": "|"}
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Bytes at the start of a file that say how it is encoded; UTF-32's begin with UTF-16's."""
QUOTED = {".csv": ",", ".tsv": "\t"}
"""Suffixes of files whose fields may stand in quotes, and what stands between fields."""
LINE_END = re.compile(r"\r\n|\n|\r")
BLOCK = 1 << 26
"""Bytes of a CSV file that are parsed at a time; a row must fit."""
EXACT = 2**53
"""Whole numbers below this are themselves in 64-bit floating point."""


@dataclass(frozen=True, slots=True)
class Table:
    """A file as text.

    Attributes:
        rows: columns as the file has them; what is empty is null or "".
        numbers: line of every row; empty where that is not known.
    """

    rows: pa.Table
    numbers: Sequence[int] = ()


def text_of(path: Path, encoding: str) -> str:
    """A text file, which may be compressed and may begin with a byte order mark.

    Args:
        encoding: empty takes what the mark says, and UTF-8.

    Raises:
        CorpusError: it cannot be read, or its bytes are not text of that encoding.
    """
    try:
        with open_bytes(path) as file:
            data = file.read()
    except DAMAGE as error:
        raise CorpusError(f"cannot be read ({first_line(error)})", where=str(path)) from None
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), "")
    if (named := encoding or marked) not in ("", "utf-8"):
        return _in_encoding(data, named, path)
    if not encoding and plain_name(path) in BARE_COLUMNS:
        return _utf8_or_latin1(data)
    try:
        return decode(data, str(path)).removeprefix("\ufeff")
    except CorpusError as error:
        raise CorpusError(
            error.found,
            where=error.where,
            remedy="Set encoding = 'latin-1' (or what it is) under [prepare.source.interactions].",
        ) from None


def bare(text: str, name: str, path: Path) -> Table:
    """One of MovieLens' files without a header.

    Raises:
        CorpusError: a line has another number of fields.
    """
    names, separator = BARE_COLUMNS[name], SEPARATORS[Path(name).suffix]
    lines = enumerate(text.split("\n"), start=1)
    found = {n: line.rstrip("\r").split(separator) for n, line in lines if line.strip()}
    for number, row in found.items():
        if len(row) != len(names):
            raise CorpusError(
                f"{len(row)} fields", expected=f"{len(names)}", where=f"{path}:{number}"
            )
    columns = zip(*found.values()) if found else [()] * len(names)
    arrays = [pa.array(column, pa.string()) for column in columns]
    return Table(pa.table(arrays, names=list(names)), list(found))


def headed(text: str, suffix: str, path: Path) -> Table:
    """CSV or TSV with a header; RecBole's `name:type` becomes `name`.

    Raises:
        CorpusError: the rows have not the columns of the header.
    """
    delimiter, quoted = QUOTED.get(suffix, "\t"), suffix in QUOTED
    first, *rest = LINE_END.split(text, maxsplit=1)
    names = _header(first, delimiter, quoted)
    if quoted and '"' in text:
        _check_quotes(text, delimiter, path)
    if not any(rest):
        return Table(pa.table([pa.array([], pa.string())] * len(names), names=names))
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(text.encode()),
            pyarrow.csv.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
            ),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise CorpusError(
            f"cannot be understood ({str(error)[:160]})",
            where=str(path),
            remedy="Every row needs the columns of the first line; a field with a delimiter or a "
            "line end in it needs quotes.",
        ) from None
    return Table(table)


def json_lines(path: Path) -> Table:
    """JSONL, or one JSON list of objects.

    Raises:
        CorpusError: a row is no object.
    """
    rows, numbers = [], []
    for row in read_json(path):
        if isinstance(row, Rejected):
            raise row.error
        rows.append(row.values)
        numbers.append(int(row.where.rsplit(":", 1)[1]))
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [pa.array([_plain(row.get(n)) for row in rows], pa.string()) for n in names]
    return Table(pa.table(arrays, names=names), numbers)


def parquet(path: Path) -> Table:
    """A Parquet file.

    Raises:
        CorpusError: it is none.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return Table(file.read())
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"is not Parquet ({str(error)[:120]})", where=str(path)) from None


def as_text(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """A column as text: nested values as JSON, and nothing for what is not a number among numbers.

    Raises:
        CorpusError: it holds bytes that are no text.
    """
    kind = column.type
    if pa.types.is_nested(kind):
        return pa.chunked_array([[_plain(value) for value in column.to_pylist()]], pa.string())
    if pa.types.is_floating(kind):
        column = pc.call_function("if_else", [pc.call_function("is_nan", [column]), None, column])
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CorpusError(
            f"column '{name}' ({kind}) holds what is no text ({first_line(error)})",
            where=where,
            remedy="Write the file again with text in this column.",
        ) from None


def _utf8_or_latin1(data: bytes) -> str:
    """MovieLens 100K and 1M are Latin-1, 10M is UTF-8, and none of them says so."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _in_encoding(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except (LookupError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"is not {encoding} ({error})",
            where=str(path),
            remedy="Set encoding under [prepare.source.interactions] to what it is.",
        ) from None


def _header(line: str, delimiter: str, quoted: bool) -> list[str]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader([line], delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    return [name.strip().split(":")[0] for row in rows for name in row]


def _check_quotes(text: str, delimiter: str, path: Path) -> None:
    """Refuse a quote that closes nowhere, or in the middle of a later field: Arrow takes all rows
    up to there for one field and says nothing.

    Raises:
        CorpusError: names the line of the row that it opens in.
    """
    line = 1
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for _ in rows:
            line = rows.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"a quote that opens in this row does not close at the end of its field ({error})",
            where=f"{path}:{line}",
            remedy="Close it there, or write a quote inside a field twice; what stands between two "
            "such quotes is one field, line ends and rows included.",
        ) from None


def _plain(value: object) -> str | None:
    """A value as text; a whole number is written as one, also where it was kept as a float."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str)
