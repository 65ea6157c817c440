"""Data sets of the Hugging Face hub, read without the `datasets` library.

One idea: a data set is a set of Parquet, JSONL or text files with its split in their names. They
are fetched into the hub's own cache and read like local files; without a network that cache is
used. Data sets that need code to load are read through the Parquet copies that the hub makes.
"""

from collections.abc import Iterable
from pathlib import Path

from cache_schemas.errors import CorpusError
from pipeline.config import Source
from pipeline.corpus_sources import SUFFIXES, OpenSource, files_source
from pipeline.strict import nearest

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps its own Parquet copy of a data set."""


def open_hub(source: Source) -> OpenSource:
    """Fetch one split of a data set.

    Raises:
        CorpusError: no such data set, split or subset, or no network and nothing in the cache.
    """
    directory, names = _fetch(source)
    kind = next(kind for kind, ends in SUFFIXES.items() if names[0].lower().endswith(ends))
    files = [directory / name for name in names]
    return files_source(source, kind, files, commit=directory.name, path=source.path)


def choose(names: Iterable[str], split: str, subset: str = "") -> list[str]:
    """Files of one split, of the first kind that has any: Parquet, then JSONL, then text.

    A file belongs to a split when one of the words of its path is the split's name
    (`data/train-00000-of-00002.parquet`, `default/train/0000.parquet`, `train.jsonl`).
    """
    chosen = [name for name in sorted(names) if _belongs(name, split, subset)]
    for kind in ("parquet", "jsonl", "text"):
        files = [name for name in chosen if name.lower().endswith(SUFFIXES[kind])]
        if files:
            return files
    return []


def _belongs(name: str, split: str, subset: str) -> bool:
    *folders, file = name.split("/")
    words = file.replace("_", "-").replace(".", "-").split("-")
    return (split in folders or split in words) and (not subset or subset in folders)


def _fetch(source: Source) -> tuple[Path, list[str]]:
    """Directory of the snapshot and the names of the split's files in it."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    revisions = [source.revision] if source.revision else ["", CONVERTED]
    seen: list[str] = []
    try:
        for revision in revisions:
            names = _listed(source.path, revision)
            seen += names
            if chosen := choose(names, source.split, source.subset):
                _one_subset(chosen, source)
                return _snapshot(source.path, revision, chosen), chosen
    except RepositoryNotFoundError:
        raise _refused(source, "no such data set on the hub (or it is private)") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = f"cannot be reached and is not in the local cache ({type(error).__name__})"
        raise _refused(source, reason) from None
    raise _no_split(source, seen)


def _listed(repo: str, revision: str) -> list[str]:
    """Names of a revision's files: from the hub, or from the cached snapshot without a network."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    try:
        return HfApi().list_repo_files(repo, repo_type="dataset", revision=revision or None)
    except RevisionNotFoundError:
        return []
    except (OfflineModeIsEnabled, ConnectionError):
        pass
    except OSError as error:
        if getattr(error, "response", None) is not None:
            raise
    directory = Path(
        snapshot_download(
            repo, repo_type="dataset", revision=revision or None, local_files_only=True
        )
    )
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


def _snapshot(repo: str, revision: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    fetched = snapshot_download(
        repo, repo_type="dataset", revision=revision or None, allow_patterns=names
    )
    return Path(fetched)


def _one_subset(names: list[str], source: Source) -> None:
    """Two configurations of a data set are not one corpus: the run has to say which it means."""
    subsets = {name.split("/")[0] for name in names if name.count("/") >= 2}
    if len(subsets) > 1 and not source.subset:
        raise CorpusError(
            f"has {len(subsets)} configurations: {', '.join(sorted(subsets)[:8])}",
            where=source.path,
            remedy="Set [[prepare.source]] subset to one of them.",
        )


def _no_split(source: Source, names: list[str]) -> CorpusError:
    known = sorted({word for n in names for word in Path(n).with_suffix("").parts})
    return CorpusError(
        f"no Parquet, JSONL or text files of split '{source.split}'"
        + (f" and subset '{source.subset}'" if source.subset else ""),
        where=source.path,
        remedy=nearest(source.split, known),
    )


def _refused(source: Source, reason: str) -> CorpusError:
    return CorpusError(
        reason,
        where=f"hub data set {source.path}",
        remedy="Check the id and the network, or download its files and use kind 'parquet'.",
    )
