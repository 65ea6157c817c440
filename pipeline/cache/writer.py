"""Writing a cache: shards by any number of workers, then one seal.

One idea: files of a shard are published whole and only where nothing is yet, and the receipt, which
follows from the files in place, is published last. So a kill loses at most the shard at hand, two
writers of one shard end with one, and workers share nothing but the directory or bucket. It does
not decide who writes which shard.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, PlanMismatch, ShardCorrupt
from stillroom.cache_schemas.manifest import DefinitionCheck, Manifest, Plan, ShardReceipt, read
from stillroom.cache_schemas.record_codec import MEAN_KL, TOKENS, RowCodec
from stillroom.pipeline.cache import sealing, shard
from stillroom.pipeline.cache.formats import (
    UNFITTED,
    Encoded,
    Format,
    codec_sizes,
    dense_arrays,
    open_codec,
    publish_codec,
)
from stillroom.pipeline.cache.shard import Preview
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.location import open_storage
from stillroom.pipeline.cache.storage.protocol import Claim, Storage, check_vacant
from stillroom.pipeline.record import TeacherRecord
from stillroom.pipeline.shares import share_of


class CacheWriter:
    """A cache that is being written. Made by `open`."""

    def __init__(self, storage: Storage, plan: Plan, preview: Preview | None):
        self.storage, self.plan, self.preview = storage, plan, preview
        self._form: Format | None = None
        self._begun = False
        self._claims: dict[int, Claim] = {}

    @classmethod
    def open(
        cls, root: str | Path | Storage, plan: Plan, preview: Preview | None = None
    ) -> "CacheWriter":
        """A cache of a plan, or the one that is there to go on with; nothing is written yet.

        Args:
            root: directory, fsspec URL or storage.
            plan: what the cache is to hold.
            preview: the beginning of an example's text, for the index; the same for every worker.

        Raises:
            PlanMismatch: the cache there has another plan; names every fact that differs.
        """
        storage = open_storage(root)
        check_vacant(storage)
        storage.sweep()
        if storage.size(layout.PLAN) is not None:
            _check_plan(storage, plan)
        return cls(storage, plan, preview)

    def begin(self) -> None:
        """Create the cache, once there is something to keep; every method that writes does.

        A capture that is refused before (its teacher cannot be served, or does not say what its
        definition says) leaves no plan that the next one, with other settings, would stumble over.

        Raises:
            PlanMismatch: somebody has begun one of another plan here since `open`.
        """
        if self._begun:
            return
        if not self.storage.create(layout.PLAN, self.plan.to_bytes()):
            _check_plan(self.storage, self.plan)
        self._begun = True
        for name, array in dense_arrays(self.plan).items():
            self.storage.create(layout.dense_metadata(name), array.metadata())
        if (codec := self._unfitted()) is not None:
            self.use_codec(codec)

    @property
    def needs_fit(self) -> bool:
        """True until some worker has fitted and published the codec's tables."""
        return self._find_form() is None

    def fit(self, records: Iterable[TeacherRecord]) -> None:
        """Fit the codec's tables on the first records of shard 0, unless another worker has.

        Whoever publishes first wins, and everyone uses the winner's tables.
        """
        if not self.needs_fit:
            return
        profile = self.plan.facts["capture"]["profile"]
        samples = [
            {TOKENS: record.example.token_ids}
            | {name: record.signals[name] for name in self.plan.row_signals}
            for record in records
        ]
        budget = self.plan.facts["capture"].get("mean_kl", MEAN_KL)
        self.use_codec(RowCodec.fit(profile, samples, mean_kl=budget, **codec_sizes(self.plan)))

    def use_codec(self, codec: RowCodec) -> None:
        """Publish a codec, or take the one that another worker published before."""
        self.begin()
        self._form = Format(self.plan, publish_codec(self.storage, self.plan, codec))

    @property
    def definition(self) -> DefinitionCheck | None:
        """How far the engine was from the model's definition, if some worker has noted it."""
        return sealing.noted_definition(self.storage)

    def note_definition(self, found: DefinitionCheck) -> None:
        """Keep that for the manifest, unless another worker has found out more."""
        self.begin()
        noted = self.definition
        if noted is not None and not noted.done and found.done:
            self.storage.replace(layout.DEFINITION, found.to_bytes())
        else:
            self.storage.create(layout.DEFINITION, found.to_bytes())

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards without a receipt in one worker's share, a contiguous run of shards.

        Raises:
            ShardCorrupt: a shard has a receipt but lacks its rows.
        """
        share = share_of(self.plan.num_shards, rank, world_size)
        done = sealing.committed(self.storage, share)
        lost = sorted(done - sealing.listed(self.storage, "rows", layout.rows, share))
        if lost:
            raise _lost(self.storage, layout.rows(lost[0]))
        return [number for number in share if number not in done]

    def unclaimed(self, shards: Iterable[int]) -> Iterator[int]:
        """Those of `shards` that nobody else is at work on, each claimed as it is taken.

        A claim ends with `write`, `release` or the process that holds it, so no clock is asked. It
        only saves double work: the receipt decides.
        """
        self.begin()
        for number in shards:
            claim = self._claims.get(number) or self.storage.claim(layout.claim(number))
            if claim is None:
                continue
            self._claims[number] = claim
            if self.storage.size(layout.receipt(number)) is None:
                yield number
            else:
                self.release(number)

    def release(self, number: int | None = None) -> None:
        """Give up the claim on one shard, or all."""
        for held in list(self._claims) if number is None else [number]:
            if claim := self._claims.pop(held, None):
                claim.release()

    def write(self, number: int, records: Iterable[TeacherRecord]) -> ShardReceipt:
        """Write one shard: build, check, publish its files, then its receipt.

        Another worker may do the same at the same time: the files of whoever is first stay.

        Raises:
            CacheError: not exactly the shard's examples, or a value the codec cannot hold.
        """
        if self.needs_fit:
            records = self._fit_on_own(number, records)
        form = self.fitted()
        return self.write_encoded(number, (form.encode(record) for record in records))

    def write_encoded(self, number: int, examples: Iterable[Encoded]) -> ShardReceipt:
        """`write` for examples that are encoded already, by the codec of this cache."""
        self.begin()
        form = self.fitted()
        with self.storage.staging() as folder:
            shard.build(folder, form, number, examples)
            # From what lies on disk now, not from what was meant to be written.
            receipt = shard.inspect(DirectoryStorage(folder), form, number, self.preview)
            if not self._publish(folder, receipt):
                receipt = self._adopt(form, number, receipt)
        name = layout.receipt(number)
        created = self.storage.create(name, receipt.to_bytes())
        self.release(number)
        # Else another writer's receipt is there, and counts.
        if created:
            return receipt
        return read(ShardReceipt, self.storage.read(name), f"{self.storage.location}/{name}")

    def seal(self) -> Manifest:
        """Bind all receipts into the manifest, which makes the cache readable.

        Raises:
            CacheIncomplete: receipts are missing.
            ShardCorrupt: a receipt is damaged or lacks its files.
        """
        missing = self.missing()
        if missing:
            raise CacheIncomplete(
                f"{len(missing)} of {self.plan.num_shards} shards are missing, "
                f"the first is {missing[0]}",
                where=self.storage.location,
            )
        self.begin()  # a cache of no shards is sealed before anything was written
        return sealing.seal(self.storage, self.fitted())

    def _publish(self, folder: Path, receipt: ShardReceipt) -> bool:
        """True if every file in place is the one from `folder`."""
        # A list: every file is tried, whatever was said of the first.
        ours = [self.storage.create(name, folder / name) for name in receipt.files]
        return all(ours)

    def _adopt(self, form: Format, number: int, ours: ShardReceipt) -> ShardReceipt:
        """The receipt of files that another writer, or this one before a kill, left in place."""
        theirs = shard.inspect(self.storage, form, number, self.preview)
        if theirs.records.example_id != ours.records.example_id:
            raise ShardCorrupt(
                "holds other examples than the plan's",
                where=f"{self.storage.location}/{layout.rows(number)}",
                remedy="Run `stillroom cache repair`, then capture again.",
            )
        return theirs

    def fitted(self) -> Format:
        """How this cache's records are stored.

        Raises:
            ValueError: no worker has fitted the codec yet.
        """
        form = self._find_form()
        if form is None:
            raise ValueError("the codec is not fitted: call fit() with records of shard 0")
        return form

    def _find_form(self) -> Format | None:
        if self._form is None:
            codec = open_codec(self.storage, self.plan) or self._unfitted()
            self._form = Format(self.plan, codec) if codec else None
        return self._form

    def _unfitted(self) -> RowCodec | None:
        """The codec of a profile that needs no records to be made."""
        profile = self.plan.facts["capture"]["profile"]
        return RowCodec(profile, **codec_sizes(self.plan)) if profile in UNFITTED else None

    def _fit_on_own(self, number: int, records: Iterable[TeacherRecord]) -> Iterable[TeacherRecord]:
        if number != 0:
            raise ValueError("the codec is not fitted: call fit() with records of shard 0")
        held = list(records)
        self.fit(held)
        return held


def _check_plan(storage: Storage, plan: Plan) -> None:
    """Refuse a cache of another plan."""
    found = Plan.from_bytes(storage.read(layout.PLAN), f"{storage.location}/{layout.PLAN}")
    if found.digest == plan.digest:
        return
    empty = not sealing.committed(storage, range(found.num_shards))
    remedy = "Choose another directory, or restore the settings it was begun with"
    if (begun := found.facts["engine"]["name"]) != plan.facts["engine"]["name"]:
        remedy += f", or ask the engine it was begun with (`--engine {begun}`)"
    if found.facts["corpus"].get("split") != plan.facts["corpus"].get("split"):
        remedy += ", or give each split a cache of its own (`stillroom capture --cache DIRECTORY`)"
    if empty:  # where it was stopped in its first shard
        remedy += ", or delete this one (no shard of it is finished) unless a capture is at work"
    raise PlanMismatch(
        "this cache was begun with another plan: " + "; ".join(plan.differences(found)),
        where=storage.location,
        remedy=f"{remedy}; what is not recorded there came with a later release: only the one that "
        "began it can go on.",
    )


def _lost(storage: Storage, name: str) -> CacheError:
    return ShardCorrupt(
        "is missing although its receipt is there",
        where=f"{storage.location}/{name}",
        remedy="Run `stillroom cache repair`, then capture again.",
    )
