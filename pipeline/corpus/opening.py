"""From a [[prepare.source]] table to an open source, whatever its kind.

One idea: this is the only place that knows every kind of source; `sources` and `hub` read them.
"""

import hashlib
from collections.abc import Callable

from stillroom.pipeline.config import Source
from stillroom.pipeline.corpus.documents import OpenSource
from stillroom.pipeline.corpus.hub import open_hub
from stillroom.pipeline.corpus.item_questions import open_interactions
from stillroom.pipeline.corpus.sources import SUFFIXES, files_source, find_files, read_topics


def open_source(source: Source) -> OpenSource:
    """Find a source and hash what it holds.

    Raises:
        CorpusError: nothing is there, or it cannot be read.
    """
    return OPENERS[source.kind](source)


def _open_files(source: Source) -> OpenSource:
    return files_source(source, source.kind, find_files(source.path, SUFFIXES[source.kind]))


def _open_topics(source: Source) -> OpenSource:
    digest = hashlib.sha256()
    for document in read_topics():
        digest.update(document.text.encode())
    facts = {"name": source.name, "kind": source.kind, "sha256": digest.hexdigest()}
    return OpenSource(facts, read_topics)


OPENERS: dict[str, Callable[[Source], OpenSource]] = {
    "text": _open_files,
    "jsonl": _open_files,
    "parquet": _open_files,
    "pydoc_topics": _open_topics,
    "hub": open_hub,
    "images": _open_files,
    "interactions": open_interactions,
}
