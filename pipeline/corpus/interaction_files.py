"""Files of interactions and catalogues as they are published, read into columns of text.

One idea: a file is read whole as text columns, whatever its layout; which column is the user and
what a number is are decided afterwards, so every complaint names the file and the row. MovieLens'
own layouts (100K, 1M, 10M, CSV) and RecBole's atomic files are read as they are.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.characters import decode

GENRES = 19
USUAL = {
    "user": ("userId", "user_id", "user"),
    "item": ("movieId", "item_id", "item", "asin"),
    "time": ("timestamp", "time"),
    "rating": ("rating",),
    "title": ("title", "movie_title", "name"),
}
"""What these columns are usually called."""
PAIRS = (
    ("u.data", "u.item"),
    ("ratings.dat", "movies.dat"),
    ("ratings.csv", "movies.csv"),
    ("ratings.csv", "items.csv"),
    ("*.inter", "*.item"),
)
"""File of interactions and catalogue, as they lie together in a directory."""
BARE_COLUMNS = {
    "u.data": ("user_id", "item_id", "rating", "timestamp"),
    "u.item": ("item_id", "title", "release", "video", "url", *(f"g{n}" for n in range(GENRES))),
    "ratings.dat": ("user_id", "item_id", "rating", "timestamp"),
    "movies.dat": ("item_id", "title", "genres"),
}
"""Columns of MovieLens' files without a header."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A file as text columns.

    Attributes:
        table: every column as strings; what the file leaves empty is null or "".
        where: the file, for messages.
        first_row: number of the first row in the file, for messages.
    """

    table: pa.Table
    where: str
    first_row: int

    def pick(self, given: str, usual: str) -> str:
        """Name of a column: the one given, or the first usual one; "" where there is none.

        Raises:
            CorpusError: the one given is not there.
        """
        names = self.table.column_names
        if given and given not in names:
            raise CorpusError(
                f"no column '{given}'",
                expected=f"one of {', '.join(names)}",
                where=self.where,
                remedy=nearest(given, names),
            )
        return given or next((name for name in USUAL[usual] if name in names), "")

    def need(self, given: str, usual: str) -> str:
        """The same; a column that must be there.

        Raises:
            CorpusError: it is not.
        """
        if found := self.pick(given, usual):
            return found
        raise CorpusError(
            f"has no column for the {usual}",
            expected=f"one of {', '.join(USUAL[usual])}",
            where=self.where,
            remedy=f"Name it: {usual} = '...' under [prepare.source.interactions]; "
            f"there are {', '.join(self.table.column_names)}.",
        )

    def text(self, name: str) -> pa.ChunkedArray:
        """A column as text."""
        return self.table.column(name)

    def at(self, row: int) -> str:
        """Where a row (0-based) is, for messages."""
        return f"{self.where}:{row + self.first_row}"


def find_pair(path: str, catalogue: str) -> tuple[Path, Path]:
    """The two files of a data set: given by name, or found in a directory.

    Raises:
        CorpusError: one of them is not there.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        return _in_directory(given, catalogue)
    if not given.is_file():
        raise CorpusError("no such file or directory", where=path, remedy="Check the path.")
    if not catalogue:
        raise CorpusError(
            "a file of interactions without a catalogue",
            where=path,
            remedy="Set catalogue under [prepare.source.interactions] to the file of items.",
        )
    return given, _existing(Path(catalogue).expanduser())


def read_columns(path: Path, encoding: str) -> Columns:
    """Read a CSV, TSV, `.dat`, RecBole, JSONL or Parquet file.

    Raises:
        CorpusError: it cannot be read, or its bytes are not text of that encoding.
    """
    if path.suffix == ".parquet":
        return Columns(_strings(_parquet(path)), f"{path} row", 1)
    text = _text(path, encoding)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return Columns(_strings(_json_lines(text, path)), str(path), 1)
    if path.name in BARE_COLUMNS:
        return Columns(_bare(text, path), str(path), 1)
    return Columns(_headed(text, path), str(path), 2)


def _in_directory(directory: Path, catalogue: str) -> tuple[Path, Path]:
    for one, other in PAIRS:
        found = sorted(directory.glob(one))
        items = [Path(catalogue).expanduser()] if catalogue else sorted(directory.glob(other))
        if len(found) == 1 and len(items) == 1:
            return found[0], _existing(items[0])
    listed = "; ".join(f"{one} and {other}" for one, other in PAIRS)
    raise CorpusError(
        "holds no interactions and catalogue that are known",
        expected=listed,
        where=str(directory),
        remedy="Name the files: path, and catalogue under [prepare.source.interactions].",
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CorpusError("no such catalogue", where=str(path), remedy="Check the path.")
    return path


def _text(path: Path, encoding: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot be read ({error.strerror})", where=str(path)) from None
    if not encoding and path.name in BARE_COLUMNS:
        return _utf8_or_latin1(data)
    if encoding not in ("", "utf-8"):
        return _in_encoding(data, encoding, path)
    try:
        return decode(data, str(path)).removeprefix("\ufeff")
    except CorpusError as error:
        raise CorpusError(
            error.found,
            where=error.where,
            remedy="Set encoding = 'latin-1' (or what it is) under [prepare.source.interactions].",
        ) from None


def _utf8_or_latin1(data: bytes) -> str:
    """MovieLens 100K and 1M are Latin-1, 10M is UTF-8, and none of them says so."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _in_encoding(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except (LookupError, UnicodeDecodeError) as error:
        raise CorpusError(f"is not {encoding} ({error})", where=str(path)) from None


def _bare(text: str, path: Path) -> pa.Table:
    names = BARE_COLUMNS[path.name]
    separator = {".dat": "::", ".data": "\t", ".item": "|"}[path.suffix]
    rows = [line.split(separator) for line in text.split("\n") if line.strip()]
    return _table_of(names, rows, path)


def _table_of(names: Sequence[str], rows: list[list[str]], path: Path) -> pa.Table:
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise CorpusError(
                f"{len(row)} fields", expected=f"{len(names)}", where=f"{path}:{number}"
            )
    columns = zip(*rows) if rows else [()] * len(names)
    arrays = [pa.array([v.strip("\r") for v in column], pa.string()) for column in columns]
    return pa.table(arrays, names=list(names))


def _headed(text: str, path: Path) -> pa.Table:
    """CSV or TSV with a header; RecBole's `name:type` becomes `name`."""
    delimiter = "," if path.suffix == ".csv" else "\t"
    header = text[: text.find("\n")].rstrip("\r").split(delimiter)
    names = [name.strip().strip('"').split(":")[0] for name in header]
    quote = '"' if path.suffix == ".csv" else False
    try:
        return pyarrow.csv.read_csv(
            io.BytesIO(text.encode()),
            pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
            pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=quote),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise CorpusError(f"cannot be understood ({str(error)[:160]})", where=str(path)) from None


def _json_lines(text: str, path: Path) -> pa.Table:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise CorpusError(f"is not JSON ({error})", where=f"{path}:{number}") from None
        if rows and not isinstance(rows[-1], dict):
            raise CorpusError("holds no JSON object", where=f"{path}:{number}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({n: [_plain(row.get(n)) for row in rows] for n in names})


def _plain(value: object) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _parquet(path: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"is not Parquet ({str(error)[:120]})", where=str(path)) from None


def _strings(table: pa.Table) -> pa.Table:
    fields = []
    for name in table.column_names:
        column = table.column(name)
        simple = not pa.types.is_nested(column.type)
        fields.append((name, column.cast(pa.string()) if simple else None))
    return pa.table({name: column for name, column in fields if column is not None})
