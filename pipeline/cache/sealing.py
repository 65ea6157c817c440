"""From receipts to a manifest and an index.

One idea: sealing reads receipts only, so it takes minutes for a cache of any size; and its result
follows from them alone: sealing twice, or by two workers, gives the same bytes. The one exception
is `image_error`, a number per image and encoder, which is read to be summed up.
"""

import hashlib
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.dense_array import group_metadata
from stillroom.cache_schemas.errors import PlanMismatch, ShardCorrupt
from stillroom.cache_schemas.manifest import (
    DefinitionCheck,
    Manifest,
    Plan,
    ShardReceipt,
    ShardTable,
    StoredError,
    read,
)
from stillroom.cache_schemas.signals import IMAGE_ERROR
from stillroom.pipeline.cache import index
from stillroom.pipeline.cache import shard as shards_of
from stillroom.pipeline.cache.card import README, card
from stillroom.pipeline.cache.formats import Format
from stillroom.pipeline.cache.shard import file_entry
from stillroom.pipeline.cache.storage.protocol import Storage

THREADS = 16


def seal(storage: Storage, form: Format, definition: DefinitionCheck | None = None) -> Manifest:
    """Check every receipt, write the index and, last, the manifest.

    Args:
        definition: what an earlier manifest says of it, where the cache has no note of its own: a
            copy has none.

    Raises:
        ShardCorrupt: a receipt is damaged, or a file it names is missing or has another size.
        PlanMismatch: a receipt is of another cache.
    """
    table: dict[str, list] = {name: [] for name in ShardTable.model_fields}
    if layout.DENSE_GROUP in fixed_files(form):
        storage.replace(layout.DENSE_GROUP, group_metadata(form.all_dense))
    files = {name: file_entry(storage.read(name)) for name in fixed_files(form)}
    for number, shards in by_folder(form.plan.num_shards):
        sink = io.BytesIO()
        sizes = _sizes(storage, form, number, shards)
        with pq.ParquetWriter(sink, index.SCHEMA, **index.PARQUET) as file:
            for receipt, sha256 in read_receipts(storage, form, shards):
                _check_sizes(storage, receipt, sizes)
                file.write_table(index.rows_of(form, receipt))
                _append(table, receipt, sha256)
        files[layout.index(number)] = file_entry(sink.getvalue())
        storage.replace(layout.index(number), sink.getvalue())
    manifest = Manifest(
        plan=form.plan.facts,
        codec=form.codec_body,
        files=files,
        shards=ShardTable(**table),
        stored_error=stored_errors(storage, form),
        definition=noted_definition(storage) or definition,
    )
    storage.create(README, card(form.plan))  # a person's own stays
    storage.replace(layout.MANIFEST, manifest.to_bytes())  # last: now it can be read
    storage.sweep()
    return manifest


def noted_definition(storage: Storage) -> DefinitionCheck | None:
    """What was found when the engine was compared with the model's definition, if it was."""
    try:
        data = storage.read(layout.DEFINITION)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return read(DefinitionCheck, data, f"{storage.location}/{layout.DEFINITION}")


def stored_errors(storage: Storage, form: Format) -> dict[str, StoredError]:
    """What each target of a vision cache lost by being stored, from its signal `image_error`."""
    names = sorted(name for name in form.all_dense if name != IMAGE_ERROR)
    if IMAGE_ERROR not in form.dense or form.dense[IMAGE_ERROR].positions != len(names):
        return {}
    found = [
        errors[:, 0].tolist()
        for number in range(form.plan.num_shards)
        for errors in shards_of.dense_values(storage, form, number, IMAGE_ERROR)
        if len(errors)
    ]
    columns = dict(zip(names, zip(*found, strict=True), strict=bool(found)))
    return {
        # A sum rounded once, so that every machine gets the same.
        name: StoredError(mean=math.fsum(column) / len(column), largest=max(column))
        for name, column in columns.items()
    }


def committed(storage: Storage, shards: Iterable[int]) -> set[int]:
    """Those of some shards that have a receipt; a few listings, whatever their number."""
    return listed(storage, "receipts", layout.receipt, shards)


def listed(
    storage: Storage, kind: str, name_of: Callable[[int], str], shards: Iterable[int]
) -> set[int]:
    """Those of some shards whose file `name_of(shard)` lies below the folder `kind`."""
    found: set[int] = set()
    for folder, numbers in itertools.groupby(shards, layout.folder):
        if there := storage.list(f"{kind}/{folder}"):
            found |= {number for number in numbers if name_of(number) in there}
    return found


def read_receipts(
    storage: Storage, form: Format, shards: Iterable[int]
) -> Iterator[tuple[ShardReceipt, str]]:
    """Receipts in order, each with the sha256 of its file, fetched in parallel."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda number: read_receipt(storage, form, number), shards)


def read_receipt(storage: Storage, form: Format, number: int) -> tuple[ShardReceipt, str]:
    """One receipt and the sha256 of its file.

    Raises:
        ShardCorrupt: it is damaged or of another shard.
        PlanMismatch: it belongs to another cache.
    """
    name = layout.receipt(number)
    where = f"{storage.location}/{name}"
    data = storage.read(name)
    receipt = read(ShardReceipt, data, where)
    check_receipt(receipt, form, number, where)
    return receipt, hashlib.sha256(data).hexdigest()


def check_receipt(receipt: ShardReceipt, form: Format, number: int, where: str) -> None:
    """Refuse a receipt of another cache or shard, or with other files than a shard has."""
    if receipt.plan != form.plan.digest:
        raise PlanMismatch(
            f"belongs to the cache of plan {receipt.plan[:12]}",
            expected=f"plan {form.plan.digest[:12]}",
            where=where,
            remedy="Run `stillroom cache repair`, then capture again.",
        )
    if receipt.codec != form.codec_digest:
        raise ShardCorrupt("was written with other codec tables", where=where)
    expected = set(layout.shard_files(number, list(form.all_dense)))
    if receipt.shard != number or set(receipt.files) != expected:
        raise ShardCorrupt(f"is the receipt of shard {receipt.shard}", where=where)
    columns = receipt.records.model_dump()
    chunks = columns.pop("chunks", {})
    lengths = {len(column) for column in (*columns.values(), *chunks.values())}
    known = chunks.keys() in (set(), form.all_dense.keys())
    if lengths != {len(form.plan.shard_range(number))} or not known:
        raise ShardCorrupt("does not list the shard's examples", where=where)


def check_files(manifest: Manifest, form: Format, where: str) -> None:
    """Refuse a manifest that lists other files than its plan and codec have: names come from the
    format, never from a file.

    Raises:
        ShardCorrupt: it does; names one of them.
    """
    expected = {*fixed_files(form), *index_names(form)}
    expected |= {layout.dense_metadata(name) for name in form.all_dense}
    # The first caches have no group.
    may_be = {layout.DENSE_GROUP} if form.all_dense else set()
    if different := sorted((expected ^ manifest.files.keys()) - may_be):
        raise ShardCorrupt(
            f"does not list the files of this cache (one that differs: {different[0]!r})",
            where=where,
            remedy="Do not use this copy; ask its publisher.",
        )


def check_table(manifest: Manifest, plan: Plan, where: str) -> None:
    """Refuse a manifest that does not list the plan's shards."""
    if {len(column) for column in manifest.shards.model_dump().values()} != {plan.num_shards}:
        raise ShardCorrupt("does not list the plan's shards", where=where)


def open_index(storage: Storage, manifest: Manifest, plan: Plan, folder: int) -> index.Index:
    """The index of a folder of shards, checked against the manifest.

    Raises:
        FileNotFoundError: it is missing.
        ShardCorrupt: it is not the one that the manifest names, or no index.
    """
    name = layout.index(folder)
    entry, where = manifest.files[name], f"{storage.location}/{name}"
    first = folder * layout.SHARDS_PER_FOLDER
    shards = range(first, min(first + layout.SHARDS_PER_FOLDER, plan.num_shards))
    sizes = [len(plan.shard_range(shard)) for shard in shards]
    if entry.bytes > index.index_bytes(sizes):
        raise ShardCorrupt("is larger than its examples can make it", where=where)
    data = storage.read(name, 0, entry.bytes)
    if file_entry(data) != entry:
        raise ShardCorrupt("has been changed", where=where)
    return index.Index(data, sizes, where)


def index_names(form: Format) -> list[str]:
    """The index files of a sealed cache."""
    return [layout.index(number) for number, _ in by_folder(form.plan.num_shards)]


def fixed_files(form: Format) -> list[str]:
    """Files that belong to the cache as a whole, index and manifest not counted."""
    tables = [layout.table(sha) for sha in form.codec.facts()["tables"].values()]
    metadata = [layout.dense_metadata(name) for name in form.dense]
    group = [layout.DENSE_GROUP] * (form.dense.keys() == form.all_dense.keys() != set())
    return sorted([*tables, *metadata, *group, layout.PLAN, layout.CODEC])


def by_folder(num_shards: int) -> Iterator[tuple[int, range]]:
    """The folders of a cache, each with its shards."""
    step = layout.SHARDS_PER_FOLDER
    for number, first in enumerate(range(0, num_shards, step)):
        yield number, range(first, min(first + step, num_shards))


def _sizes(storage: Storage, form: Format, number: int, shards: range) -> dict[str, int]:
    """Sizes of the files of a folder of shards; one listing where names allow it."""
    sizes = storage.list(f"rows/{number:03d}")
    for name in form.dense:
        for shard in shards:
            path = layout.dense_shard(name, shard)
            sizes[path] = -1 if (size := storage.size(path)) is None else size  # -1: missing
    return sizes


def _check_sizes(storage: Storage, receipt: ShardReceipt, sizes: dict[str, int]) -> None:
    for name, entry in receipt.files.items():
        found = sizes.get(name, -1)
        if found != entry.bytes:
            raise ShardCorrupt(
                "is missing" if found < 0 else f"has {found} bytes",
                expected=f"{entry.bytes} bytes",
                where=f"{storage.location}/{name}",
                remedy="Run `stillroom cache repair`, then capture again.",
            )


def _append(table: dict[str, list], receipt: ShardReceipt, sha256: str) -> None:
    table["num_tokens"].append(receipt.num_tokens)
    table["num_rows"].append(sum(receipt.records.num_rows))
    table["bytes"].append(receipt.num_bytes)
    table["receipt"].append(sha256)
