"""What a hub shows of a cache that is pushed to it: rows that a person can read, and the card.

One idea: a hub's viewer opens Parquet, so the first examples are written again as text: tokens as
words, the teacher's first guesses, its entropy. They are for people alone: nothing reads them back,
and they are not part of the cache. A card that a person has edited keeps its words.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.hub_card import card_of
from stillroom.pipeline.record import TeacherRecord

FILE = "readable/data.parquet"
GUESSES = 5
"""Of the teacher, shown for every token."""
ROW_BYTES = 1_500_000
"""Of one row, at most; the hub's viewer takes 2 MB."""
ROWS_PER_GROUP = 20
LICENCE, LANGUAGE = r"[a-z0-9][a-z0-9.-]*", r"[a-z]{2,3}(-[A-Za-z0-9]+)*"

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


@dataclass(frozen=True, slots=True)
class About:
    """What a cache's own files do not say of it.

    Attributes:
        license: the hub's name of a licence; empty leaves `unknown`.
        languages: ISO 639 codes.
        source_datasets: hub ids of the data sets that its text is from.
    """

    license: str = ""
    languages: tuple[str, ...] = ()
    source_datasets: tuple[str, ...] = ()

    @property
    def says_nothing(self) -> bool:
        """Whether the card stays as it is."""
        return not (self.license or self.languages or self.source_datasets)

    def __post_init__(self):
        if self.license and not re.fullmatch(LICENCE, self.license):
            raise _unusable("--license", self.license, "the hub's name of one, such as apache-2.0")
        for code in self.languages:
            if not re.fullmatch(LANGUAGE, code):
                raise _unusable("--language", code, "an ISO 639 code, such as en")


def _unusable(option: str, found: str, expected: str) -> ConfigError:
    return ConfigError(f"'{found}'", expected=expected, where=option)


def published_card(readme: bytes, about: About, readable: bool) -> bytes:
    """A cache's README with what is said about it in front.

    Args:
        readme: as it lies in the cache; its words stay.
        about: replaces what stands there, where it says something.
        readable: rows that a person can read are pushed too, and shown first.

    Raises:
        CacheError: the README that is there cannot be read.
    """
    from huggingface_hub import DatasetCard

    card = card_of(DatasetCard, readme, "README.md of the cache")
    told = {
        "license": about.license,
        "language": list(about.languages),
        "source_datasets": list(about.source_datasets),
    }
    for key, value in told.items():
        if value:
            setattr(card.data, key, value)
    if readable:
        first = {"config_name": "readable", "data_files": FILE, "default": True}
        others = [one for one in card.data.get("configs") or [] if isinstance(one, dict)]
        without = [
            {k: v for k, v in one.items() if k != "default"}
            for one in others
            if one.get("config_name") != "readable"
        ]
        card.data.configs = [first, *without]
    return str(card).encode()


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
