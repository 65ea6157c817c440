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
from stillroom.pipeline.cache.formats import Format, open_codec, read_codec
from stillroom.pipeline.cache.partial import present_signals
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sealing import (
    committed,
    fixed_files,
    index_names,
    read_receipt,
)
from stillroom.pipeline.cache.shard import file_entry
from stillroom.pipeline.cache.storage.directory import Storage
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.shares import evenly

Progress = Callable[[int, int], None]
"""Called with shards done and shards in all."""

MASS_TOLERANCE = {"exact": 2e-3, "portable": 2e-3}
"""How far top-k and tail may be from summing to 1; the other profiles round the tail."""
ROUNDED_MASS_TOLERANCE = 0.3

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


def check_record(record: TeacherRecord, plan: Plan) -> None:
    """What holds for every record, whatever its codec.

    Raises:
        ShardCorrupt: an id outside the vocabulary, a positive log-probability, repeated or
            unsorted top-k entries, mass that does not sum to one, or draws that cannot be.
    """
    signals, where = record.signals, f"example {record.example.example_id}"
    vocab = plan.facts["teacher"]["vocab_size"]
    if _outside(record.example.token_ids, 0, vocab):
        raise ShardCorrupt("a token is outside the vocabulary", where=where)
    for name, array in signals.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ShardCorrupt(f"{name} has NaN", where=where)
    if "topk_ids" in signals and "topk_logprobs" in signals:
        _check_topk(signals, vocab, plan.facts["capture"].get("profile", ""), where)
    if "draw_ids" in signals and "draw_counts" in signals:
        _check_draws(signals, vocab, plan.facts["capture"].get("tail_draws", 0), where)


def _check_topk(signals: dict[str, np.ndarray], vocab: int, profile: str, where: str) -> None:
    ids, logprobs = signals["topk_ids"], signals["topk_logprobs"].astype(np.float64)
    held = ids >= 0
    ordered = np.sort(ids, axis=1)
    if _outside(ids, -1, vocab) or ((np.diff(ordered) == 0) & (ordered[:, 1:] >= 0)).any():
        raise ShardCorrupt("top-k ids are repeated or outside the vocabulary", where=where)
    with np.errstate(invalid="ignore"):
        rises = (np.diff(logprobs, axis=1) > 1e-6) & held[:, 1:]
    if rises.any() or (logprobs > 1e-3).any():
        raise ShardCorrupt("top-k log-probabilities are not falling from 0", where=where)
    if "tail_logprob" in signals and len(ids):
        mass = np.where(held, np.exp(logprobs), 0).sum(axis=1)
        off = np.abs(mass + np.exp(signals["tail_logprob"].astype(np.float64)) - 1).max()
        if off > MASS_TOLERANCE.get(profile, ROUNDED_MASS_TOLERANCE):
            raise ShardCorrupt(f"probabilities sum to 1 +- {off:.3g}", where=where)


def _check_draws(signals: dict[str, np.ndarray], vocab: int, draws: int, where: str) -> None:
    ids, times = signals["draw_ids"], signals["draw_counts"]
    held = ids >= 0
    ordered = np.sort(ids, axis=1)
    if _outside(ids, -1, vocab) or ((np.diff(ordered) == 0) & (ordered[:, 1:] >= 0)).any():
        raise ShardCorrupt("draw ids are repeated or outside the vocabulary", where=where)
    if ((times > 0) != held).any() or (times.sum(axis=1, dtype=np.int64) > draws).any():
        raise ShardCorrupt(f"draw counts are not those of {draws} draws", where=where)
    listed = signals.get("topk_ids", ids[:, :0])
    both = np.sort(np.concatenate([np.where(held, ids, -1), listed], axis=1), axis=1)
    if ((np.diff(both) == 0) & (both[:, 1:] >= 0)).any():
        raise ShardCorrupt("a draw is one of the top-k ids", where=where)


def _outside(ids: np.ndarray, low: int, high: int) -> bool:
    return bool(ids.size) and (int(ids.min()) < low or int(ids.max()) >= high)


def _identity_problems(
    storage: Storage, manifest: Manifest | None, form: Format
) -> Iterator[Problem]:
    """Files that belong to the cache as a whole and are not what the manifest says."""
    if manifest is None:
        return
    expected = {*fixed_files(form), *index_names(form)}
    if set(manifest.files) != {*expected, *(layout.dense_metadata(n) for n in form.all_dense)}:
        yield Problem(layout.MANIFEST, "does not list the files of this cache")
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
            storage, form, number, examine=lambda record: check_record(record, form.plan)
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
    wrong = [key for key in mine if key != "preview" and mine[key] != theirs[key]]
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
