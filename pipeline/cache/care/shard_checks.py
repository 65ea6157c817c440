"""One shard against its receipt and against sense; many shards, on several processes.

One idea: what is known of a shard is a small value, so shards may be checked anywhere and in any
number at a time, and the answers come in order. Processes are started only for as many bytes as
are worth one.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import pyarrow as pa

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.manifest import Manifest, ShardReceipt
from stillroom.pipeline.cache import index, shard
from stillroom.pipeline.cache.care import meaning
from stillroom.pipeline.cache.columns import Columns
from stillroom.pipeline.cache.formats import Format
from stillroom.pipeline.cache.sealing import read_receipt
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.parent_process import end_with_pool

BYTES_WORTH_A_PROCESS = 1 << 25
SHARDS_AT_A_TIME = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding; `shard` is None where it concerns the cache as a whole."""

    name: str
    found: str
    shard: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is wrong with one shard, or what it holds.

    Attributes:
        number: of the shard.
        problem: what is wrong, if anything is.
        num_examples, num_tokens, num_bytes: that are right.
        index: what the index should say of it, in a cache that is sealed.
        cost, cost_rows: KL divergence that rounding cost its rows, nats, summed; and how many.
    """

    number: int
    problem: Problem | None = None
    num_examples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    index: pa.Table | None = None
    cost: float = 0.0
    cost_rows: int = 0


@dataclass(slots=True)
class _Rounding:
    """Examines examples and adds up what rounding cost."""

    form: Format
    cost: float = 0.0
    rows: int = 0

    def __call__(self, columns: Columns) -> None:
        meaning.check(columns, self.form.plan)
        if columns.lists is not None and self.form.codec.rounds:
            costs = columns.lists.rounding()
            self.cost, self.rows = self.cost + float(costs.sum()), self.rows + len(costs)


class Checker:
    """Checks shards of one cache; may be sent to another process."""

    def __init__(self, storage: Storage, manifest: Manifest | None, form: Format):
        self.storage, self.manifest, self.form = storage, manifest, form

    def check(self, number: int) -> Outcome:
        """Look at one shard."""
        try:
            return self._checked(number)
        except FileNotFoundError as error:
            name = str(error.filename or error).removeprefix(f"{self.storage.location}/")
            return Outcome(number, Problem(name, "is missing", number))
        except CacheError as error:
            name = error.where.removeprefix(f"{self.storage.location}/")
            text = f"{error.found}; expected {error.expected}" if error.expected else error.found
            return Outcome(number, Problem(name, text, number))

    def _checked(self, number: int) -> Outcome:
        expected, sha256 = read_receipt(self.storage, self.form, number)
        if self.manifest is not None:
            _check_listed(self.manifest, expected, sha256)
        self._check_sizes(expected)
        examined = _Rounding(self.form)
        found = shard.inspect(self.storage, self.form, number, examine=examined)
        compare(found, expected)
        return Outcome(
            number,
            num_examples=found.num_examples,
            num_tokens=found.num_tokens,
            num_bytes=found.num_bytes,
            index=None if self.manifest is None else index.rows_of(self.form, expected),
            cost=examined.cost,
            cost_rows=examined.rows,
        )

    def _check_sizes(self, receipt: ShardReceipt) -> None:
        """Before any of it is read."""
        for name in layout.shard_files(receipt.shard, list(self.form.dense)):
            size, named = self.storage.size(name), receipt.files[name].bytes
            if size is not None and size != named:
                text = f"{named:,} bytes as the receipt says"
                raise ShardCorrupt(f"{size:,} bytes", expected=text, where=name)


def outcomes(
    storage: Storage, manifest: Manifest | None, form: Format, numbers: list[int], workers: int
) -> Iterator[Outcome]:
    """Check shards; answers in the order of `numbers`.

    Raises:
        CacheError: a process that was checking died.
    """
    checker = Checker(storage, manifest, form)
    worth = 1 if manifest is None else manifest.num_bytes // BYTES_WORTH_A_PROCESS
    processes = min(workers, worth, len(numbers) // SHARDS_AT_A_TIME)
    if processes < 2:
        yield from map(checker.check, numbers)
        return
    context = multiprocessing.get_context("spawn")  # threads and locks do not survive a fork
    try:
        with ProcessPoolExecutor(processes, context, _take, (checker,)) as pool:
            yield from pool.map(_check, numbers, chunksize=SHARDS_AT_A_TIME)
    except BrokenProcessPool:
        raise CacheError(
            "a process that checked shards died, perhaps for want of memory",
            where=storage.location,
            remedy="Verify again in one process: `--workers 1` says which shard it is.",
        ) from None


_OWN: list[Checker] = []
"""Of a process of `outcomes`."""


def _take(checker: Checker) -> None:
    end_with_pool()
    _OWN[:] = [checker]


def _check(number: int) -> Outcome:
    return _OWN[0].check(number)


def _check_listed(manifest: Manifest, receipt: ShardReceipt, sha256: str) -> None:
    """The manifest's line of a shard is what its receipt says."""
    table, number = manifest.shards, receipt.shard
    if sha256 != table.receipt[number]:
        raise ShardCorrupt("is not the receipt that the manifest names", where="receipt")
    said = table.num_tokens[number], table.num_rows[number], table.bytes[number]
    if said != (receipt.num_tokens, sum(receipt.records.num_rows), receipt.num_bytes):
        found = f"tokens, rows and bytes of shard {number} are not those of its receipt"
        raise ShardCorrupt(found, where=layout.MANIFEST)


def compare(found: ShardReceipt, expected: ShardReceipt) -> None:
    """Refuse a receipt that is not the one its shard deserves.

    Raises:
        ShardCorrupt: names what differs.
    """
    for name, entry in found.files.items():
        named = expected.files[name]
        if entry != named:
            raise ShardCorrupt(
                f"{entry.bytes} bytes with sha256 {entry.sha256[:12]}",
                expected=f"{named.bytes} bytes with {named.sha256[:12]} as the receipt says",
                where=name,
            )
    mine, theirs = found.records.model_dump(), expected.records.model_dump()
    chunks, named = mine.pop("chunks", {}), theirs.pop("chunks", {})
    wrong = [key for key in mine if key != "preview" and mine[key] != theirs[key]]
    # The first caches have none, and a partial copy lacks signals.
    wrong += [f"chunks of {name}" for name in chunks.keys() & named if chunks[name] != named[name]]
    if wrong:
        raise ShardCorrupt(
            f"{', '.join(wrong)} in the receipt do not fit the records",
            where=layout.receipt(found.shard),
        )
