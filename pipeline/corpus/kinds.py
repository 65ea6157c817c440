"""What a source's file holds, told by its name.

One idea: endings decide, so that nothing is opened to be guessed at; what is not read here is told
what to become. Nothing is read.
"""

from pathlib import Path

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus import compression
from stillroom.pipeline.images import SUFFIXES as SUFFIXES_OF_IMAGES

SUFFIXES = {
    "arrow": (".arrow",),
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "webdataset": (".tar", ".tgz"),
    "text": (".txt", ".md", ".rst"),
    "images": SUFFIXES_OF_IMAGES,
}
"""Endings of each kind; of several kinds in one folder, the first here that is there is read."""
SPREADSHEETS = (".csv", ".tsv", ".xls", ".xlsx")


def kind_of(path: str | Path) -> str:
    """What a file's name says it holds; empty where it says nothing."""
    return next((kind for kind in SUFFIXES if is_kind(Path(path), kind)), "")


def is_kind(path: Path, kind: str) -> bool:
    """Whether a name ends as those of a kind, a compression's ending aside."""
    return compression.plain_name(path).endswith(SUFFIXES[kind])


def known_kind(path: Path, where: str) -> str:
    """The kind that a name tells.

    Raises:
        CorpusError: none that is read here; `where` is named.
    """
    if kind := kind_of(path):
        return kind
    if Path(compression.plain_name(path)).suffix in SPREADSHEETS:
        raise CorpusError(
            f"{path.name} is a spreadsheet, which has no lists: conversations do not fit into it",
            expected="JSONL or Parquet",
            where=where,
            remedy=f"Of a column text: pandas.read_csv('{path.name}').to_json('{path.stem}.jsonl', "
            "orient='records', lines=True); conversations need a list of messages in each row.",
        )
    raise CorpusError(
        f"the name of {path.name} does not say what is in it",
        expected=f"one of {', '.join(ending for ends in SUFFIXES.values() for ending in ends)}",
        where=where,
        remedy="Set [[prepare.source]] kind.",
    )
