"""How much memory a Parquet file asks for, read from its page headers before any page is.

One idea: a reader allocates what a page's header says and repeats what a dictionary holds, so both
are added up first. Page headers are Thrift in its compact form; all of it that is needed is here.
It decodes no value.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

from stillroom.cache_schemas.errors import ShardCorrupt

PLAIN_ENCODINGS = {0, 2, 8}
"""PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY; others may make much of little."""
DATA_PAGES, DICTIONARY_PAGE = {5: 2, 8: 4}, 7
"""Fields of PageHeader that describe a page of values -> the field of theirs with the encoding."""
MAX_NESTED, MAX_LISTED = 4, 1 << 10


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
        if (
            not isinstance(unpacked, int)
            or not isinstance(packed, int)
            or min(unpacked, packed) < 0
        ):
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
            if not _is_plain(own.get(encoding)) or type(count) is not int or count < 0:
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
