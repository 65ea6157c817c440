"""A sealed cache published on the Hugging Face hub.

One idea: the hub takes commits, not files, so a push hands the directory to the hub's own uploader
(commits of many files, resumable, compared with hashes on arrival) and commits the manifest last:
a push that was cut off is an unsealed cache there, and the same push goes on. It does not read
from the hub: BucketStorage does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cache_schemas import layout
from stillroom.cache_schemas.errors import (
    CacheError,
    CacheIncomplete,
    ConfigError,
    ShardCorrupt,
    first_line,
)
from stillroom.cache_schemas.scrubbing import scrub
from stillroom.pipeline.cache import partial
from stillroom.pipeline.cache.card import README
from stillroom.pipeline.cache.care.verification import Progress, verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.sharing.copying import Copied, check_target, wanted
from stillroom.pipeline.cache.sharing.published_card import About, published_card
from stillroom.pipeline.cache.sharing.readable import FILE
from stillroom.pipeline.cache.storage.bucket import BucketStorage
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.storage.protocol import Storage

if TYPE_CHECKING:
    from huggingface_hub import HfUri

PROTOCOL = "hf://"
MOST_FILES = 10_000
"""Of one folder, by the hub's rules."""
NOTHING = About()
REFUSED = (401, 403, 404)
"""The hub's ways to say no rather than not now."""


def push(
    directory: Path,
    url: str,
    signals: list[str] | None = None,
    progress: Progress = lambda done, total: None,
    about: About = NOTHING,
    rows: bytes = b"",
) -> Copied:
    """Publish a sealed cache; a data set that does not exist yet is made, private. What people
    wrote on its card there stays.

    Args:
        directory: holds the cache.
        url: `hf://datasets/OWNER/NAME`, with `@REVISION` and `/FOLDER` behind it where wanted.
        signals: dense signals to publish (`logits` alone means none); None takes all.
        progress: of the check that comes first, in shards.
        about: what the card says besides.
        rows: a Parquet file for people, published with the cache and no part of it.

    Returns:
        All files of the published cache: the hub does not say which of them it had.

    Raises:
        CacheError: no such signal; no sealed cache; the hub refuses; a folder of more files than
            it takes; the cards here and there contradict each other.
        ConfigError: something is said of a folder, whose card the hub does not read.
        ShardCorrupt: a file is not what the manifest says; nothing has been sent.
        PlanMismatch: another cache lies there.
        CacheIncomplete: the connection failed; the same push again goes on.
    """
    source, place = DirectoryStorage(directory), _parsed(url)
    if about.told or rows:
        check_card_counts(url)
    cache = TeacherCache.open(source)
    dense = wanted(cache, signals)
    found = verify(source, progress)
    if found.problems:
        raise ShardCorrupt(
            f"does not verify ({found.problems[0]})",
            where=str(directory),
            remedy="Run `stillroom cache repair` on it before anybody gets a copy.",
        )
    _check_folders(directory)
    with _told(url):
        _make(place)
        target = BucketStorage(url)
        check_target(cache, target)
        return _upload(cache, directory, place, dense, _beside(cache, target, about, rows))


def check_card_counts(url: str) -> None:
    """Refuse to say something of a cache in a folder: a hub reads the card of the whole data set.

    Raises:
        ConfigError: the URL names a folder.
    """
    if folder := _parsed(url).path_in_repo:
        root = url.rstrip("/").removesuffix(f"/{folder}")
        raise ConfigError(
            f"the hub reads no card of a folder ('{folder}')",
            expected=f"{root}, whose card is that of the whole data set",
            where=url,
            remedy="Leave out --license, --language, --source-dataset and --tokenizer, and say it "
            f"in {README} of the data set.",
        )


def _beside(
    cache: TeacherCache, target: BucketStorage, about: About, rows: bytes
) -> dict[str, bytes]:
    """Path -> content of what is published with a cache and is no part of it."""
    found = {FILE: rows} if rows else {}
    has_rows = bool(rows) or target.size(FILE) is not None
    own, there = (_read(storage) for storage in (cache.storage, target))
    readme = published_card(cache.plan, own, there, about, has_rows, target.location)
    return found | ({README: readme} if readme else {})


def _read(storage: Storage) -> bytes | None:
    return storage.read(README) if storage.size(README) else None


def _check_folders(directory: Path) -> None:
    """Refuse what the hub would, before anything is sent."""
    counts = Counter(path.parent for path in directory.rglob("*") if path.is_file())
    for folder, count in counts.items():
        if count > MOST_FILES:
            raise CacheError(
                f"{count:,} files in one folder",
                expected=f"at most {MOST_FILES:,}, which is what the hub takes",
                where=str(folder),
                remedy="Run `stillroom cache reshard` with a larger --examples-per-shard.",
            )


def _upload(
    cache: TeacherCache,
    directory: Path,
    place: "HfUri",
    dense: list[str],
    beside: Mapping[str, bytes],
) -> Copied:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import filter_repo_objects

    left_out = [f"dense/{name}/*" for name in sorted(set(cache.form.dense) - set(dense))]
    left_out += [layout.DENSE_GROUP] * bool(left_out)
    ignored = [layout.MANIFEST, partial.PARTIAL, f"{layout.STAGING}/*", *left_out, *beside]
    HfApi().upload_folder(
        folder_path=directory,
        ignore_patterns=list(ignored),
        path_in_repo=place.path_in_repo,
        commit_message="Teacher cache: shards",
        **_repository(place),
    )
    last = {**beside, layout.MANIFEST: cache.storage.read(layout.MANIFEST)}
    if set(dense) != set(cache.plan.dense_signals):
        last[partial.PARTIAL] = partial.listing(dense)
    HfApi().create_commit(
        operations=[
            CommitOperationAdd(f"{place.path_in_repo}/{name}".lstrip("/"), data)
            for name, data in last.items()
        ],
        commit_message="Teacher cache: manifest",
        **_repository(place),
    )
    names = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
    files = list(filter_repo_objects(names, ignore_patterns=ignored))
    size = sum((directory / name).stat().st_size for name in files) + sum(map(len, last.values()))
    return Copied(len(files) + len(last), size, sorted(dense))


def _parsed(url: str) -> "HfUri":
    from huggingface_hub import parse_hf_uri

    try:
        return parse_hf_uri(url.rstrip("/"))
    except ValueError as error:
        raise CacheError(
            str(error), where=url, remedy="Write hf://datasets/OWNER/NAME[@REVISION][/FOLDER]."
        ) from None


def _repository(place: "HfUri") -> dict[str, Any]:
    return {"repo_id": place.id, "repo_type": place.type, "revision": place.revision}


def _make(place: "HfUri") -> None:
    """The repository, if it is not there; what is there keeps its visibility."""
    from huggingface_hub import HfApi

    api = HfApi()
    if not api.repo_exists(place.id, repo_type=place.type):
        api.create_repo(place.id, repo_type=place.type, private=True, exist_ok=True)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """The hub's failures in our words: refused (2), or not now (3)."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise CacheError(
            "the hub is switched off here", where=url, remedy="Unset HF_HUB_OFFLINE."
        ) from None
    except HfHubHTTPError as error:
        said = scrub(first_line(error))[:200]
        if error.response is not None and error.response.status_code in REFUSED:
            raise CacheError(
                f"may not be written ({said})",
                where=url,
                remedy="Log in with `hf auth login`, or set HF_TOKEN to one that may write there.",
            ) from None
        raise CacheIncomplete(f"cannot be written ({said})", where=url) from None
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {scrub(str(error))[:200]}"
        raise CacheIncomplete(f"cannot be written ({said})", where=url) from None
