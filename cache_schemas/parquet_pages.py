"""How much memory a Parquet file asks for, read from footer and page headers before any page is.

One idea: a reader allocates what a page's header says and repeats what a dictionary holds, so both
are added up first. Footer and page headers are Thrift in its compact form; all of it that is needed
is here, because Arrow's own view of a damaged footer may end the process. It decodes no value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from stillroom.cache_schemas.errors import ShardCorrupt

PLAIN_ENCODINGS = {0, 2, 8}
"""PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY; others may make much of little."""
DATA_PAGES, DICTIONARY_PAGE = {5: 2, 8: 4}, 7
"""Fields of PageHeader that describe a page of values -> the field of theirs with the encoding."""
MAX_NESTED, MAX_LISTED = 8, 1 << 10
ROW_GROUPS, COLUMNS, ROWS = 4, 1, 3
"""Fields of FileMetaData, RowGroup and RowGroup."""
CHUNK, OTHER_FILE, CIPHERS = 3, 1, {8, 9}
"""Fields of ColumnChunk: its description, and what only files that we do not write have."""
VALUES, LENGTH, FIRST_PAGE, FIRST_DICTIONARY = 5, 7, 9, 11
"""Fields of ColumnMetaData."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """What a footer says of one.

    Attributes:
        rows: of each column.
        chunks: (first byte, bytes) of each column.
    """

    rows: int
    chunks: list[tuple[int, int]]


def row_groups(data: memoryview, where: str) -> list[RowGroup]:
    """What the footer of a file says.

    Raises:
        ShardCorrupt: it is none that we write.
    """
    length = int.from_bytes(data[-8:-4], "little")
    footer = _Compact(data[max(len(data) - 8 - length, 0) : -8], where).struct(0)
    return [_row_group(group, where) for group in _structs(footer.get(ROW_GROUPS), where)]


def _row_group(fields: dict[int, Any], where: str) -> RowGroup:
    rows = fields.get(ROWS)
    if not _is_count(rows):
        _refuse(where)
    chunks = [_chunk(column, rows, where) for column in _structs(fields.get(COLUMNS), where)]
    return RowGroup(rows, chunks)


def _chunk(column: dict[int, Any], rows: int, where: str) -> tuple[int, int]:
    own = column.get(CHUNK)
    if not isinstance(own, dict) or OTHER_FILE in column or column.keys() & CIPHERS:
        _refuse(where)
    first, length = own.get(FIRST_PAGE), own.get(LENGTH)
    start = own.get(FIRST_DICTIONARY, first)
    # A reader goes on behind the chunk until it has as many values as are said.
    if not (_is_count(first) and _is_count(length) and _is_count(start)) or own.get(VALUES) != rows:
        _refuse(where)
    return min(first, start), length


def _structs(value: Any, where: str) -> list[dict[int, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        _refuse(where)
    return value


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def pages(data: memoryview, start: int, length: int, where: str) -> Iterator[tuple[int, int]]:
    """(bytes when unpacked, values) of every page of a column chunk.

    Raises:
        ShardCorrupt: it is no such chunk, or has an encoding that we do not write.
    """
    at, end = start, start + length
    if not 0 <= start <= end <= len(data):
        _refuse(where)
    while at < end:
        header = _Compact(data[at:end], where)
        fields = header.struct(0)
        unpacked, packed = fields.get(2), fields.get(3)
        if not _is_count(unpacked) or not _is_count(packed):
            _refuse(where)
        yield unpacked, _values(fields, where)
        at += header.at + packed
    if at != end:
        _refuse(where)


def _values(fields: dict[int, Any], where: str) -> int:
    """How many values a page holds; 0 for a dictionary."""
    for number, encoding in DATA_PAGES.items():
        if isinstance(own := fields.get(number), dict):
            count = own.get(1)
            if not _is_plain(own.get(encoding)) or not _is_count(count):
                _refuse(where)
            return count
    own = fields.get(DICTIONARY_PAGE)
    if not isinstance(own, dict) or not _is_plain(own.get(2)):
        _refuse(where)
    return 0


def _is_plain(encoding: Any) -> bool:
    return type(encoding) is int and encoding in PLAIN_ENCODINGS


def _refuse(where: str) -> NoReturn:
    raise ShardCorrupt("is not a Parquet file that we write", where=where)


class _Compact:
    """Thrift's compact protocol, read from its beginning."""

    def __init__(self, data: memoryview, where: str):
        self.data, self.at, self.where = data, 0, where

    def struct(self, depth: int) -> dict[int, Any]:
        """Fields by number."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            if number in found:  # which of them counts, readers do not agree on
                _refuse(self.where)
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):
            return self._skip(8 if kind == 7 else self._unsigned())
        if kind in (9, 10) and depth < MAX_NESTED:
            return self._list(depth + 1)
        if kind == 12 and depth < MAX_NESTED:
            return self.struct(depth + 1)
        _refuse(self.where)

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        if count > MAX_LISTED:
            _refuse(self.where)
        return [self._value(head & 15, depth) for _ in range(count)]

    def _skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            _refuse(self.where)
        self.at += count

    def _byte(self) -> int:
        if self.at >= len(self.data):
            _refuse(self.where)
        self.at += 1
        return self.data[self.at - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):  # seven bits a byte, the lowest first
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        _refuse(self.where)

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
