"""A catalogue and everybody's history on disk, beside the examples of a prepared corpus.

One idea: items are numbered by their place in a catalogue that is sorted by item id and named by a
digest over ids, titles and texts; whoever keeps a place keeps that digest too. A user is one
sequence in the order of time; which rows are for training, validation and test follows from the
place in it (leave one out): the last item is the test's, the last but one the validation's.

    corpus/
      catalogue.arrow   item_id, title, text
      items.arrow       one Example per item: its text, and one token that ends it
      sequences.arrow   user, items (places), example_ids (what the teacher is asked before each)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas.errors import CorpusError, PlanMismatch
from stillroom.pipeline.corpus.files import Corpus, Split

CATALOGUE, ITEMS, SEQUENCES = "catalogue.arrow", "items.arrow", "sequences.arrow"
Part = Literal["train", "validation", "test"]
SEQUENCE_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("items", pa.large_list(pa.int32())),
        ("example_ids", pa.large_list(pa.string())),
    ]
)


@dataclass(frozen=True)
class Catalogue:
    """The items of a corpus, in the order of their ids.

    Attributes:
        item_ids, titles, texts: one entry per item.
    """

    item_ids: list[str]
    titles: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.item_ids)

    def key(self, place: int) -> str:
        """32 hex digits over everything that is known of an item."""
        content = "\0".join((self.item_ids[place], self.titles[place], self.texts[place]))
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @property
    def facts(self) -> dict[str, Any]:
        """`digest` over all keys in order, and how many `items` there are."""
        digest = hashlib.sha256("\n".join(map(self.key, range(len(self)))).encode())
        return {"digest": digest.hexdigest(), "items": len(self)}

    def write(self, directory: Path) -> None:
        """Write `catalogue.arrow`."""
        columns = {"item_id": self.item_ids, "title": self.titles, "text": self.texts}
        write_table(directory / CATALOGUE, pa.table(columns))


@dataclass(frozen=True)
class Histories:
    """Everybody's sequence.

    Attributes:
        users: one name per sequence.
        offsets: int64 [U + 1]; sequence u is `items[offsets[u] : offsets[u + 1]]`.
        items: int32 [N], places in the catalogue, oldest first.
        example_ids: of the question before each item; "" where none was prepared.
    """

    users: list[str]
    offsets: np.ndarray
    items: np.ndarray
    example_ids: pa.Array

    def rows(self, part: Part) -> np.ndarray:
        """int64 [R]: where in `items` the targets of one part are.

        `train`: every item but the first and the last two of a sequence; `validation`: the last but
        one; `test`: the last.
        """
        if part == "test":
            return self.offsets[1:] - 1
        if part == "validation":
            return self.offsets[1:] - 2
        inside = np.ones(len(self.items), dtype=bool)
        for left_out in (self.offsets[:-1], self.rows("validation"), self.rows("test")):
            inside[left_out] = False
        return np.flatnonzero(inside)

    def training_counts(self, items: int) -> np.ndarray:
        """int64 [items]: how often each is taken in training, as the first of a history too."""
        kept = np.ones(len(self.items), dtype=bool)
        kept[self.rows("validation")] = kept[self.rows("test")] = False
        return np.bincount(self.items[kept], minlength=items)

    def owners(self, rows: np.ndarray) -> np.ndarray:
        """int64 [R]: the sequence that each row is in."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def windows(self, rows: np.ndarray, length: int, padding: int) -> np.ndarray:
        """int64 [R, length]: the items before each row, latest last, padded on the left."""
        places = rows[:, None] - np.arange(length, 0, -1)
        inside = places >= self.offsets[self.owners(rows)][:, None]
        return np.where(inside, self.items[np.maximum(places, 0)], padding).astype(np.int64)

    def seen(self, row: int) -> np.ndarray:
        """Everything that its user took before a row."""
        return self.items[self.offsets[self.owners(np.array([row]))[0]] : row]

    def write(self, directory: Path) -> None:
        """Write `sequences.arrow`."""
        offsets = pa.array(self.offsets, pa.int64())
        columns = [
            pa.array(self.users, pa.string()),
            pa.LargeListArray.from_arrays(offsets, pa.array(self.items, pa.int32())),
            pa.LargeListArray.from_arrays(offsets, self.example_ids),
        ]
        write_table(directory / SEQUENCES, pa.table(columns, schema=SEQUENCE_SCHEMA))


def open_catalogue(corpus: Corpus) -> Catalogue:
    """The catalogue of a corpus.

    Raises:
        CorpusError: it has none, or its file was changed.
    """
    table = _read(corpus, CATALOGUE)
    columns = (table.column(name).to_pylist() for name in ("item_id", "title", "text"))
    catalogue = Catalogue(*columns)
    check_catalogue(corpus.facts["catalogue"], catalogue.facts, str(corpus.directory))
    return catalogue


def open_histories(corpus: Corpus) -> Histories:
    """The sequences of a corpus.

    Raises:
        CorpusError: it has none.
    """
    table = _read(corpus, SEQUENCES).combine_chunks()
    items, ids = (table.column(name).combine_chunks() for name in ("items", "example_ids"))
    return Histories(
        table.column("user").to_pylist(),
        items.offsets.to_numpy(),
        items.values.to_numpy(),
        ids.values,
    )


def open_items(corpus: Corpus) -> Split:
    """One example per item, in the catalogue's order."""
    _require(corpus)
    return Split.open(corpus.directory / ITEMS)


def check_catalogue(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Refuse numbers that are places in another catalogue.

    Args:
        found, expected: `Catalogue.facts`; `expected` is of the corpus at hand.

    Raises:
        PlanMismatch: they differ.
    """
    if found != expected:
        raise PlanMismatch(
            f"was made with a catalogue of {found['items']} items, {found['digest'][:12]}",
            expected=f"{expected['items']} items, {expected['digest'][:12]}, as in the corpus",
            where=where,
            remedy="The catalogue has changed since: capture (or train) again in a new directory, "
            "or prepare the corpus from the old catalogue.",
        )


def write_table(path: Path, table: pa.Table) -> None:
    """An Arrow file without compression."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read(corpus: Corpus, name: str) -> pa.Table:
    _require(corpus)
    path = corpus.directory / name
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        found = f"is damaged ({error})"
        raise CorpusError(found, where=str(path), remedy="Run `stillroom prepare` again.") from None


def _require(corpus: Corpus) -> None:
    if "catalogue" not in corpus.facts:
        raise CorpusError(
            "the corpus has no catalogue",
            where=str(corpus.directory),
            remedy="Prepare it from a source of kind 'interactions'.",
        )
