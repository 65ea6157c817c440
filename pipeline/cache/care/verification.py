"""Is every byte of a cache what was written, and does every record make sense?

One idea: each shard is inspected as if it had just been written, and the receipt it deserves is
compared with the one it has; what the manifest and the index say is compared with the receipts. So
whatever the writer checks, verification checks, in one pass and on as many processes as it is
given. What makes sense is `meaning.py`; it changes nothing; `repair.py` acts on its findings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stillroom.cache_schemas import canonical, layout
from stillroom.cache_schemas.codebook import STRICT_STEP
from stillroom.cache_schemas.dense_array import check_group
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt, StillroomError
from stillroom.cache_schemas.manifest import Manifest, Plan, read
from stillroom.cache_schemas.record_codec import MAX_KL
from stillroom.pipeline.cache import sealing
from stillroom.pipeline.cache.care.shard_checks import Outcome, Problem, outcomes
from stillroom.pipeline.cache.formats import Format, open_codec, read_codec
from stillroom.pipeline.cache.index import Index
from stillroom.pipeline.cache.partial import present_signals
from stillroom.pipeline.cache.shard import file_entry
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.cache.storage.snapshot import pinned

Progress = Callable[[int, int], None]
"""Called with shards done and shards in all."""


@dataclass(slots=True)
class Report:
    """What verification found.

    Attributes:
        sealed: the cache has a manifest.
        problems: what is wrong.
        notes: leftovers that harm nothing, such as files of an unfinished shard.
        num_shards, num_examples, num_tokens, num_bytes: what was checked and is right.
        rounding: KL divergence that rounding cost, nats per row, measured again from the widths of
            the levels; None where the profile does not round lists.
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

    def add(self, outcome: Outcome) -> None:
        """Count a shard, or what is wrong with it."""
        if outcome.problem is not None:
            self.problems.append(outcome.problem)
            return
        self.num_shards += 1
        self.num_examples += outcome.num_examples
        self.num_tokens += outcome.num_tokens
        self.num_bytes += outcome.num_bytes


def verify(
    storage: Storage, progress: Progress = lambda done, total: None, workers: int = 1
) -> Report:
    """Check every hash, decode every record and see that all of it makes sense.

    Args:
        workers: processes; more than one are started anew, so the caller's main module must be
            importable.

    Raises:
        CacheError: there is no cache, or its identity cannot be read at all.
    """
    storage = pinned(storage)
    manifest, form = identity(storage)
    report = Report(sealed=manifest is not None)
    report.problems += _identity_problems(storage, manifest, form)
    every = range(form.plan.num_shards)
    done = sealing.committed(storage, every)
    numbers = list(every) if manifest is not None else sorted(done)
    held = None if manifest is None else _Indexes(storage, manifest, form)
    cost, rows = 0.0, 0
    for count, outcome in enumerate(outcomes(storage, manifest, form, numbers, workers), start=1):
        report.add(outcome)
        if held is not None and outcome.index is not None:
            held.compare(outcome)
        cost, rows = cost + outcome.cost, rows + outcome.cost_rows
        progress(count, len(numbers))
    report.problems += held.problems if held is not None else []
    report.notes += list(_leftovers(storage, form, done))
    if form.codec.rounds and rows:
        report.rounding = cost / rows
        report.problems += _dear(form, report.rounding)
    return report


def _dear(form: Format, rounding: float) -> Iterator[Problem]:
    """Hold what rounding cost against the budget that the plan states."""
    # `strict` has levels of one width w, and p w^2 / 24 over a row is at most w^2 / 24.
    codec = form.codec
    bound = MAX_KL * codec.mean_kl if codec.profile == "small" else STRICT_STEP**2 / 24
    if rounding > bound:
        found = f"rounding cost {rounding:.2g} nats per row"
        yield Problem("rows", f"{found}; expected at most {bound:.2g}")


def identity(storage: Storage) -> tuple[Manifest | None, Format]:
    """The manifest, if the cache is sealed, and the format of its records.

    Raises:
        CacheError: neither manifest.json nor plan.json and codec.json can be read.
    """
    where = f"{storage.location}/{layout.MANIFEST}"
    if storage.size(layout.MANIFEST) is not None:
        manifest = read(Manifest, storage.read(layout.MANIFEST), where)
        plan = Plan.from_facts(manifest.plan, where)
        sealing.check_table(manifest, plan, where)
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
    try:
        sealing.check_files(manifest, form, layout.MANIFEST)
    except ShardCorrupt as error:
        yield Problem(layout.MANIFEST, error.found)
    for name in sealing.fixed_files(form):
        if name in manifest.files and (found := _changed(storage, manifest, form, name)):
            yield Problem(name, found)
    try:
        if sealing.stored_errors(storage, form) != manifest.stored_error and manifest.stored_error:
            yield Problem(layout.MANIFEST, "stored_error does not fit the signal image_error")
    except (StillroomError, FileNotFoundError):
        return  # what is wrong with the shard is told there


def _changed(storage: Storage, manifest: Manifest, form: Format, name: str) -> str:
    """What is wrong with a file of the cache as a whole; empty where nothing is."""
    try:
        data = storage.read(name)
        if file_entry(data) != manifest.files[name]:
            return "has been changed"
        if name == layout.PLAN and Plan.from_bytes(data, name).facts != form.plan.facts:
            return "is another plan than the manifest's"
        if name == layout.CODEC and canonical.check(data, name) != form.codec_body:
            return "is another codec than the manifest's"
        if name == layout.DENSE_GROUP:
            check_group(data, form.all_dense, name)
        for signal, array in form.dense.items():
            if name == layout.dense_metadata(signal):
                array.check_metadata(data, name)
    except FileNotFoundError:
        return "is missing"
    except StillroomError as error:
        return error.found
    return ""


class _Indexes:
    """The index files, held against the receipts one shard after another."""

    def __init__(self, storage: Storage, manifest: Manifest, form: Format):
        self.storage, self.manifest, self.form = storage, manifest, form
        self.problems: list[Problem] = []
        self._held: tuple[int, Index | None] = -1, None

    def compare(self, outcome: Outcome) -> None:
        """Note an index that does not say what the shard's receipt says."""
        folder, at = divmod(outcome.number, layout.SHARDS_PER_FOLDER)
        if self._held[0] != folder:
            self._held = folder, self._open(folder)
        held = self._held[1]
        try:
            same = held is None or held.shard(at).equals(outcome.index)
            found = f"does not say what the receipt of shard {outcome.number} says"
        except ShardCorrupt as error:
            same, found = False, error.found
        if not same:
            self.problems.append(Problem(layout.index(folder), found))
            self._held = folder, None  # one message is enough

    def _open(self, folder: int) -> Index | None:
        name = layout.index(folder)
        try:
            return sealing.open_index(self.storage, self.manifest, self.form.plan, folder)
        except FileNotFoundError:
            self.problems.append(Problem(name, "is missing"))
        except ShardCorrupt as error:
            self.problems.append(Problem(name, error.found))
        return None


def _leftovers(storage: Storage, form: Format, done: set[int]) -> Iterator[str]:
    """Files that no receipt names."""
    known = {layout.rows(number) for number in done}
    for folder, _ in sealing.by_folder(form.plan.num_shards):
        for name in sorted(set(storage.list(f"rows/{folder:03d}")) - known):
            yield f"{name} has no receipt: its shard was not finished, and will be captured again"
