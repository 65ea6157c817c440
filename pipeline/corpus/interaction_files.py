"""Files of interactions and catalogues as they are published: finding them, and their columns.

One idea: a file is text columns, whatever its layout (`interaction_tables`); which column is the
user and what a number is are decided afterwards, so every complaint names the file and the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.compression import plain_name
from stillroom.pipeline.corpus.interaction_tables import (
    BARE_COLUMNS,
    Table,
    as_text,
    bare,
    headed,
    json_lines,
    parquet,
    text_of,
)

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


@dataclass(frozen=True, slots=True)
class Columns:
    """A file as text columns.

    Attributes:
        table: columns as the file has them.
        where: the file, for messages.
        numbers: of the rows in the file, for messages: the first one's, or every one's.
    """

    table: pa.Table
    where: str
    numbers: int | Sequence[int]

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
        found = given or next((name for name in USUAL[usual] if name in names), "")
        if names.count(found) > 1:
            raise CorpusError(
                f"{names.count(found)} columns are called '{found}'",
                where=self.where,
                remedy="Rename all but one of them in the file.",
            )
        return found

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
            f"there {self._listed()}.",
        )

    def _listed(self) -> str:
        return f"are {', '.join(self.table.column_names)}" if self.table.column_names else "is none"

    def text(self, name: str) -> pa.ChunkedArray:
        """A column as text."""
        return as_text(self.table.column(name), name, self.where)

    def at(self, row: int) -> str:
        """Where a row (0-based) is, for messages."""
        numbers = self.numbers
        number = numbers + row if isinstance(numbers, int) else numbers[row]
        return f"{self.where}:{number}"


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
    """Read a CSV, TSV, `.dat`, RecBole, JSONL or Parquet file; a text file may be compressed.

    Raises:
        CorpusError: it cannot be read, or its bytes are not text of that encoding.
    """
    name = plain_name(path)
    suffix = Path(name).suffix
    if suffix in (".parquet", ".pq"):
        return _columns(parquet(path), f"{path} row")
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _columns(json_lines(path), str(path))
    text = text_of(path, encoding)
    if name in BARE_COLUMNS:
        return _columns(bare(text, name, path), str(path))
    found = headed(text, suffix, path)
    # Where fields hold line ends, a row's number is not its line's.
    whole = text.count("\n") > len(found.rows) + 1
    return Columns(found.rows, f"{path} row", 1) if whole else Columns(found.rows, str(path), 2)


def _columns(found: Table, where: str) -> Columns:
    return Columns(found.rows, where, found.numbers or 1)


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
