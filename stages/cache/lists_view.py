"""How caches about a catalogue look in a terminal: a history, the teacher's list, the truth.

One idea: such a cache holds numbers and hashes only; the words are in the corpus it was made from,
so without that corpus numbers are shown. Text from either is a stranger's; `console` makes it safe.
"""

from pathlib import Path

import numpy as np

from stillroom.cache_schemas.errors import CacheError, CorpusError
from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.signals import ITEM_PREFIX
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.corpus.files import Corpus
from stillroom.pipeline.corpus.histories import check_catalogue, open_catalogue, open_histories
from stillroom.pipeline.corpus.item_questions import PARTS, settings_in
from stillroom.pipeline.plain_text import plain
from stillroom.stages.cache.view import words_of
from stillroom.stages.console import put, say, table

DIMENSIONS = 6
LINE = 200
"""Characters of a written line that are shown."""


def is_about_a_catalogue(plan: Plan) -> bool:
    """Whether a cache holds items or lists of items."""
    return "catalogue" in plan.facts["capture"]


def catalogue_table(storage: Storage, number: int, corpus: str, tokenizer: str) -> None:
    """One record: an item's embedding, or a history and its list.

    Args:
        corpus: directory of the prepared corpus; empty looks beside the cache.
        tokenizer: directory or hub id, for the line that the teacher wrote; empty shows its ids.

    Raises:
        CacheError: no such record.
        PlanMismatch: the corpus has another catalogue.
    """
    cache = TeacherCache.open(storage)
    if not 0 <= number < len(cache):
        raise CacheError(f"no example {number}", expected=f"0 to {len(cache) - 1}")
    found = _corpus_of(storage, corpus)
    if found is None:
        say("numbers are shown: pass --corpus DIR, the prepared corpus, to see titles")
    else:
        facts = cache.plan.facts["capture"]["catalogue"]
        check_catalogue(facts, found.facts["catalogue"], storage.location)
    if any(name.startswith(ITEM_PREFIX) for name in cache.signals):
        _item(cache, number, found)
    else:
        _list(cache, number, found, tokenizer)


def _corpus_of(storage: Storage, corpus: str) -> Corpus | None:
    near = Path(storage.location).parent / "corpus"
    try:
        return Corpus.open(corpus or near)
    except CorpusError:
        if corpus:
            raise
        return None


def _item(cache: TeacherCache, number: int, corpus: Corpus | None) -> None:
    record = cache.read(number)
    (vector,) = record.signals.values()
    title = open_catalogue(corpus).titles[number] if corpus else f"item {number}"
    shown = ", ".join(f"{value:.3f}" for value in vector[0][:DIMENSIONS]) if len(vector) else "none"
    length = float(np.linalg.norm(vector))
    rows = [["item id", record.example.document_id], ["title", plain(title, 80)]]
    rows += [["length", f"{length:.3f}"], [f"first of {vector.shape[1]}", shown]]
    table(f"item {number} of {len(cache):,}", ["", "value"], rows)


def _list(cache: TeacherCache, number: int, corpus: Corpus | None, tokenizer: str) -> None:
    record = cache.read(number)
    ids, far = (record.signals[name] for name in ("candidate_ids", "candidate_distances"))
    titles = open_catalogue(corpus).titles if corpus else []
    target = -1
    put(f"history {number} of {len(cache):,}")
    if corpus is not None:
        target = _history(cache, record.example.example_id, corpus, titles)
    if "written_ids" in record.signals:
        _written(cache, record.signals["written_ids"], tokenizer)
    rows = [
        [
            str(place + 1),
            plain(titles[item], 80) if titles else str(item),
            f"{distance:.4g}",
            "came" if item == target else "",
        ]
        for place, (item, distance) in enumerate(zip(ids, far))
        if item >= 0
    ]
    distance = "-log p, nats" if cache.plan.facts["capture"].get("method") == "scored" else "L2"
    if not rows:
        put("the teacher's list is empty")
        return
    missed = target >= 0 and target not in ids
    table(
        "the teacher's list" + (", without the item that came" if missed else ""),
        ["place", "item", distance, "truth"],
        rows,
    )


def _written(cache: TeacherCache, written: np.ndarray, tokenizer: str) -> None:
    """Say the line that a grounded list was looked up from, special tokens included."""
    if tokenizer:
        said = words_of(str(cache.plan.facts["tokenizer"].get("sha256", "")), tokenizer, LINE)
        put(f"the teacher wrote: {said(written.tolist())}")
        return
    put(f"the teacher wrote tokens: {', '.join(map(str, written.tolist())) or 'none'}")
    say("token ids are shown: pass --tokenizer DIR, the teacher's")


def _history(cache: TeacherCache, name: str, corpus: Corpus, titles: list[str]) -> int:
    """Say what was taken before and what came; the place of what came."""
    histories = open_histories(corpus)
    rows = histories.rows(PARTS[cache.plan.facts["corpus"].get("split", "train")])
    names = histories.example_ids.take(rows).to_pylist()
    if name not in names:
        say("the corpus does not hold this history")
        return -1
    row = int(rows[names.index(name)])
    window = histories.windows(np.array([row]), settings_in(corpus).history, -1)[0]
    target = int(histories.items[row])
    user = histories.users[int(histories.owners(np.array([row]))[0])]
    taken = "; ".join(plain(titles[item], 60) for item in window if item >= 0)
    put(f"user {plain(user, 40)} took: {taken}")
    put(f"then came: {plain(titles[target], 80)}")
    return target
