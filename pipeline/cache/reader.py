"""Reading a sealed cache: any example by its number, and only the signals asked for.

One idea: a record is one range of one file, checked against its receipt before it is parsed, and
every receipt is checked against the manifest. Nothing is mapped or held but small per-shard tables,
so a cache far larger than memory costs no memory. It neither shuffles nor packs.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from stillroom.cache_schemas import frames, layout, rows
from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, CacheMissing, ShardCorrupt
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.manifest import FileEntry, Manifest, Plan, ShardReceipt, read
from stillroom.cache_schemas.rankings import Rankings
from stillroom.pipeline.cache import shard as shards
from stillroom.pipeline.cache.formats import Encoded, Format, read_codec
from stillroom.pipeline.cache.index import Index
from stillroom.pipeline.cache.part import Records, in_words
from stillroom.pipeline.cache.partial import present_signals
from stillroom.pipeline.cache.pieces import Pieces
from stillroom.pipeline.cache.sealing import (
    by_folder,
    check_files,
    check_receipt,
    check_table,
    open_index,
)
from stillroom.pipeline.cache.storage.location import open_storage
from stillroom.pipeline.cache.storage.protocol import IsRight, Storage, read_right
from stillroom.pipeline.cache.storage.readthrough import ReadThrough
from stillroom.pipeline.cache.storage.snapshot import pinned
from stillroom.pipeline.record import TeacherRecord

EXAMPLES_HELD, SHARDS_HELD = 2_000_000, 4096
"""How many examples' offsets (24 bytes each) are kept in memory, and of how many shards."""
REMEDY = "Pull it again, or run `stillroom cache repair` and capture again."


@dataclass(frozen=True, slots=True)
class _Offsets:
    """Where the records of one shard lie."""

    starts: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    files: dict[str, FileEntry]
    chunks: dict[str, np.ndarray]
    """Checksums of the chunks of each dense signal; receipts of the first caches have none."""


class TeacherCache(Records):
    """A sealed cache. Made by `open`; a sequence of records, each read when it is asked for."""

    def __init__(self, storage: Storage, manifest: Manifest, form: Format):
        self.storage, self.manifest, self.form = storage, manifest, form
        self.plan: Plan = form.plan
        held = min(SHARDS_HELD, max(EXAMPLES_HELD // self.plan.examples_per_shard, 8))  # shards
        self._offsets = lru_cache(held)(self._read_offsets)
        self._dense_index = lru_cache(held)(self._read_dense_index)
        self._whole: set[str] = set()  # files that were hashed

    @classmethod
    def open(
        cls, location: str | Path | Storage, local: str | Path = "", local_bytes: int = 1 << 34
    ) -> "TeacherCache":
        """Open a directory or fsspec URL; reads the manifest and the codec's tables.

        Args:
            location: where the cache lies.
            local: directory that keeps what was read, so that a second epoch asks the network for
                the manifest only; many caches may share it; empty for none.
            local_bytes: what that directory may hold.

        Raises:
            CacheError: there is no cache, or it is not sealed.
            ShardCorrupt: the manifest or a table is damaged.
            FormatTooNew: a later release wrote it.
        """
        storage = pinned(open_storage(location))
        where = f"{storage.location}/{layout.MANIFEST}"
        data = _manifest_bytes(storage)
        manifest = read(Manifest, data, where)
        if local:
            identity = hashlib.sha256(data).hexdigest()
            storage = ReadThrough(storage, local, local_bytes, identity)
        plan = Plan.from_facts(manifest.plan, where)
        check_table(manifest, plan, where)
        codec = read_codec(storage, manifest.codec, plan)
        form = Format(plan, codec, present_signals(storage))
        check_files(manifest, form, where)
        return cls(storage, manifest, form)

    def __reduce__(self) -> tuple:
        """As another process makes it anew (a DataLoader's worker): without what was read."""
        return type(self), (self.storage, self.manifest, self.form)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals every record has."""
        return (*self.plan.row_signals, *self.form.dense, *self.plan.example_signals)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures of the columns of `lse`, rising."""
        return tuple(self.plan.facts["capture"].get("temperatures", (1.0,)))

    @property
    def shard_sizes(self) -> list[int]:
        """Examples of each shard."""
        return [len(self.plan.shard_range(shard)) for shard in range(self.plan.num_shards)]

    def shard_of(self, number: int) -> int:
        """The shard that holds an example."""
        return number // self.plan.examples_per_shard

    def __len__(self) -> int:
        return self.plan.num_examples

    def __repr__(self) -> str:
        return in_words(self, self.storage.location, self.manifest.num_tokens, self.signals)

    def read(self, number: int, signals: Collection[str] | None = None) -> TeacherRecord:
        """One record with the signals named (None: all).

        Raises:
            IndexError: no such example.
            ShardCorrupt: its bytes are not those that were written.
            CacheError: the cache has no such signal.
        """
        number = range(len(self))[number]  # from the end where negative; IndexError beyond
        if signals is not None and (unknown := set(signals) - set(self.signals)):
            raise CacheError(
                f"no signal {sorted(unknown)}",
                expected=f"some of {', '.join(self.signals)}",
                where=self.storage.location,
            )
        shard, position = divmod(number, self.plan.examples_per_shard)
        message = self._message(shard, position)
        where = f"{self.storage.location}/{layout.rows(shard)} example {number}"

        def dense(name: str, used: int) -> np.ndarray:
            return self._dense(name, shard, position, used)

        return shards.decode(self.form, message, number, where, dense, signals)

    def lists(self, number: int) -> tuple[Lists, Rankings]:
        """One record's top-k lists as profiles `small` and `strict` code them, for `PackedTopk`.

        Raises:
            CacheError: another profile, or no lists.
        """
        shard, position = divmod(range(len(self))[number], self.plan.examples_per_shard)
        where = f"{self.storage.location}/{layout.rows(shard)} example {number}"
        values = shards.parse(self.form, self._message(shard, position), number, where)
        if rows.PAYLOAD not in values:
            raise CacheError("profile 'portable' codes no lists", where=where)
        return self.form.codec.lists(values[rows.PAYLOAD])

    def encoded(self, number: int) -> Encoded:
        """One record as it is stored, its row signals and dense chunks not decoded."""
        shard, position = divmod(range(len(self))[number], self.plan.examples_per_shard)
        where = f"{self.storage.location}/{layout.rows(shard)} example {number}"
        values = shards.parse(self.form, self._message(shard, position), number, where)
        chunks = {name: self._chunk(name, shard, position) for name in self.form.dense}
        lengths = self.form.dense_lengths(values)
        values["dense_lengths"] = np.array([lengths[n] for n in self.form.dense], dtype=np.int32)
        return Encoded({"images": [], **values}, chunks)

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The index, one row per example in order (columns: see FORMAT.md)."""
        folders = by_folder(self.plan.num_shards)
        return pa.concat_tables([self._index_of(at).read(columns) for at, _ in folders])

    def _index_of(self, folder: int) -> Index:
        try:
            return open_index(self.storage, self.manifest, self.plan, folder)
        except FileNotFoundError:
            raise self._missing(layout.index(folder)) from None

    def receipt(self, shard: int) -> ShardReceipt:
        """The receipt of a shard, checked against the manifest."""
        name = layout.receipt(shard)
        where = f"{self.storage.location}/{name}"
        data = self._right(name, _has_hash(self.manifest.shards.receipt[shard]))
        if data is None:
            raise ShardCorrupt("is not the receipt that the manifest names", where=where)
        receipt = read(ShardReceipt, data, where)
        check_receipt(receipt, self.form, shard, where)
        return receipt

    def _present(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        data = self._right(name, lambda data: True, start, length)
        assert data is not None
        return data

    def _right(
        self, name: str, is_right: IsRight, start: int = 0, length: int | None = None
    ) -> bytes | None:
        """`read_right`; a file that is missing is said to be."""
        try:
            return read_right(self.storage, name, is_right, start, length)
        except FileNotFoundError:
            raise self._missing(name) from None

    def _read_offsets(self, shard: int) -> _Offsets:
        receipt = self.receipt(shard)
        listed = receipt.records
        chunks = {name: _numbers(column) for name, column in listed.chunks.items()}
        places = np.array(listed.offset), np.array(listed.bytes), _numbers(listed.xxh3)
        return _Offsets(*places, receipt.files, chunks)

    def _message(self, shard: int, position: int) -> bytes:
        offsets, name = self._offsets(shard), layout.rows(shard)
        start, size = int(offsets.starts[position]), int(offsets.sizes[position])
        if start + size > offsets.files[name].bytes or size > frames.MAX_MESSAGE:
            raise ShardCorrupt("names bytes beyond its file", where=layout.receipt(shard))
        found = f"example {position} of the shard does not fit its checksum"
        return self._summed(name, start, size, int(offsets.checksums[position]), found)

    def _summed(self, name: str, start: int, size: int, checksum: int, found: str) -> bytes:
        """A part of a file with its xxh3-64; `found` says what is wrong with another."""
        is_right = lambda data: xxhash.xxh3_64_intdigest(data) == checksum  # noqa: E731
        data = self._right(name, is_right, start, size)
        if data is None:
            raise self._changed(found, name)
        return data

    def _read_dense_index(self, name: str, shard: int) -> np.ndarray:
        array, path = self.form.dense[name], layout.dense_shard(name, shard)
        size = self._offsets(shard).files[path].bytes
        count, where = len(self.plan.shard_range(shard)), f"{self.storage.location}/{path}"
        if size < array.index_bytes:
            raise ShardCorrupt("is too short for its index", where=where)
        # At the end, where Zarr puts it.
        tail = self._present(path, size - array.index_bytes, array.index_bytes)
        return array.parse_index(tail, size, count, where)

    def _dense(self, name: str, shard: int, position: int, used: int) -> np.ndarray:
        where = f"{self.storage.location}/{layout.dense_shard(name, shard)}"
        return self.form.dense[name].decode(self._chunk(name, shard, position), used, where)

    def _chunk(self, name: str, shard: int, position: int) -> bytes:
        path, sums = layout.dense_shard(name, shard), self._offsets(shard).chunks.get(name)
        if sums is None:
            self._check_whole(path, shard)
        offset, length = (int(value) for value in self._dense_index(name, shard)[position])
        if sums is None:
            return self._present(path, offset, length)
        found = f"chunk {position} is not the one that was written"
        return self._summed(path, offset, length, int(sums[position]), found)

    def _check_whole(self, path: str, shard: int) -> None:
        """Hash a file once: what binds its chunks where the receipt has no sum of each."""
        if path in self._whole:
            return
        try:
            found = Pieces(self.storage, path).entry()
        except FileNotFoundError:
            raise self._missing(path) from None
        if found != self._offsets(shard).files[path]:
            raise self._changed("does not have the hash that its receipt names", path)
        self._whole.add(path)

    def _missing(self, name: str) -> ShardCorrupt:
        return self._changed("is missing", name)

    def _changed(self, found: str, name: str) -> ShardCorrupt:
        return ShardCorrupt(found, where=f"{self.storage.location}/{name}", remedy=REMEDY)


def _numbers(digits: list[str]) -> np.ndarray:
    return np.array([int(sixteen, 16) for sixteen in digits], dtype=np.uint64)


def _has_hash(sha256: str) -> IsRight:
    return lambda data: hashlib.sha256(data).hexdigest() == sha256


def _manifest_bytes(storage: Storage) -> bytes:
    try:
        return storage.read(layout.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        pass
    if storage.size(layout.PLAN) is None:
        found = "there is no cache here"
        raise CacheMissing(found, where=storage.location, remedy="Check the path.")
    raise CacheIncomplete(
        "the cache is not sealed",
        where=storage.location,
        remedy="Run the same `stillroom capture` again to finish it.",
    )
