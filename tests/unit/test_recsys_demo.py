"""The parts of the recommender demo that need no teacher: R's bytes, made-up data, the tables."""

import gzip
import itertools
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache_schemas.errors import CorpusError
from stillroom.stages.demos import movielens
from stillroom.stages.demos import recsys_synthetic as made
from stillroom.stages.demos.movielens import read_frame, read_r, write_csv
from stillroom.stages.demos.recsys_findings import draw, findings, paired, rows_of

HEAD = b"X\n" + struct.pack(">iii", 2, 0x40100, 0x20300)


def text(value: str) -> bytes:
    return struct.pack(">ii", 9 | 0x40000, len(value.encode())) + value.encode()


def strings(*values: str) -> bytes:
    return struct.pack(">ii", 16, len(values)) + b"".join(map(text, values))


def ints(*values: int, attributes: bytes = b"") -> bytes:
    flags = 13 | (0x200 if attributes else 0)
    return (
        struct.pack(">ii", flags, len(values))
        + struct.pack(f">{len(values)}i", *values)
        + attributes
    )


def doubles(*values: float) -> bytes:
    return struct.pack(">ii", 14, len(values)) + struct.pack(f">{len(values)}d", *values)


def tagged(name: str, value: bytes) -> bytes:
    """A pairlist of one entry."""
    symbol = struct.pack(">i", 1) + text(name)
    return struct.pack(">i", 2 | 0x400) + symbol + value + struct.pack(">i", 254)


def named_list(**columns: bytes) -> bytes:
    body = struct.pack(">ii", 19 | 0x200, len(columns)) + b"".join(columns.values())
    return body + tagged("names", strings(*columns))


def frame() -> bytes:
    factor = ints(2, 1, -(2**31), attributes=tagged("levels", strings("Comedy", "Drama")))
    return HEAD + named_list(
        userId=ints(1, 1, 2),
        movieId=ints(5, 6, 5),
        rating=doubles(2.5, 4.0, 5.0),
        timestamp=ints(10, 20, 30),
        title=strings("Café", "Alien", "Café"),
        year=ints(1999, -(2**31), 1999),
        genres=factor,
    )


def test_a_data_frame_of_rs_becomes_movielens_files(tmp_path):
    data = frame()
    packed = struct.pack(">I", len(data)) + zlib.compress(data)
    (tmp_path / "Rdata.rdb").write_bytes(b"junk" + packed)
    index = HEAD + named_list(variables=named_list(movielens=ints(4, len(packed))))
    (tmp_path / "Rdata.rdx").write_bytes(gzip.compress(index))
    found = read_frame(tmp_path / "Rdata")
    assert found["genres"] == ["Drama", "Comedy", None]
    write_csv(found, tmp_path)
    assert (tmp_path / "ratings.csv").read_text().splitlines() == [
        "userId,movieId,rating,timestamp",
        "1,5,2.5,10",
        "1,6,4.0,20",
        "2,5,5.0,30",
    ]
    films = (tmp_path / "movies.csv").read_text(encoding="utf-8").splitlines()
    assert films[1:] == ["5,Café (1999),", "6,Alien,Comedy"]


PROGRAMS = {
    # Without lists of packages, as fresh images are; the second time they are there.
    "apt-get": """case $1 in
update) touch "$LISTS" ;;
download) test -e "$LISTS" && echo archive > "some_1_all.deb" ;;
esac""",
    "dpkg-deb": 'test -f "$2" && mkdir "$3" && echo "$2" > "$3/found"',
}


def test_the_package_is_fetched_into_a_directory_named_from_here(tmp_path, monkeypatch):
    """`directory` of the demo's run file is relative; the programs run in another directory."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, lines in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("LISTS", str(tmp_path / "lists"))
    monkeypatch.setattr(movielens, "check_sha256", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    found = movielens._unpacked(Path("."))
    assert found == Path("files", movielens.PREFIX)
    (tmp_path / "elsewhere").mkdir()
    movielens._unpacked(Path("elsewhere"))
    assert (tmp_path / "elsewhere" / "files" / "found").read_text() == "some_1_all.deb\n"


def test_what_could_be_run_is_not_read():
    with pytest.raises(CorpusError, match="type 3"):
        read_r(HEAD + struct.pack(">ii", 3, 0))
    with pytest.raises(CorpusError, match="XDR"):
        read_r(b"A\n")


def test_made_up_users_follow_the_rule_about_as_often_as_said(tmp_path):
    lines = (made.write_files(tmp_path) / "ratings.csv").read_text().splitlines()[1:]
    rows = [[int(v) for v in line.split(",")] for line in lines]
    steps = [(a[1] - 1, b[1] - 1) for a, b in itertools.pairwise(rows) if a[0] == b[0]]
    kept = np.mean([b // made.SIZE == made.follow(a // made.SIZE) for a, b in steps])
    expected = made.STAYS + (1 - made.STAYS) / made.CLUSTERS
    assert abs(kept - expected) < 4 * math.sqrt(expected * (1 - expected) / len(steps))
    assert len({made.follow(cluster) for cluster in range(made.CLUSTERS)}) == made.CLUSTERS


def test_spoilt_lists_are_wrong_as_often_as_said_and_their_distances_tell():
    random = np.random.default_rng(0)
    right = list(range(10))
    lists = [made._spoilt(random, right, 240, reliable=False) for _ in range(2000)]
    good = np.array([[item in right for item in ids] for ids, _ in lists])
    expected = (1 - made.UNRELIABLE) * (1 - made.WRONG)
    assert abs(good.mean() - expected) < 0.02
    assert abs((~good.any(axis=1)).mean() - made.UNRELIABLE) < 0.04
    far = np.array([distances for _, distances in lists])
    assert (np.diff(far, axis=1) >= 0).all()
    assert far[good].mean() < 1 < 2 < far[~good].mean()
    ids, _ = made._spoilt(random, right, 240, reliable=True)
    assert ids.tolist() == right


def test_differences_are_paired_by_seed(tmp_path):
    arms = {
        "none": {"hr10": [0.1, 0.2], "ndcg10": [0.1, 0.3]},
        "all": {"hr10": [0.2, 0.3], "ndcg10": [0.2, 0.4]},
    }
    mean, error = paired(arms["all"]["ndcg10"], arms["none"]["ndcg10"])
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
    assert rows_of(arms)[1][-1] == "+0.1000 ± 0.0000"
    one = {name: {key: value[:1] for key, value in arm.items()} for name, arm in arms.items()}
    assert rows_of(one)[1][-1] == "+0.1000"  # one seed has no error
    teacher = {"hr10": 0.0, "ndcg10": 0.0}
    results = {"teacher": teacher, "popular": teacher, "arms": arms}
    assert "| all | 2 |" in findings(results)
    lists = {"teacher": teacher, "perfect": teacher}
    results["synthetic"] = {"arms": arms, "lists": lists}
    assert draw(results, tmp_path / "arms.png").stat().st_size > 1000
