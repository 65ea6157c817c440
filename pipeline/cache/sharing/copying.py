"""Push and pull: one cache copied from one storage to another, verified on the way.

One idea: a copy is made in the order of a capture (files, receipts, manifest last), so a copy that
was cut off is an unsealed cache, and copying again fetches only what is missing. Every file is
hashed before it gets its name. It converts nothing; a copy is byte for byte the original.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, CacheIncomplete, PlanMismatch, ShardCorrupt
from stillroom.cache_schemas.manifest import FileEntry, Manifest, Plan, read
from stillroom.pipeline.cache import partial
from stillroom.pipeline.cache.card import README, card
from stillroom.pipeline.cache.care.verification import Progress
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.published_card import About, published_card
from stillroom.pipeline.cache.sharing.readable import FILE
from stillroom.pipeline.cache.storage.protocol import (
    TRIES,
    IsRight,
    Storage,
    check_vacant,
    looks_like_a_document,
    read_right,
)
from stillroom.pipeline.cache.storage.snapshot import Snapshot, pinned

PIECE_BYTES = 1 << 25
"""Bytes of one read; a broken connection costs at most this much."""
LOGITS = "logits"
NOTHING_MORE = About()


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did.

    Attributes:
        files, num_bytes: what was transferred now; what was there already does not count.
        dense: dense signals that the copy holds.
    """

    files: int
    num_bytes: int
    dense: list[str]


def copy(
    source: Storage,
    target: Storage,
    signals: list[str] | None = None,
    threads: int = 8,
    progress: Progress = lambda done, total: None,
    readme: bool = False,
) -> Copied:
    """Copy a sealed cache.

    Args:
        signals: dense signals to take (`logits` alone means none); None takes all. What every
            training step reads (tokens, masks, row signals) always travels.
        threads: shards in flight.
        readme: whether the source's README comes too, which nothing binds: right for a cache of
            one's own; what people wrote on one at the target stays. A stranger's may tell other
            tools to load other files, so without this the copy gets a new one.

    Raises:
        CacheError: no such signal; no sealed cache at the source; READMEs that contradict.
        ShardCorrupt: a file of the source is not what its manifest says.
        PlanMismatch: the target holds another cache.
        CacheIncomplete: the connection failed too often; the same copy again goes on.
    """
    pin = pinned(source)
    cache = TeacherCache.open(pin)
    dense = wanted(cache, signals)
    check_target(cache, target)
    check_vacant(target)
    target.sweep()  # what a copy that was killed has left
    try:
        copied = _copied(cache, pin, target, dense, threads, progress, readme)
    except ShardCorrupt:
        pin.check_still_there()
        raise
    except FileNotFoundError as error:
        raise CacheIncomplete(f"{error}: was there a moment ago", where=target.location) from None
    target.sweep()
    return copied


def _copied(
    cache: TeacherCache,
    source: Snapshot,
    target: Storage,
    dense: list[str],
    threads: int,
    progress: Progress,
    readme: bool,
) -> Copied:
    work = _Copy(cache, target, dense)
    own = _card(cache, source, target) if readme else None
    fixed = sorted(cache.manifest.files.keys() - {layout.DENSE_GROUP})
    for name in [layout.PLAN, layout.CODEC, *fixed]:
        if _is_wanted(name, dense):
            work.file(name, cache.manifest.files[name])
    with ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(work.shard, range(cache.plan.num_shards)), start=1):
            progress(done, cache.plan.num_shards)
    if own:
        target.replace(README, own)
    target.create(README, card(cache.plan))  # a person's own stays
    _copy_beside(source, target, layout.SIGNATURE, looks_like_a_document)
    with target.alone():  # another copy may be adding its signals
        held = {*dense, *_held_already(cache, target)}
        whole = held == set(cache.plan.dense_signals)
        if whole and (group := cache.manifest.files.get(layout.DENSE_GROUP)):
            work.file(layout.DENSE_GROUP, group)
        partial.mark(target, None if whole else sorted(held))
        _seal(target, source.read(layout.MANIFEST))
    return Copied(len(work.moved), sum(work.moved), sorted(held))


def _copy_beside(source: Storage, target: Storage, name: str, is_right: IsRight) -> None:
    """A small file that the manifest does not bind; one that is too large, or a page of the server
    in its place, stays where it is."""
    data = _small(source, name, is_right)
    if data is not None:
        target.replace(name, data)


def _small(source: Storage, name: str, is_right: IsRight) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, ShardCorrupt):
        return read_right(source, name, is_right) if source.size(name) else None
    return None


def _card(cache: TeacherCache, source: Storage, target: Storage) -> bytes | None:
    """The source's README, with what people wrote on one that is at the target."""
    own, there = (_small(end, README, lambda data: True) for end in (source, target))
    has_rows = target.size(FILE) is not None
    return published_card(cache.plan, own, there, NOTHING_MORE, has_rows, target.location)


def _seal(target: Storage, manifest: bytes) -> None:
    """The manifest that was checked, last; over one that is broken, if one is there."""
    if not target.create(layout.MANIFEST, manifest) and target.read(layout.MANIFEST) != manifest:
        target.replace(layout.MANIFEST, manifest)


class _Copy:
    """One copy under way."""

    def __init__(self, cache: TeacherCache, target: Storage, dense: list[str]):
        self.cache, self.target, self.dense = cache, target, dense
        self.moved: list[int] = []

    def shard(self, number: int) -> None:
        """Copy what the target lacks of a shard, its receipt last."""
        receipt = self.cache.receipt(number)
        committed = self.target.size(layout.receipt(number)) is not None
        for name in layout.shard_files(number, self.dense):
            entry = receipt.files[name]
            # Under a receipt a size will do: the file was hashed before it got its name.
            if not (committed and self.target.size(name) == entry.bytes):
                self.file(name, entry)
        if not committed:
            self.target.create(layout.receipt(number), receipt.to_bytes())

    def file(self, name: str, entry: FileEntry) -> None:
        """Copy one file unless the target has it."""
        if self._is_there(name, entry):
            return
        with self.target.staging() as folder:
            path = self._fetch(name, entry, folder)
            if not self.target.create(name, path) and not self._is_there(name, entry):
                raise ShardCorrupt("another file has its name", where=self._at_target(name))
        self.moved.append(entry.bytes)

    def _is_there(self, name: str, entry: FileEntry) -> bool:
        """True if the target has this very file.

        Raises:
            ShardCorrupt: it has another one of that name.
        """
        size = self.target.size(name)
        if size is None:
            return False
        if size != entry.bytes or _hash(self.target, name, size) != entry.sha256:
            raise ShardCorrupt(
                "is there already with other content",
                where=self._at_target(name),
                remedy="Remove it, or run `stillroom cache repair` there.",
            )
        return True

    def _fetch(self, name: str, entry: FileEntry, folder: Path) -> Path:
        """A local file with the checked content; what came wrong is asked for again."""
        path, source = folder / "file", self.cache.storage
        for _ in range(TRIES):
            found = self._download(name, entry, path)
            if found == "":
                return path
            source.forget(name)
        raise ShardCorrupt(
            found,
            where=f"{source.location}/{name}",
            remedy="Copy again; if it stays so, its publisher must repair it.",
        )

    def _download(self, name: str, entry: FileEntry, path: Path) -> str:
        """What is wrong with a file that was copied; empty: nothing."""
        digest = hashlib.sha256()
        try:
            with open(path, "wb") as file:
                for piece in _pieces(self.cache.storage, name, entry.bytes):
                    digest.update(piece)
                    file.write(piece)
        except FileNotFoundError:
            return "is missing"
        right = digest.hexdigest() == entry.sha256
        return "" if right else "does not have the hash that its receipt names"

    def _at_target(self, name: str) -> str:
        return f"{self.target.location}/{name}"


def _pieces(storage: Storage, name: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE_BYTES):
        yield storage.read(name, start, min(PIECE_BYTES, size - start))


def _hash(storage: Storage, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(storage, name, size):
        digest.update(piece)
    return digest.hexdigest()


def wanted(cache: TeacherCache, signals: list[str] | None) -> list[str]:
    """Dense signals to copy, in the plan's order."""
    if signals is None:
        return list(cache.form.dense)
    known = {*cache.form.dense, *cache.plan.row_signals, LOGITS}
    if unknown := sorted(set(signals) - known):
        raise CacheError(
            f"no signal {', '.join(unknown)}",
            expected=f"some of {', '.join((LOGITS, *cache.form.dense))}",
            where=cache.storage.location,
        )
    return [name for name in cache.form.dense if name in signals]


def _held_already(cache: TeacherCache, target: Storage) -> list[str]:
    """Dense signals of a finished copy that is being added to, or of one that another process is
    about to finish."""
    present = partial.present_signals(target)
    if present is None:
        return [] if target.size(layout.MANIFEST) is None else list(cache.plan.dense_signals)
    return [name for name in present if name in cache.plan.dense_signals]


def _is_wanted(name: str, dense: list[str]) -> bool:
    return not name.startswith("dense/") or name.split("/")[1] in dense


def _holds_plan(target: Storage, plan: Plan) -> bool:
    try:
        where = f"{target.location}/{layout.PLAN}"
        return Plan.from_bytes(target.read(layout.PLAN), where).digest == plan.digest
    except (CacheError, FileNotFoundError):
        return False


def check_target(cache: TeacherCache, target: Storage) -> None:
    """Refuse a place that holds another cache. A manifest that is broken beside this cache's
    plan is this cache's own, and will be mended."""
    try:
        if target.size(layout.MANIFEST) is None:
            return
        found = read(Manifest, target.read(layout.MANIFEST), f"{target.location}/{layout.MANIFEST}")
        same = found.digest == cache.manifest.digest
    except FileNotFoundError:  # there was none, whatever was said first
        return
    except ShardCorrupt:
        same = target.size(layout.PLAN) is not None and _holds_plan(target, cache.plan)
    if not same:
        raise PlanMismatch(
            "another cache lies there",
            where=target.location,
            remedy="Choose another place, or remove it.",
        )
