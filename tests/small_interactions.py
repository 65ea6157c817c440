"""Made-up interactions for tests: users who like items of one kind, with readable titles."""

import json
from pathlib import Path

import numpy as np

KINDS = ("river", "engine", "letter", "window")


def lines(users: int = 24, items: int = 16, seed: int = 0) -> list[tuple[str, str, int, int]]:
    """(user, item, rating, time) in no order; most of a user's items are of one kind."""
    random = np.random.default_rng(seed)
    found = []
    for user in range(users):
        count = int(random.integers(6, 11))
        own = [i for i in range(items) if i % len(KINDS) == user % len(KINDS)]
        for time in range(count):
            item = int(random.choice(own)) if random.random() < 0.8 else int(random.integers(items))
            found.append(
                (f"u{user}", f"{item + 1}", int(random.integers(1, 6)), 1000 * user + time)
            )
    random.shuffle(found)
    return found


def titles(items: int = 16) -> list[tuple[str, str]]:
    """(item, title)."""
    return [(f"{i + 1}", f"The {KINDS[i % len(KINDS)]} of number {i + 1}") for i in range(items)]


def save(directory: Path, users: int = 24, items: int = 16, seed: int = 0) -> Path:
    """MovieLens' CSV layout; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [",".join(map(str, line)) for line in lines(users, items, seed)]
    (directory / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    named = [f'{item},"{title}",x' for item, title in titles(items)]
    (directory / "movies.csv").write_text("\n".join(["movieId,title,genres", *named]))
    return directory


def source(path: Path, **interactions) -> dict:
    """A [[prepare.source]] over it."""
    settings = {"k_core": 1, "history": 4} | interactions
    return {"name": "films", "kind": "interactions", "path": str(path), "interactions": settings}


def jsonl(path: Path, rows: list[dict]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
