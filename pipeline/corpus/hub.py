"""Data sets of the Hugging Face hub, read without the `datasets` library.

One idea: a data set is a set of Parquet, JSONL or text files with its split in their names. They
are fetched into the hub's own cache and read like local files; without a network that cache is
used. Data sets that need code to load are read through the Parquet copies that the hub makes.
"""

from collections.abc import Iterable
from pathlib import Path

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config import Source
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.documents import OpenSource
from stillroom.pipeline.corpus.kinds import kind_of
from stillroom.pipeline.corpus.sources import files_source

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps its own Parquet copy of a data set."""


def open_hub(source: Source) -> OpenSource:
    """Fetch one split of a data set.

    Raises:
        CorpusError: no such data set, split or subset, or no network and nothing in the cache.
    """
    directory, names = _fetch(source)
    kind = kind_of(names[0])
    files = [directory / name for name in names]
    return files_source(source, kind, files, commit=directory.name, path=source.path)


def choose(names: Iterable[str], split: str, subset: str = "") -> list[str]:
    """Files of one split, of the first kind that has any: Parquet, JSONL, tars, text.

    A file belongs to a split when one of the words of its path is the split's name
    (`data/train-00000-of-00002.parquet`, `default/train/0000.parquet`, `train.jsonl`).
    """
    chosen = [name for name in sorted(names) if _belongs(name, split, subset)]
    for kind in ("parquet", "jsonl", "webdataset", "text"):
        files = [name for name in chosen if kind_of(name) == kind]
        if files:
            return files
    return []


def _belongs(name: str, split: str, subset: str) -> bool:
    *folders, file = name.split("/")
    words = file.replace("_", "-").replace(".", "-").split("-")
    return (split in folders or split in words) and (not subset or subset in folders)


def _fetch(source: Source) -> tuple[Path, list[str]]:
    """Directory of the snapshot and the names of the split's files in it."""
    seen: list[str] = []
    for revision in [source.revision] if source.revision else ["", CONVERTED]:
        names = _listed(source, revision)
        seen += names
        if chosen := choose(names, source.split, source.subset):
            _one_subset(chosen, source)
            return _snapshot(source, revision, chosen), chosen
    raise _no_split(source, seen)


def _listed(source: Source, revision: str) -> list[str]:
    """Names of a revision's files: from the hub, or as it said them last without a network.

    The converted copy that a data set may lack is then an empty list.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().list_repo_files(source.path, repo_type="dataset", revision=revision or None)
    except RevisionNotFoundError:
        if revision == CONVERTED:
            return []
        raise _refused(source, f"no such revision '{revision or 'main'}'") from None
    except RepositoryNotFoundError:
        raise _refused(source, "no such data set on the hub (or it is private)") from None
    except ValueError as error:
        raise _refused(source, f"is not a data set id ({error})") from None
    except Exception as error:  # offline mode, or whatever the HTTP client raises
        return _remembered(source, revision, error)


def _remembered(source: Source, revision: str, error: Exception) -> list[str]:
    """The whole listing that the hub's cache keeps beside a snapshot, fetched or not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        kept = get_cached_repo_tree(source.path, repo_type="dataset", revision=revision or None)
    except (CachedRepoTreeNotFoundError, OSError):
        raise _unreachable(source, error) from None
    return [entry.path for entry in kept]


def _snapshot(source: Source, revision: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source.path, repo_type="dataset", revision=revision or None, allow_patterns=names
        )
    except Exception as error:  # as above; nothing is lost by trying again
        raise _unreachable(source, error) from None
    return Path(found)


def _unreachable(source: Source, error: Exception) -> CorpusError:
    reason = f"cannot be reached and is not whole in the local cache ({type(error).__name__})"
    return _refused(source, reason)


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
