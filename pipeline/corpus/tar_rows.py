"""Samples of WebDataset tars: members whose names differ only in their endings are one row.

One idea: a tar is read front to back, one sample in memory at a time. JSON members give the row its
columns, texts and pictures are columns of their own.
"""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.corpus.characters import decode
from stillroom.pipeline.corpus.compression import DAMAGE, open_bytes
from stillroom.pipeline.corpus.documents import Rejected, Row, first_words
from stillroom.pipeline.corpus.json_rows import as_object
from stillroom.pipeline.images import SUFFIXES as IMAGES

TEXTS = (".txt", ".text", ".caption")
MOVING = {"video": (".mp4", ".webm", ".mkv", ".avi", ".mov"), "audio": (".wav", ".mp3", ".flac")}


def read_tar(path: Path) -> Iterator[Row | Rejected]:
    """Rows of a WebDataset shard."""
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            members = (member for member in tar if member.isfile() and not _hidden(member.name))
            for key, sample in groupby(members, lambda member: _split(member.name)[0]):
                yield _row(tar, key, sample, path)
    except (tarfile.TarError, *DAMAGE) as error:
        found = f"cannot be read to its end as a tar ({error})"
        yield Rejected(CorpusError(found, where=str(path), remedy="Get the file again."))


def _row(tar: tarfile.TarFile, key: str, sample: Iterator[Any], path: Path) -> Row | Rejected:
    where = f"{path} sample {key}"
    values: dict[str, Any] = {}
    try:
        for member in sample:
            ending = _split(member.name)[1]
            with _content(tar, member) as file:
                _put(values, ending, file.read(), where)
        return Row(where, values, path.parent)
    except CorpusError as error:
        for _ in sample:
            """The rest of the sample is passed over."""
        return Rejected(error, first_words(values))


def _put(values: dict[str, Any], ending: str, data: bytes, where: str) -> None:
    if ending in IMAGES:
        values.setdefault("image", []).append(data)
    elif ending == ".json":
        values |= as_object(decode(data, where), where)
    elif ending in TEXTS:
        if "text" in values:
            raise CorpusError(f"has a second text ({ending})", expected="one", where=where)
        values["text"] = decode(data, where).strip()
    else:
        kind = next((kind for kind, ends in MOVING.items() if ending in ends), ending.strip("."))
        values[kind] = ending.strip(".")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    file: BinaryIO | Any = tar.extractfile(member)
    return file


def _split(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` is sample `a/b`, ending `.jpg`: WebDataset's own rule is the first dot."""
    folder, _, file = name.rpartition("/")
    key, _, _ = file.partition(".")
    return f"{folder}/{key}" if folder else key, Path(file).suffix.lower()


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
