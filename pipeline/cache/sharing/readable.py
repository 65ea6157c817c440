"""Rows of a cache that a person can read, for the viewer of a hub.

One idea: a hub's viewer opens Parquet, so the first examples are written again as text: tokens as
words, the teacher's first guesses, its entropy. They are for people alone: nothing reads them back,
and they are not part of the cache.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.pipeline.record import TeacherRecord

FILE = "readable/data.parquet"
GUESSES = 5
"""Of the teacher, shown for every token."""
ROW_BYTES = 1_500_000
"""Of one row, at most; the hub's viewer takes 2 MB."""
ROWS_PER_GROUP = 20

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("learned", pa.list_(pa.bool_())),
        ("guesses", pa.list_(pa.string())),
        ("entropy", pa.list_(pa.float32())),
        ("num_tokens", pa.int32()),
    ]
)
"""Lists have an item for every token that is shown: whether a student learns to say it, what the
teacher thought would stand there, and its entropy in nats; null where it was not asked."""

Decode = Callable[[Sequence[int]], str]


def readable_rows(records: Iterable[TeacherRecord], decode: Decode, count: int) -> bytes:
    """A Parquet file of the first examples of a cache.

    Args:
        records: in order, with row signals.
        decode: ids of tokens to text.
        count: examples, at most.
    """
    rows = [_row(number, one, decode) for number, one in enumerate(islice(records, count))]
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, file, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return file.getvalue()


def _row(number: int, record: TeacherRecord, decode: Decode) -> dict[str, Any]:
    example = record.example
    words = [decode([int(one)]) for one in example.token_ids]
    guesses, entropy = _guesses(record, decode), _entropy(record)
    sizes = [len(w.encode()) + len((g or "").encode()) + 16 for w, g in zip(words, guesses)]
    shown = int(np.searchsorted(np.cumsum(sizes), ROW_BYTES // 2))  # the text comes on top
    return {
        "number": number,
        "source": example.source,
        "text": decode([int(one) for one in example.token_ids[:shown]]),
        "tokens": words[:shown],
        "learned": example.loss_mask[:shown].tolist(),
        "guesses": guesses[:shown],
        "entropy": entropy[:shown],
        "num_tokens": len(example.token_ids),
    }


def _guesses(record: TeacherRecord, decode: Decode) -> list[str | None]:
    """What the teacher thought would stand at each token: `word 41% · word 12% ...`."""
    found: list[str | None] = [None] * len(record.example.token_ids)
    ids, logprobs = record.signals.get("topk_ids"), record.signals.get("topk_logprobs")
    if ids is None or logprobs is None:
        return found
    for row, (some, values) in enumerate(zip(ids[:, :GUESSES], logprobs[:, :GUESSES])):
        told = [
            f"{decode([int(one)])!r} {100 * np.exp(value):.0f}%"
            for one, value in zip(some, values)
            if one >= 0
        ]
        found[record.first_row + row + 1] = " · ".join(told)  # row t is about token t + 1
    return found


def _entropy(record: TeacherRecord) -> list[float | None]:
    found: list[float | None] = [None] * len(record.example.token_ids)
    values = record.signals.get("entropy", ())
    for row, value in enumerate(values):
        found[record.first_row + row + 1] = float(value)
    return found
