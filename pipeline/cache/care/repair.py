"""Taking back what is broken, so that the same capture redoes exactly that.

One idea: a shard without a receipt is a shard to capture, so repairing is removing: first the
manifest, then the receipts of bad shards, then their files. Sound shards are never touched.
"""

import contextlib
from dataclasses import dataclass

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.dense_array import DenseArray
from stillroom.cache_schemas.errors import CacheError, FormatTooNew, ShardCorrupt, StillroomError
from stillroom.cache_schemas.manifest import Manifest, ShardReceipt, read
from stillroom.pipeline.cache import sealing
from stillroom.pipeline.cache import shard as shards
from stillroom.pipeline.cache.care.verification import Progress, Report, identity, verify
from stillroom.pipeline.cache.formats import Format, publish_codec
from stillroom.pipeline.cache.shard import file_entry
from stillroom.pipeline.cache.storage.protocol import Storage


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done.

    Attributes:
        shards: shards that must be captured again.
        removed: names of files that were removed.
        sealed: the cache is sealed now.
    """

    shards: list[int]
    removed: list[str]
    sealed: bool


def repair(storage: Storage, progress: Progress = lambda done, total: None) -> Repair:
    """Remove the receipts and files of bad shards, and restore what follows from the rest.

    Raises:
        CacheError: plan and codec are both lost, so nothing can be judged.
        FormatTooNew: a later release wrote some of it; nothing is removed.
    """
    manifest, form = _identity(storage)
    report = verify(storage, progress)
    _check_not_newer(storage, report.bad_shards)
    removed: list[str] = []
    _restore(storage, form, manifest)  # while the manifest still says what plan and codec are
    if report.problems:
        _remove(storage, [layout.MANIFEST, layout.SIGNATURE], removed)  # first: nobody reads it now
    for number in report.bad_shards:
        _remove(storage, [layout.receipt(number)], removed)
        _remove(storage, layout.shard_files(number, list(form.dense)), removed)
    _remove_broken_leftovers(storage, form, removed)
    sealed = _seal(storage, form, manifest, report)
    return Repair(report.bad_shards, removed, sealed)


def _identity(storage: Storage) -> tuple[Manifest | None, Format]:
    """Plan and codec from the manifest or, where that is damaged, from their own files."""
    try:
        return identity(storage)
    except FormatTooNew:
        raise
    except CacheError:
        if storage.size(layout.PLAN) is None or storage.size(layout.MANIFEST) is None:
            raise
    storage.delete(layout.MANIFEST)
    return identity(storage)


def _check_not_newer(storage: Storage, shards: list[int]) -> None:
    """What this release cannot read is not broken for that."""
    for name in map(layout.receipt, shards):
        with contextlib.suppress(ShardCorrupt, FileNotFoundError):
            read(ShardReceipt, storage.read(name), f"{storage.location}/{name}")


def _remove(storage: Storage, names: list[str], removed: list[str]) -> None:
    for name in names:
        if storage.size(name) is not None:
            storage.delete(name)
            removed.append(name)


def _remove_broken_leftovers(storage: Storage, form: Format, removed: list[str]) -> None:
    """Files without a receipt are kept for the next capture only if they are whole."""
    every = range(form.plan.num_shards)
    left = sealing.listed(storage, "rows", layout.rows, every)
    done = sealing.committed(storage, every)
    for number in (number for number in every if number not in done):
        names = layout.shard_files(number, list(form.dense))
        if number not in left and all(storage.size(name) is None for name in names[1:]):
            continue
        try:
            shards.inspect(storage, form, number)
        except (StillroomError, FileNotFoundError):
            _remove(storage, names, removed)


def _restore(storage: Storage, form: Format, manifest: Manifest | None) -> None:
    """Write again what follows from plan and codec."""
    _put_back(storage, layout.PLAN, form.plan.to_bytes())
    _put_back(storage, layout.CODEC, canonical.sign(form.codec_body, indent=1))
    publish_codec(storage, form.plan, form.codec)
    for name, array in form.dense.items():
        if not _is_right(storage, layout.dense_metadata(name), array, manifest):
            storage.replace(layout.dense_metadata(name), array.metadata())


def _is_right(storage: Storage, name: str, array: DenseArray, manifest: Manifest | None) -> bool:
    """Whether a zarr.json is the one that was sealed, if in other words than it would get today."""
    try:
        data = storage.read(name)
        array.check_metadata(data, name)
    except (FileNotFoundError, ShardCorrupt):
        return False
    return manifest is None or manifest.files.get(name) == file_entry(data)


def _put_back(storage: Storage, name: str, data: bytes) -> None:
    if storage.size(name) != len(data) or storage.read(name) != data:
        storage.replace(name, data)


def _seal(storage: Storage, form: Format, manifest: Manifest | None, report: Report) -> bool:
    whole = report.num_shards == form.plan.num_shards
    if whole and storage.size(layout.MANIFEST) is None:
        sealing.seal(storage, form, manifest.definition if manifest else None)
    return whole
