"""The bytes of one example's row signals, in four profiles.

One idea: a codec is fitted once, is described by JSON facts and immutable tables named by their
hash, and then turns `dict of arrays` into bytes and back within a bound that is checked on write.
It stores no file and knows no layout; dense arrays (hidden states, images) are `codecs.py`.

Profiles: `exact` is lossless; `strict` bounds |delta logp| everywhere; `small` bounds the KL
divergence; `portable` has no record at all: its arrays are plain Arrow columns.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from cache_schemas import streams
from cache_schemas.errors import CacheError
from cache_schemas.signals import ROW_SIGNALS

Profile = Literal["small", "strict", "exact", "portable"]
Signals = dict[str, np.ndarray]

TOKENS = "token_ids"
"""Beside the row signals a record may hold the example's int32 [L] tokens under this name: they
cost half a byte each next to the top-k lists that predict them."""

NAMES = (*ROW_SIGNALS, TOKENS)


class RowCodec:
    """Encodes and decodes the row signals of one example.

    Args:
        profile: see the module.
        k: entries of `topk_ids`, at most.
        vocab_size: ids are `0 .. vocab_size - 1`.
        draws: entries of `draw_ids`, at most; 0 when there are none.
        temperatures: how many `lse` columns.
        tables: fitted arrays by name; empty for `exact`.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        k: int,
        vocab_size: int,
        draws: int = 0,
        temperatures: int = 1,
        tables: Mapping[str, np.ndarray] | None = None,
    ):
        self.profile, self.k, self.vocab_size = profile, k, vocab_size
        self.draws, self.temperatures = draws, temperatures
        self.tables = dict(tables or {})

    @classmethod
    def fit(cls, profile: Profile, samples: Iterable[Signals], **sizes: int) -> "RowCodec":
        """A codec for records like `samples` (dicts as given to `encode`); `sizes` as above."""
        return cls(profile, **sizes)

    def facts(self) -> dict[str, Any]:
        """What a reader needs to know, as JSON; tables appear by their digest."""
        sizes = {name: getattr(self, name) for name in ("k", "vocab_size", "draws", "temperatures")}
        digests = {name: table_digest(table) for name, table in sorted(self.tables.items())}
        return {
            "profile": self.profile,
            "record_version": streams.VERSION,
            **sizes,
            "tables": digests,
        }

    @classmethod
    def from_facts(
        cls, facts: Mapping[str, Any], tables: Mapping[str, np.ndarray] | None = None
    ) -> "RowCodec":
        """The codec that `facts` describe.

        Raises:
            ShardCorrupt: a table is missing or is not the one that the facts name.
            CacheError: the facts do not describe a codec.
        """
        if facts.get("profile") not in get_args(Profile):
            raise CacheError(f"unknown codec profile {facts.get('profile')!r}", where="codec facts")
        sizes = {name: int(facts[name]) for name in ("k", "vocab_size", "draws", "temperatures")}
        for name, digest in facts.get("tables", {}).items():
            found = table_digest(tables[name]) if tables and name in tables else "no table"
            if found != digest:
                streams.corrupt(f"table {name!r} is {found}", digest)
        return cls(facts["profile"], tables=tables, **sizes)

    def encode(self, signals: Signals) -> bytes:
        """Bytes of one record; any subset of `NAMES` may be given.

        Raises:
            CacheError: a value the profile cannot hold within its bound; names signal and row.
        """
        rows = next((len(v) for n, v in signals.items() if n != TOKENS), 0)
        tokens = len(signals[TOKENS]) if TOKENS in signals else 0
        packed = {NAMES.index(n): _exact(n, array) for n, array in signals.items()}
        return streams.pack(0, rows, tokens, packed)

    def decode(self, blob: bytes | memoryview, names: Collection[str] | None = None) -> Signals:
        """Arrays of one record: all, or those of `names` that it holds.

        Raises:
            ShardCorrupt: the bytes are not a record of this codec.
        """
        record = streams.unpack(blob)
        held = [n for i, n in enumerate(NAMES) if i in record.entries]
        return {n: self._array(record, n) for n in held if names is None or n in names}

    def _array(self, record: streams.Record, name: str) -> np.ndarray:
        if name == TOKENS:
            return record.stream(NAMES.index(name), record.tokens).astype(np.int32)
        widths = {"k": self.k, "draws": self.draws, "temperatures": self.temperatures}
        shape = (record.rows, *(widths[word] for word in ROW_SIGNALS[name].shape))
        flat = record.stream(NAMES.index(name), int(np.prod(shape)))
        return flat.view(ROW_SIGNALS[name].dtype).reshape(shape)


def table_digest(table: np.ndarray) -> str:
    """sha256 over dtype, shape and little-endian bytes of a table."""
    import hashlib

    head = f"{table.dtype.str}{table.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(table).tobytes()).hexdigest()


def _exact(name: str, array: np.ndarray) -> np.ndarray:
    dtype = "int32" if name == TOKENS else ROW_SIGNALS[name].dtype
    return np.asarray(array, dtype=dtype)
