"""New caches out of sealed ones: `merge`, `subset`, `reshard`.

One idea: all three are a list of (cache, example) written again in that order through the ordinary
writer, so they resume, seal and verify like a capture. Encoded records and chunks are copied as
they are; they are decoded and encoded again only where the new cache has another codec.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas import canonical
from stillroom.cache_schemas.errors import CacheError, PlanMismatch
from stillroom.cache_schemas.manifest import Manifest, Plan
from stillroom.pipeline.cache.care.verification import Progress
from stillroom.pipeline.cache.formats import Encoded
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.shard import Preview
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.cache.writer import CacheWriter

Pick = tuple[int, int]
"""(which cache, which of its examples)."""
MOST_PER_SHARD = 1 << 14
"""Examples that one shard may get: it is built in memory, and is what a failure loses."""
MAY_DIFFER = ("corpus", "shards", "images", "derived", "format_version", "signals")
"""Facts in which merged caches may differ; of `signals` only the sizes may."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which examples `subset` keeps, in their order; every limit given must hold.

    Attributes:
        sources: names of corpus sources; empty for all.
        entropy: least and largest mean entropy, nats; None for no limit.
        examples, tokens: how many at most, counted from the first; 0 for no limit.
    """

    sources: tuple[str, ...] = ()
    entropy: tuple[float | None, float | None] = (None, None)
    examples: int = 0
    tokens: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON, for the new plan."""
        return {
            "sources": list(self.sources),
            "entropy": list(self.entropy),
            "examples": self.examples,
            "tokens": self.tokens,
        }

    def of(self, cache: TeacherCache) -> list[Pick]:
        """The examples of a cache that it keeps."""
        index = cache.index(["source", "entropy", "num_tokens"])
        tokens = index.column("num_tokens").to_numpy()
        keep = np.ones(len(index), dtype=bool)  # [examples]
        if self.sources:
            keep &= np.isin(index.column("source").to_numpy(zero_copy_only=False), self.sources)
        entropy = index.column("entropy").to_numpy(zero_copy_only=False).astype(np.float64)
        low, high = self.entropy
        keep &= True if low is None else entropy >= low
        keep &= True if high is None else entropy <= high
        keep &= (np.cumsum(keep) <= self.examples) if self.examples else True
        keep &= (np.cumsum(tokens * keep) <= self.tokens) if self.tokens else True
        return [(0, int(number)) for number in np.flatnonzero(keep)]


def subset(
    source: TeacherCache,
    target: str | Path | Storage,
    selection: Selection,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """A cache of some of the examples.

    Raises:
        CacheError: the selection keeps nothing.
    """
    how = {"subset": selection.facts()}
    return _write([source], selection.of(source), target, how, progress=progress)


def merge(
    sources: Sequence[TeacherCache],
    target: str | Path | Storage,
    recode: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """One cache of all examples of several; of an example in more than one, the first is kept.

    Args:
        recode: decode and encode again where codec tables differ, which adds the codec's error
            once more.

    Raises:
        PlanMismatch: they differ in teacher, tokenizer, engine, signals or codec.
    """
    for other in sources[1:]:
        _check_alike(sources[0], other, recode)
    seen: set[str] = set()
    picks: list[Pick] = []
    for which, source in enumerate(sources):
        ids = source.index(["example_id"]).column("example_id").to_pylist()
        picks += [(which, number) for number, name in enumerate(ids) if name not in seen]
        seen.update(ids)
    return _write(sources, picks, target, {"merge": len(sources)}, progress=progress)


def reshard(
    source: TeacherCache,
    target: str | Path | Storage,
    per_shard: int,
    profile: str = "",
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """The same examples in shards of another size, or in another codec profile.

    Raises:
        CacheError: a shard would have more examples than there are, or than may be built at once.
    """
    most = min(len(source), max(MOST_PER_SHARD, source.plan.examples_per_shard))
    if per_shard > most:
        raise CacheError(
            f"{per_shard:,} examples per shard",
            expected=f"at most {most:,}, of {len(source):,} in all",
            where=source.storage.location,
            remedy="Shards are built one at a time in memory: choose fewer.",
        )
    picks = [(0, number) for number in range(len(source))]
    capture = {"examples_per_shard": per_shard}
    capture |= {"profile": profile} if profile else {}
    return _write([source], picks, target, {"reshard": capture}, capture, progress)


def _write(
    sources: Sequence[TeacherCache],
    picks: list[Pick],
    target: str | Path | Storage,
    how: dict[str, Any],
    capture: dict[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    if not picks:
        raise CacheError("no example is left", where=sources[0].storage.location)
    plan = _derived_plan(sources, len(picks), how, capture or {})
    writer = CacheWriter.open(target, plan, _previews(sources))
    if plan.facts["capture"]["profile"] == sources[0].plan.facts["capture"]["profile"]:
        writer.use_codec(sources[0].form.codec)
    for shard in writer.missing():
        chosen = [picks[number] for number in plan.shard_range(shard)]
        if writer.needs_fit:
            writer.fit(sources[which][number] for which, number in chosen)
        writer.write_encoded(shard, _encoded(writer, sources, chosen))
        progress(shard + 1, plan.num_shards)
    return writer.seal()


def _previews(sources: Sequence[TeacherCache]) -> Preview:
    """The previews that the caches have already."""
    known: dict[str, str] = {}
    for source in sources:
        columns = source.index(["example_id", "preview"]).to_pydict()
        known |= dict(zip(columns["example_id"], columns["preview"]))
    return lambda example: known.get(example.example_id, "")


def _encoded(
    writer: CacheWriter, sources: Sequence[TeacherCache], picks: list[Pick]
) -> Iterator[Encoded]:
    form = writer.fitted()
    for which, number in picks:
        source = sources[which]
        if source.form.codec_digest == form.codec_digest and _same_chunks(source.plan, form.plan):
            yield source.encoded(number)
        else:
            yield form.encode(source[number])


def _same_chunks(first: Plan, second: Plan) -> bool:
    return first.dense_signals == second.dense_signals


def _derived_plan(
    sources: Sequence[TeacherCache], num_examples: int, how: dict[str, Any], capture: dict[str, Any]
) -> Plan:
    """The first cache's plan with the new sizes, and where it comes from."""
    facts = copy.deepcopy(sources[0].plan.facts)
    facts["capture"] |= capture
    per_shard = facts["capture"]["examples_per_shard"]
    facts["shards"] = {
        "count": -(-num_examples // per_shard),  # rounded up
        "examples_per_shard": per_shard,
        "num_examples": num_examples,
    }
    facts["images"] = any(source.plan.facts["images"] for source in sources)
    facts["derived"] = {"from": [source.manifest.digest for source in sources], **how}
    if "reshard" not in how:
        facts["corpus"] = {
            "digest": canonical.digest(facts["derived"]),
            "from": [source.plan.facts["corpus"].get("digest") for source in sources],
        }
    dense = {name: dict(sources[0].plan.dense_signals[name]) for name in sources[0].form.dense}
    for name, shape in dense.items():
        shape["positions"] = max(s.plan.dense_signals[name]["positions"] for s in sources)
    facts["signals"]["dense"] = dense
    return Plan.from_facts(facts, "derived plan")


def _check_alike(first: TeacherCache, other: TeacherCache, recode: bool) -> None:
    """Refuse to merge what does not mean the same."""
    mine, theirs = (Plan(_meaning(cache)) for cache in (first, other))
    if different := mine.differences(theirs):
        raise PlanMismatch(
            "these caches do not mean the same: " + "; ".join(different),
            where=other.storage.location,
            remedy="Merge only caches of one teacher, tokenizer and set of signals.",
        )
    if first.form.codec_digest != other.form.codec_digest and not recode:
        raise PlanMismatch(
            "was written with other codec tables",
            where=other.storage.location,
            remedy="Add --recode to encode its records again with the first cache's tables.",
        )


def _meaning(cache: TeacherCache) -> dict[str, Any]:
    facts = {key: value for key, value in cache.plan.facts.items() if key not in MAY_DIFFER}
    facts["capture"] = {k: v for k, v in facts["capture"].items() if k != "examples_per_shard"}
    facts["signals"] = sorted(cache.signals)
    return facts
