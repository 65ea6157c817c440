"""MovieLens small out of a Debian package, as two CSV files in MovieLens' own layout.

One idea: apt fetches r-cran-dslabs, whose sha256 is pinned; of its files only one data frame is
read, by a reader of R's serialisation that knows numbers, text and lists, and nothing that could be
run. The data are GroupLens' and have terms of their own, which are shown before; they are never
copied out of the demo's directory.
"""

import bz2
import csv
import gzip
import lzma
import os
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CorpusError
from stillroom.stages.demos.teacher_wheel import check_sha256

PACKAGE = "r-cran-dslabs=0.7.4-1"
SHA256 = "c3f93382c44d4581de9561792a87b110cb239c70771cac5ad63fa0a259e71ef3"
TERMS = (
    "MovieLens small (ml-latest-small of October 2016) is GroupLens', University of Minnesota. In "
    "short, their terms are: for research; state or imply no endorsement by them; acknowledge the "
    "data in publications (Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4):19, 2015); "
    "pass it on, also transformed, only under these same terms; no commercial use without their "
    "permission; no warranty. In full: https://grouplens.org/datasets/movielens/"
)
FRAME = "movielens"
PREFIX = "usr/lib/R/site-library/dslabs/data/Rdata"
Say = Callable[[str], None]


def fetch_movielens(directory: Path, say: Say = print) -> Path:
    """`ratings.csv` and `movies.csv`; made on the first call, only found on later ones.

    Raises:
        CorpusError: apt cannot fetch the package, or it is not the one that was checked.
    """
    if (directory / "movies.csv").exists():
        return directory
    say(TERMS)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetching-") as scratch:
        say(f"downloading {PACKAGE} (Artistic-2.0, without the data) with apt")
        frame = read_frame(_unpacked(Path(scratch)))
        made = Path(scratch, "made")
        made.mkdir()
        write_csv(frame, made)
        os.rename(made, directory)
    return directory


def write_csv(frame: dict[str, list], directory: Path) -> None:
    """A data frame of ratings as MovieLens' own two files."""
    names = ("userId", "movieId", "rating", "timestamp")
    with (directory / "ratings.csv").open("w", newline="") as file:
        rows = zip(*(frame[name] for name in names))
        csv.writer(file).writerows([names, *((u, m, r, int(t)) for u, m, r, t in rows)])
    films = {
        movie: (_title(title, year), genres)
        for movie, title, year, genres in zip(
            *(frame[name] for name in ("movieId", "title", "year", "genres"))
        )
    }
    with (directory / "movies.csv").open("w", newline="", encoding="utf-8") as file:
        lines = [(movie, *films[movie]) for movie in sorted(films)]
        csv.writer(file).writerows([("movieId", "title", "genres"), *lines])


def read_frame(prefix: Path) -> dict[str, list]:
    """The columns of the data frame in a package's lazy-load database."""
    index = read_r(gzip.decompress(prefix.with_suffix(".rdx").read_bytes()))
    offset, length = (int(v) for v in index["variables"][FRAME])
    chunk = prefix.with_suffix(".rdb").read_bytes()[offset : offset + length]
    return read_r(_inflate(chunk))


def _title(title: str | None, year: int | None) -> str:
    """As MovieLens writes it; a film without a title stays without one."""
    return f"{title} ({year})" if title and year else title or ""


def _unpacked(scratch: Path) -> Path:
    """Path of the database, without its suffix."""
    try:
        _run(["apt-get", "download", PACKAGE], scratch)
    except CorpusError:  # fresh images come without lists of packages
        _run(["apt-get", "update"], scratch)
        _run(["apt-get", "download", PACKAGE], scratch)
    (package,) = scratch.glob("*.deb")
    check_sha256(package, SHA256, "sha256", package.name)
    _run(["dpkg-deb", "-x", package.name, "files"], scratch)
    return scratch / "files" / PREFIX


def _run(command: list[str], scratch: Path) -> None:
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        failed = done.returncode != 0
    except FileNotFoundError:
        said, failed = "there is no such program", True
    if failed:
        raise CorpusError(
            f"{command[0]}: {said}",
            where=PACKAGE,
            remedy="On Debian run `apt-get update`; elsewhere put MovieLens' own ratings.csv and "
            "movies.csv into the directory that the run file names.",
        )


def _inflate(chunk: bytes) -> bytes:
    """A record of an .rdb file: length, and bytes packed in one of three ways."""
    kind = chunk[4:5]
    if kind == b"2":
        return bz2.decompress(chunk[5:])
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(chunk[5:], format=lzma.FORMAT_RAW, filters=filters)
    return zlib.decompress(chunk[4:])


def read_r(data: bytes) -> Any:
    """What R's `serialize` wrote in XDR form: numbers, text, factors and lists.

    Raises:
        CorpusError: it holds anything else.
    """
    if data[:2] != b"X\n":
        raise CorpusError("is not R's XDR serialisation", where=PACKAGE)
    return _Reader(data).document()


class _Reader:
    """Walks the bytes once."""

    def __init__(self, data: bytes):
        self._data, self._at, self._seen = data, 2, []

    def document(self) -> Any:
        version, _, _ = self._ints(3)
        if version == 3:
            self._bytes(self._ints(1)[0])
        return self._item()

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        return self._data[start : self._at]

    def _ints(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._bytes(4 * count))

    def _item(self) -> Any:
        flags = self._ints(1)[0]
        kind = flags & 0xFF
        if kind in (254, 242, 253, 251):  # NULL and the environments that have no content
            return None
        if kind == 255:
            return self._seen[(flags >> 8) - 1]
        if kind == 1:
            self._seen.append(self._item())
            return self._seen[-1]
        if kind == 2:
            return self._pairs(flags)
        if kind == 238:
            return self._compact()
        return self._vector(kind, flags)

    def _vector(self, kind: int, flags: int) -> Any:
        size = self._ints(1)[0]
        if kind == 9:
            return None if size < 0 else self._bytes(size).decode("utf-8", "replace")
        readers: dict[int, Callable[[], list]] = {
            10: lambda: list(self._ints(size)),
            13: lambda: [None if v == -(2**31) else v for v in self._ints(size)],
            14: lambda: list(struct.unpack(f">{size}d", self._bytes(8 * size))),
            16: lambda: [self._item() for _ in range(size)],
            19: lambda: [self._item() for _ in range(size)],
        }
        if kind not in readers:
            raise CorpusError(f"holds an R object of type {kind}", where=PACKAGE)
        values = readers[kind]()
        attributes = self._item() if flags & 0x200 else {}
        return _named(values, attributes)

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A pairlist as a dictionary; what has no tag is numbered."""
        found: dict[str, Any] = {}
        while flags & 0xFF == 2:
            if flags & 0x200:
                self._item()
            tag = self._item() if flags & 0x400 else str(len(found))
            found[tag] = self._item()
            flags = self._ints(1)[0]
        return found

    def _compact(self) -> Any:
        """ALTREP: a whole-number range, or something wrapped."""
        info, state, _ = self._item(), self._item(), self._item()
        if info["0"] == "compact_intseq":
            count, first, step = state
            return [int(first + step * i) for i in range(int(count))]
        return state[0] if isinstance(state, list) else state["0"]


def _named(values: list, attributes: dict[str, Any]) -> Any:
    if "levels" in attributes:
        levels = attributes["levels"]
        return [None if v is None else levels[v - 1] for v in values]
    if "names" in attributes:
        return dict(zip(attributes["names"], values))
    return values
