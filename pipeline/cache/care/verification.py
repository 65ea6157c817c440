"""Is every byte of a cache what was written, and does every record make sense?

One idea: each shard is inspected as if it had just been written, and the receipt it deserves is
compared with the one it has; so whatever the writer checks, verification checks. It changes
nothing; `repair.py` acts on its findings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.codebook import STRICT_STEP
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt
from stillroom.cache_schemas.manifest import Manifest, Plan, ShardReceipt, read
from stillroom.cache_schemas.record_codec import MAX_KL
from stillroom.pipeline.cache import shard as shards
from stillroom.pipeline.cache.care.meaning import check
from stillroom.pipeline.cache.formats import Format, open_codec, read_codec
from stillroom.pipeline.cache.partial import present_signals
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sealing import (
    check_files,
    committed,
    fixed_files,
    index_names,
    read_receipt,
)
from stillroom.pipeline.cache.shard import file_entry
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.cache.storage.snapshot import pinned
from stillroom.pipeline.shares import evenly

Progress = Callable[[int, int], None]
"""Called with shards done and shards in all."""

ROUNDED_LISTS, SAMPLE = ("small", "strict"), 32
"""Profiles that round lists; records whose rounding is measured again."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding; `shard` is None where it concerns the cache as a whole."""

    name: str
    found: str
    shard: int | None = None


@dataclass(slots=True)
class Report:
    """What verification found.

    Attributes:
        sealed: the cache has a manifest.
        problems: what is wrong.
        notes: leftovers that harm nothing, such as files of an unfinished shard.
        num_shards, num_examples, num_tokens, num_bytes: what was checked and is right.
        rounding: KL divergence that rounding cost a sample, nats per row, measured again from the
            widths of the levels; None where the profile does not round lists.
    """

    sealed: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    rounding: float | None = None

    @property
    def bad_shards(self) -> list[int]:
        """Shards that must be captured again."""
        return sorted({p.shard for p in self.problems if p.shard is not None})


def verify(storage: Storage, progress: Progress = lambda done, total: None) -> Report:
    """Check every hash and decode every record.

    Raises:
        CacheError: there is no cache, or its identity cannot be read at all.
    """
    storage = pinned(storage)
    manifest, form = identity(storage)
    report = Report(sealed=manifest is not None)
    report.problems += _identity_problems(storage, manifest, form)
    done = committed(storage, range(form.plan.num_shards))
    for count, number in enumerate(range(form.plan.num_shards), start=1):
        if number in done or manifest is not None:
            _check_shard(storage, form, manifest, number, report)
        progress(count, form.plan.num_shards)
    report.notes += list(_leftovers(storage, form, done))
    if manifest is not None and not report.problems:
        _measure_again(TeacherCache(storage, manifest, form), report)
    return report


def _measure_again(cache: TeacherCache, report: Report) -> None:
    """Hold the lists of a sample against the budget that the plan states."""
    codec = cache.form.codec
    if codec.profile not in ROUNDED_LISTS or "topk_ids" not in cache.signals:
        return
    sample = evenly(len(cache), SAMPLE)
    rows = np.concatenate([cache.lists(number)[0].rounding() for number in sample])
    report.rounding = float(rows.mean()) if len(rows) else 0.0
    # `strict` has levels of one width w, and p w^2 / 24 over a row is at most w^2 / 24.
    bound = MAX_KL * codec.mean_kl if codec.profile == "small" else STRICT_STEP**2 / 24
    if report.rounding > bound:
        found = f"rounding cost {report.rounding:.2g} nats per row of a sample"
        report.problems.append(Problem("rows", f"{found}; expected at most {bound:.2g}"))


def identity(storage: Storage) -> tuple[Manifest | None, Format]:
    """The manifest, if the cache is sealed, and the format of its records.

    Raises:
        CacheError: neither manifest.json nor plan.json and codec.json can be read.
    """
    where = f"{storage.location}/{layout.MANIFEST}"
    if storage.size(layout.MANIFEST) is not None:
        manifest = read(Manifest, storage.read(layout.MANIFEST), where)
        plan = Plan.from_facts(manifest.plan, where)
        codec = read_codec(storage, manifest.codec, plan)
        return manifest, Format(plan, codec, present_signals(storage))
    if storage.size(layout.PLAN) is None:
        raise CacheError("there is no cache here", where=storage.location, remedy="Check the path.")
    where = f"{storage.location}/{layout.PLAN}"
    plan = Plan.from_bytes(storage.read(layout.PLAN), where)
    codec = open_codec(storage, plan)
    if codec is None:
        raise CacheError(
            "nothing has been captured yet", where=storage.location, remedy="Run the capture."
        )
    return None, Format(plan, codec)


def _identity_problems(
    storage: Storage, manifest: Manifest | None, form: Format
) -> Iterator[Problem]:
    """Files that belong to the cache as a whole and are not what the manifest says."""
    if manifest is None:
        return
    expected = {*fixed_files(form), *index_names(form)}
    try:
        check_files(manifest, form, layout.MANIFEST)
    except ShardCorrupt as error:
        yield Problem(layout.MANIFEST, error.found)
    for name in sorted(expected & set(manifest.files)):
        try:
            found = file_entry(storage.read(name))
        except FileNotFoundError:
            yield Problem(name, "is missing")
            continue
        if found != manifest.files[name]:
            yield Problem(name, "has been changed")


def _check_shard(
    storage: Storage, form: Format, manifest: Manifest | None, number: int, report: Report
) -> None:
    try:
        expected, sha256 = read_receipt(storage, form, number)
        if manifest is not None and sha256 != manifest.shards.receipt[number]:
            raise ShardCorrupt("is not the receipt that the manifest names", where="receipt")
        found = shards.inspect(
            storage, form, number, examine=lambda columns: check(columns, form.plan)
        )
        _compare(found, expected)
    except FileNotFoundError as error:
        name = str(error.filename or error).removeprefix(f"{storage.location}/")
        report.problems.append(Problem(name, "is missing", number))
    except CacheError as error:
        name = error.where.removeprefix(f"{storage.location}/")
        text = f"{error.found}; expected {error.expected}" if error.expected else error.found
        report.problems.append(Problem(name, text, number))
    else:
        report.num_shards += 1
        report.num_examples += found.num_examples
        report.num_tokens += found.num_tokens
        report.num_bytes += found.num_bytes


def _compare(found: ShardReceipt, expected: ShardReceipt) -> None:
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


def _leftovers(storage: Storage, form: Format, done: set[int]) -> Iterator[str]:
    """Files that no receipt names."""
    known = {layout.rows(number) for number in done}
    for folder in sorted({layout.folder(number) for number in range(form.plan.num_shards)}):
        for name in sorted(set(storage.list(f"rows/{folder}")) - known):
            yield f"{name} has no receipt: its shard was not finished, and will be captured again"
