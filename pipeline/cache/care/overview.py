"""What a cache is, in a few numbers, whether it is sealed or still being written.

One idea: everything here comes from the manifest, the plan, a few receipts and, of lists, some
thousand records, so it is quick for a cache of any size. Receipts are bound to the manifest;
whether shards fit them is `verification.py`'s question.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import CacheError, ShardCorrupt, StillroomError
from stillroom.cache_schemas.manifest import DefinitionCheck, Manifest, Plan, ShardReceipt, read
from stillroom.pipeline.cache import partial
from stillroom.pipeline.cache.care.empty_lists import LOOKED_AT, EmptyLists, empty_lists
from stillroom.pipeline.cache.reader import REMEDY, TeacherCache
from stillroom.pipeline.cache.sealing import check_table, committed, noted_definition
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.protocol import Storage

RECEIPTS_LOOKED_AT, THREADS = 16, 16
ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Overview:
    """One cache.

    Attributes:
        location: where it is.
        plan: its plan.
        sealed: True when it can be read.
        shards_done: shards with a receipt.
        num_tokens, num_examples: of a sealed cache; of the receipts looked at otherwise.
        num_bytes: the same, of the files that are there.
        bytes_per_token, bytes_per_example: kind of data (`rows` or a dense signal) -> bytes, from
            some receipts; examples of caches about images, items or histories have no tokens.
        dense: dense signals that are there; fewer than the plan's in a partial copy.
        definition: how far the engine was from the model's definition, if it was noted.
        empty: of a sealed cache of candidates: lists without an item, of some that were read.
    """

    location: str
    plan: Plan
    sealed: bool
    shards_done: int
    num_tokens: int
    num_bytes: int
    bytes_per_token: dict[str, float]
    dense: tuple[str, ...]
    definition: DefinitionCheck | None = None
    num_examples: int = 0
    bytes_per_example: dict[str, float] = field(default_factory=dict)
    empty: EmptyLists | None = None

    @property
    def teacher(self) -> str:
        """Architecture and the beginning of the weights' hash, and of its adapter's."""
        facts = self.plan.facts["teacher"]
        sha = str(facts.get("weights_sha256", ""))[:12]
        adapter = facts.get("adapter")
        named = adapter.get("weights_sha256") if isinstance(adapter, dict) else adapter
        over = f" with adapter {str(named)[:12]}" if adapter else ""
        return f"{facts.get('architecture', 'teacher')} {sha}{over}".strip()


def overview(storage: Storage) -> Overview:
    """Look at one cache.

    Raises:
        CacheError: there is none.
        ShardCorrupt: its manifest or plan is damaged.
    """
    manifest = _manifest(storage)
    plan = _plan(storage, manifest)
    if manifest:
        check_table(manifest, plan, f"{storage.location}/{layout.MANIFEST}")
    every = range(plan.num_shards)
    done = sorted(committed(storage, every)) if manifest is None else list(every)
    held = partial.present_signals(storage)
    looked_at = done[:RECEIPTS_LOOKED_AT] if held is None or manifest is None else done
    receipts = list(_receipts(storage, looked_at, manifest))
    tokens = sum(receipt.num_tokens for receipt in receipts)
    examples = sum(len(plan.shard_range(shard)) for shard in looked_at)
    sizes = _by_kind(receipts, {ROWS, *(plan.dense_signals if held is None else held)})
    whole = manifest is not None and held is None
    return Overview(
        location=storage.location,
        plan=plan,
        sealed=manifest is not None,
        shards_done=len(done),
        num_tokens=manifest.num_tokens if manifest else tokens,
        num_bytes=manifest.num_bytes if whole and manifest else sum(sizes.values()),
        bytes_per_token={kind: size / max(tokens, 1) for kind, size in sorted(sizes.items())},
        bytes_per_example={kind: size / max(examples, 1) for kind, size in sorted(sizes.items())},
        dense=tuple(name for name in plan.dense_signals if held is None or name in held),
        definition=manifest.definition if manifest else noted_definition(storage),
        num_examples=plan.num_examples if manifest else examples,
        empty=empty_lists(TeacherCache.open(storage), LOOKED_AT) if whole else None,
    )


def find(directory: str | Path) -> list[Overview | tuple[str, str]]:
    """Every cache below a directory; (location, what is wrong) for one that cannot be read.

    Raises:
        CacheError: no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CacheError("no such directory", where=str(root), remedy="Check the path.")
    return [_look(path.parent) for path in sorted(_plans(root))]


def _look(path: Path) -> Overview | tuple[str, str]:
    try:
        return overview(DirectoryStorage(path))
    except StillroomError as error:
        return str(path), error.found
    except OSError as error:
        return str(path), error.strerror or type(error).__name__


def _plans(root: Path) -> Iterator[Path]:
    """Plans at any depth, not inside a cache, in a hidden folder or behind a link."""
    for folder, below, files in os.walk(root):
        if layout.PLAN in files or layout.PLAN in below:
            yield Path(folder, layout.PLAN)
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]


def _manifest(storage: Storage) -> Manifest | None:
    try:
        data = storage.read(layout.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return read(Manifest, data, f"{storage.location}/{layout.MANIFEST}")


def _plan(storage: Storage, manifest: Manifest | None) -> Plan:
    where = f"{storage.location}/{layout.PLAN}"
    if manifest is not None:
        return Plan.from_facts(manifest.plan, where)
    try:
        return Plan.from_bytes(storage.read(layout.PLAN), where)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            "there is no cache here", where=storage.location, remedy="Check the path."
        ) from None


def _receipts(
    storage: Storage, shards: list[int], manifest: Manifest | None
) -> Iterator[ShardReceipt]:
    """Receipts, fetched in parallel and checked against the manifest, where there is one."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda shard: _receipt(storage, shard, manifest), shards)


def _receipt(storage: Storage, shard: int, manifest: Manifest | None) -> ShardReceipt:
    """One receipt; of a sealed cache the one that its manifest names."""
    name = layout.receipt(shard)
    where = f"{storage.location}/{name}"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise ShardCorrupt("is missing", where=where, remedy=REMEDY) from None
    if manifest and hashlib.sha256(data).hexdigest() != manifest.shards.receipt[shard]:
        found = "is not the receipt that the manifest names"
        raise ShardCorrupt(found, where=where, remedy=REMEDY)
    return read(ShardReceipt, data, where)


def _by_kind(receipts: list[ShardReceipt], kinds: set[str]) -> dict[str, int]:
    """Bytes of the files of some kinds."""
    sizes: dict[str, int] = {}
    for receipt in receipts:
        for name, entry in receipt.files.items():
            # dense/SIGNAL/c/...
            kind = name.split("/")[1] if name.startswith("dense/") else ROWS
            if kind in kinds:
                sizes[kind] = sizes.get(kind, 0) + entry.bytes
    return sizes
