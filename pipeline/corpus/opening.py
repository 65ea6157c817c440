"""From a [[prepare.source]] table to an open source, whatever its kind.

One idea: this is the only place that knows every kind of source; `sources` and `hub` read them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

from stillroom.pipeline.config import Source
from stillroom.pipeline.corpus.documents import OpenSource
from stillroom.pipeline.corpus.hub import open_hub
from stillroom.pipeline.corpus.item_questions import open_interactions
from stillroom.pipeline.corpus.plain_files import read_topics
from stillroom.pipeline.corpus.sources import files_source, find_files, passed_over


def open_source(source: Source) -> OpenSource:
    """Find a source, hash what it holds, and see in its first rows what they are.

    Raises:
        CorpusError: nothing is there, or it cannot be read.
    """
    return OPENERS.get(source.kind, _open_files)(source)


def check_there(source: Source) -> None:
    """Refuse a source of files that is not there, before anything is read.

    Raises:
        CorpusError: there is none, or its kind is not known.
    """
    if source.kind not in OPENERS:
        find_files(source)


def _open_files(source: Source) -> OpenSource:
    kind, files = find_files(source)
    opened = files_source(source, kind, files)
    words = opened.facts["format"] + passed_over(source, files)
    return replace(opened, facts=opened.facts | {"format": words})


def _open_topics(source: Source) -> OpenSource:
    digest = hashlib.sha256()
    for document in read_topics():
        digest.update(document.text.encode())
    facts = {"name": source.name, "kind": source.kind, "sha256": digest.hexdigest()}
    facts["format"] = "a help topic each"
    return OpenSource(facts, read_topics)


OPENERS: dict[str, Callable[[Source], OpenSource]] = {
    "pydoc_topics": _open_topics,
    "hub": open_hub,
    "interactions": open_interactions,
}
"""All other kinds are files."""
