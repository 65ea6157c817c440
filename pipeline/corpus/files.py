"""A prepared corpus on disk: two Arrow files and one JSON file.

One idea: Arrow IPC without compression is read by memory map, so a corpus of any size opens at
once and an example costs its own bytes. `corpus.json` is written last; without it there is no
corpus.

    corpus/
      corpus.json      facts: digest, tokenizer, settings, sources, counts
      train.arrow      one row per example
      heldout.arrow
      images/ab/abcd…  image bytes named by their sha256 (only for image-text sources)
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.record import Example, ImageSpan

SPLITS = ("train", "heldout")
FACTS = "corpus.json"
FORMAT_VERSION = 1
EXAMPLES_PER_BATCH = 256
IMAGE = pa.struct([("sha256", pa.string()), ("start", pa.int32()), ("length", pa.int32())])
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("document_id", pa.string()),
        ("source", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("images", pa.list_(IMAGE)),
        ("weight", pa.float32()),
        ("behaviour_logprob", pa.list_(pa.float32())),
        ("teacher_prompt", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, memory-mapped.

    Attributes:
        directory: where it is.
        facts: JSON: digest, tokenizer, settings, sources, counts per split.
    """

    directory: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path) -> "Corpus":
        """Open a finished corpus.

        Raises:
            CorpusError: there is none, or it is damaged, or a newer release made it.
        """
        path = Path(directory, FACTS)
        try:
            facts = json.loads(path.read_text())
            version = facts["format_version"]
        except FileNotFoundError:
            raise CorpusError(
                "no prepared corpus",
                where=str(directory),
                remedy="Run `stillroom prepare` first; `train` and `evaluate` also read one that "
                "lies elsewhere, by `corpus` in their tables.",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
        if version != FORMAT_VERSION:
            raise CorpusError(
                f"format version {version}", expected=f"version {FORMAT_VERSION}", where=str(path)
            )
        return cls(Path(directory), facts)

    @property
    def digest(self) -> str:
        """sha256 over every example id in order, the tokenizer and the preparation settings."""
        return self.facts["digest"]

    def split(self, name: str) -> "Split":
        """The examples of `"train"` or `"heldout"`, lazily."""
        if name not in SPLITS:
            raise ValueError(f"split {name!r} is not one of {SPLITS}")
        return self._splits[name]

    def image_bytes(self, sha256: str) -> bytes:
        """The bytes of an image of this corpus, as they were in its source."""
        return (self.directory / "images" / sha256[:2] / sha256).read_bytes()

    @cached_property
    def _splits(self) -> dict[str, "Split"]:
        return {name: Split.open(self.directory / f"{name}.arrow") for name in SPLITS}


class Split(Sequence[Example]):
    """Examples in order; a slice is another lazy view, an index reads one example."""

    def __init__(self, batches: list[pa.RecordBatch], rows: range):
        self._batches, self._rows = batches, rows
        # The first row of each batch, and the number of rows.
        self._starts = np.cumsum([0] + [batch.num_rows for batch in batches])

    @classmethod
    def open(cls, path: Path) -> "Split":
        """Map an Arrow file of examples."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(path, error) from None
        return cls(batches, range(sum(batch.num_rows for batch in batches)))

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> list[str]:
        """The example ids, without reading anything else."""
        columns = (batch.column("example_id").to_pylist() for batch in self._batches)
        every = list(chain.from_iterable(columns))
        return [every[row] for row in self._rows]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Split": ...
    def __getitem__(self, index: int | slice) -> "Example | Split":
        if isinstance(index, slice):
            return Split(self._batches, self._rows[index])
        return self._read(self._rows[index])

    def sizes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Per batch and source of a whole split: the source, and the tokens of each example."""
        for batch in self._batches:
            lengths = batch.column("token_ids").value_lengths().to_numpy()
            names = np.asarray(batch.column("source").to_pylist())
            for name in np.unique(names):
                yield str(name), lengths[names == name]

    def _read(self, row: int) -> Example:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return _example(self._batches[batch], row - int(self._starts[batch]))


class ExampleFile:
    """Writes examples to an Arrow file, a batch at a time; use it as a context manager."""

    def __init__(self, path: Path):
        self._path, self._pending = path, list[Example]()

    def __enter__(self) -> "ExampleFile":
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def __exit__(self, *failure) -> None:
        if not failure[0]:
            self._flush()
        self._writer.close()
        self._sink.close()

    def write(self, example: Example) -> None:
        """Add one example."""
        self._pending.append(example)
        if len(self._pending) == EXAMPLES_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(_batch(self._pending))
            self._pending = []


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write `corpus.json`, the last file of a corpus."""
    text = json.dumps({"format_version": FORMAT_VERSION} | facts, indent=2, sort_keys=True)
    with (directory / FACTS).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_examples(path: Path) -> Iterator[Example]:
    """All examples of an Arrow file, in order; a batch at a time is in memory.

    Raises:
        CorpusError: it is damaged.
    """
    try:
        with pa.OSFile(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            for batch in batches:
                yield from (_example(batch, row) for row in range(batch.num_rows))
    except pa.ArrowInvalid as error:
        raise _damaged(path, error) from None


def _batch(examples: list[Example]) -> pa.RecordBatch:
    """Examples as columns."""
    columns = {
        "example_id": [example.example_id for example in examples],
        "document_id": [example.document_id for example in examples],
        "source": [example.source for example in examples],
        "token_ids": _lists([example.token_ids for example in examples], pa.int32()),
        "loss_mask": _lists([example.loss_mask for example in examples], pa.bool_()),
        "images": [[asdict(image) for image in example.images] for example in examples],
        "weight": [example.weight for example in examples],
        "behaviour_logprob": [example.behaviour_logprob for example in examples],
        "teacher_prompt": [example.teacher_prompt for example in examples],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """Arrays of any lengths as one column; several times faster than from rows."""
    ends = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(arrays), kind))


def _example(batch: pa.RecordBatch, row: int) -> Example:
    text = {name: batch.column(name)[row].as_py() for name in SCHEMA.names[:3]}
    return Example(
        **text,
        # A copy: torch warns about the read-only pages of a memory map.
        token_ids=batch.column("token_ids")[row].values.to_numpy().copy(),
        loss_mask=batch.column("loss_mask")[row].values.to_numpy(zero_copy_only=False),
        images=_images(batch.column("images")[row].as_py()),
        weight=batch.column("weight")[row].as_py(),
        behaviour_logprob=_numbers(batch, "behaviour_logprob", row),
        teacher_prompt=_numbers(batch, "teacher_prompt", row),
    )


def _numbers(batch: pa.RecordBatch, name: str, row: int) -> np.ndarray | None:
    """A list of numbers; None where there is none, as in corpora that no model wrote."""
    if name not in batch.schema.names or not batch.column(name)[row].is_valid:
        return None
    return batch.column(name)[row].values.to_numpy()


def _images(found: Iterable[dict[str, Any]]) -> tuple[ImageSpan, ...]:
    return tuple(ImageSpan(**image) for image in found)


def _damaged(path: Path, error: Exception) -> CorpusError:
    return CorpusError(
        f"is damaged ({error})", where=str(path), remedy="Run `stillroom prepare` again."
    )
