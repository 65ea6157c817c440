"""Whether the objectives have anything to say about a cache.

One idea: an objective whose mask, sources or layers pick nothing would be trained for days at loss
0; so its weights are asked for, example by example, until every objective has met one row. That is
mostly the first example. No student is needed, and no picture is opened.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.data.batch import DistillBatch, collate
from stillroom.pipeline.data.images import Pictures
from stillroom.pipeline.data.records import matched
from stillroom.pipeline.objectives.combine import signals_needed
from stillroom.pipeline.objectives.weighting import Term, unit_weights


def check_sources(terms: list[Term], caches: Mapping[str, Any]) -> None:
    """Refuse a weight for a source that the objective's cache does not have.

    Raises:
        ConfigError: naming the sources that it has.
    """
    for term in terms:
        named = term.table.source_weights
        if not named:
            continue
        known = set(caches[term.table.cache].index(["source"]).column("source").to_pylist())
        for source in sorted(named.keys() - known):
            raise ConfigError(
                f"source_weights names '{source}', which is no source of the cache",
                expected=f"some of {', '.join(sorted(known))}",
                where=f"[[objective]] {term.label}",
                remedy=nearest(source, known),
            )


def check_every_objective_has_rows(
    terms: list[Term], caches: Mapping[str, Any], images: Mapping[str, Any], where: str
) -> None:
    """Refuse an objective that weighs nothing in a whole cache.

    Raises:
        StudentError: naming the objective and what it asks for.
    """
    waiting = list(terms)
    for batch in _examples(terms, caches, images):
        waiting = [term for term in waiting if not unit_weights(term, batch, 1.0).any()]
        if not waiting:
            return
    table = waiting[0].table
    weighed = f", source_weights = {table.source_weights}" if table.source_weights else ""
    raise StudentError(
        f"objective {waiting[0].label} gets no {waiting[0].spec.unit} at all",
        expected=f"at least one under mask = '{table.mask}'{weighed}",
        where=where,
        remedy="Set mask = 'all', change what the line asks for, or leave it out.",
    )


def _examples(terms: list[Term], caches: Mapping[str, Any], images: Mapping[str, Any]):
    """Every example as a batch of its own, with what the objectives need of it."""
    signals = signals_needed(terms, [*caches, *images])
    wanted = {name: sorted(signals[name]) for name in images}
    pictures = Pictures(None, None, images, wanted) if images else None
    main = caches[""]
    others = {name: matched(main, cache, name) for name, cache in caches.items() if name}
    for number in range(len(main)):
        record = {"": main.read(number, signals[""])}
        for name, numbers in others.items():
            record[name] = caches[name].read(int(numbers[number]), signals[name])
        batch: DistillBatch = collate([[record]], len(record[""].example.token_ids))
        if pictures is not None and batch.images is not None:
            batch = replace(batch, images=pictures.fill(batch.images))
        yield batch
