"""The bytes of one example's row signals, in four profiles.

One idea: a codec is fitted once, is described by JSON facts and immutable tables named by their
hash, and then turns `dict of arrays` into bytes and back within a bound that is checked on write.
It stores no file and knows no layout; dense arrays (hidden states, images) are `dense_codec.py`.

Profiles: `exact` is lossless; `strict` bounds |delta logp| everywhere; `small` bounds the KL
divergence; `portable` has no record at all: its arrays are plain Arrow columns.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from stillroom.cache_schemas import streams
from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.joined import Decoded, Joined, joined
from stillroom.cache_schemas.lists import Lists, RowError
from stillroom.cache_schemas.lossy_rows import LossyRows
from stillroom.cache_schemas.rankings import Rankings
from stillroom.cache_schemas.signals import ROW_SIGNALS
from stillroom.cache_schemas.topk_streams import PARAMETERS

Profile = Literal["small", "strict", "exact", "portable"]
Signals = dict[str, np.ndarray]

TOKENS = "token_ids"
"""Beside the row signals a record may hold the example's int32 [L] tokens under this name: they
cost half a byte each next to the top-k lists that predict them."""

NAMES = (*ROW_SIGNALS, TOKENS)
PROFILE_CODES = {"exact": 0, "small": 1, "strict": 2}
MEAN_KL = 1e-4
"""Mean KL divergence, in nats per row, that profile `small` may add; no row may add MAX_KL times
as much."""
MAX_KL = 3.0
MAX_LISTED = 1 << 24
"""Elements of the widest signal of a record, at most: 262,144 rows of 64 ids."""
JOINED_ELEMENTS = 1 << 20
"""Of the widest signal, in records that are decoded together."""


class RowCodec:
    """Encodes and decodes the row signals of one example.

    Args:
        profile: see the module.
        k: entries of `topk_ids`, at most.
        vocab_size: ids are `0 .. vocab_size - 1`.
        draws: entries of `draw_ids`, at most; 0 when there are none.
        temperatures: how many `lse` columns.
        mean_kl: budget of profile `small`, nats per row.
        codebook, tables: what `fit` found; `exact` and `portable` have none.
        nested: whether profile `portable` keeps a list for every row, as it does by now; its first
            caches have all rows in one.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        k: int,
        vocab_size: int,
        draws: int = 0,
        temperatures: int = 1,
        mean_kl: float = MEAN_KL,
        codebook: Codebook | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        nested: bool = True,
    ):
        self.nested = nested and profile == "portable"
        self.profile, self.k, self.vocab_size = profile, k, vocab_size
        self.draws, self.temperatures, self.mean_kl = draws, temperatures, mean_kl
        self.codebook, self.tables = codebook, dict(tables or {})
        self._lossy = self._lossy_rows() if profile in ("small", "strict") else None

    @classmethod
    def fit(
        cls,
        profile: Profile,
        samples: Iterable[Signals],
        *,
        k: int,
        vocab_size: int,
        draws: int = 0,
        temperatures: int = 1,
        mean_kl: float = MEAN_KL,
    ) -> "RowCodec":
        """A codec for records like `samples` (dicts as given to `encode`).

        It depends on nothing else: the same samples give the same tables, bit for bit. Any number
        of samples will do; more give smaller records.
        """
        sizes: dict[str, Any] = {"k": k, "vocab_size": vocab_size}
        sizes |= {"draws": draws, "temperatures": temperatures}
        if profile not in ("small", "strict"):
            return cls(profile, mean_kl=mean_kl, **sizes)
        samples = [s for s in samples if "topk_ids" in s and "topk_logprobs" in s]
        rankings = Rankings.fit(_predicted(samples, k), vocab_size)
        codebook = Codebook.strict() if profile == "strict" else Codebook.fit(samples, mean_kl)
        tables = rankings.tables()
        return cls(profile, mean_kl=mean_kl, codebook=codebook, tables=tables, **sizes)

    @property
    def rounds(self) -> bool:
        """Whether lists are rounded to levels."""
        return self._lossy is not None

    def facts(self) -> dict[str, Any]:
        """What a reader needs to know, as JSON; tables appear by their digest."""
        facts: dict[str, Any] = {"profile": self.profile, "record_version": streams.VERSION}
        facts |= {
            name: getattr(self, name) for name in ("k", "vocab_size", "draws", "temperatures")
        }
        if self.nested:
            facts["nested"] = True
        if self.codebook:
            facts |= {"codebook": self.codebook.facts(), "mean_kl": self.mean_kl}
        tables = {name: table_digest(table) for name, table in sorted(self.tables.items())}
        return {**facts, "tables": tables}

    @classmethod
    def from_facts(
        cls, facts: Mapping[str, Any], tables: Mapping[str, np.ndarray] | None = None
    ) -> "RowCodec":
        """The codec that `facts` describe.

        Raises:
            ShardCorrupt: a table is missing or is not the one that the facts name.
            CacheError: the facts do not describe a codec.
        """
        tables = tables or {}
        try:
            for name, digest in facts["tables"].items():
                found = table_digest(tables[name]) if name in tables else "missing"
                if found != digest:
                    streams.corrupt(f"table {name!r} is {found}", digest)
            used = {name: tables[name] for name in facts["tables"]}
            return cls(**_arguments(facts), tables=used)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(f"describe no codec ({error!r})", where="codec facts") from None

    def encode(self, signals: Signals) -> bytes:
        """Bytes of one record; any subset of `NAMES` may be given.

        Raises:
            CacheError: a value the profile cannot hold within its bound; names signal and row.
        """
        return self.encode_measured(signals)[0]

    def encode_measured(self, signals: Signals) -> tuple[bytes, RowError]:
        """`encode`, and what it changed."""
        arrays = self._checked(signals)
        self._check_length(max((len(array) for array in arrays.values()), default=0))
        rows = next((len(array) for name, array in arrays.items() if name != TOKENS), 0)
        tokens = len(arrays[TOKENS]) if TOKENS in arrays else 0
        parts, error = self._lossy.encode(arrays, rows) if self._lossy else ({}, RowError())
        parts |= {NAMES.index(name): array for name, array in arrays.items()}
        return streams.pack(PROFILE_CODES[self.profile], rows, tokens, parts), error

    def decode(
        self,
        blob: bytes | memoryview,
        names: Collection[str] | None = None,
        rows: int | None = None,
    ) -> Signals:
        """Arrays of one record: all, or those of `names` that it holds; `rows` if they are known.

        Raises:
            ShardCorrupt: the bytes are not a record of this codec.
        """
        record = self._record(blob)
        if rows is not None and record.rows != rows:
            streams.corrupt(f"{record.rows} rows", f"{rows}")
        return self._decoded(record, NAMES if names is None else names)

    def decode_many(self, blobs: Sequence[bytes | memoryview]) -> Iterator[Decoded]:
        """Everything in many records, decoded in groups, at a fraction of the cost of each alone.

        Raises:
            ShardCorrupt: one of them is not a record of this codec; `decode` tells which.
        """
        for places, record in joined(blobs, JOINED_ELEMENTS // self._widest, [PARAMETERS]):
            self._check(record.profile, int(max(record.rows_of.max(), record.tokens_of.max())))
            try:
                lists = self._lossy.lists(record) if self._lossy else None
            except (IndexError, ValueError) as error:
                streams.corrupt(f"its streams contradict each other ({error})")
            signals = self._decoded(record, NAMES, lists)
            yield Decoded(places, record.rows_of, record.tokens_of, signals, lists)

    def _decoded(
        self, record: streams.Record | Joined, wanted: Collection[str], lists: Lists | None = None
    ) -> Signals:
        held = [n for i, n in enumerate(NAMES) if i in record.entries and n in wanted]
        found = {n: self._exact(record, n) for n in held}
        if self._lossy:
            try:
                found |= self._lossy.decode(record, [n for n in wanted if n not in found], lists)
            except (IndexError, ValueError) as error:
                streams.corrupt(f"its streams contradict each other ({error})")
        return found

    def lists(self, blob: bytes | memoryview) -> tuple[Lists, Rankings]:
        """One record's top-k lists as they are coded: levels and classes beside ids and values.

        Raises:
            CacheError: the profile or the record codes no lists.
            ShardCorrupt: the bytes are not a record of this codec.
        """
        try:
            found = self._lossy.lists(self._record(blob)) if self._lossy else None
        except (IndexError, ValueError) as error:
            streams.corrupt(f"its streams contradict each other ({error})")
        if self._lossy is None or found is None:
            raise CacheError(
                f"profile '{self.profile}' codes no lists in this record",
                expected="topk_ids and topk_logprobs under profile 'small' or 'strict'",
                remedy="Read the signals themselves.",
            )
        return found, self._lossy.rankings

    def _record(self, blob: bytes | memoryview) -> streams.Record:
        record = streams.parse(blob)
        self._check(record.profile, max(record.rows, record.tokens))
        return record

    def _check_length(self, longest: int) -> None:
        if longest * self._widest > MAX_LISTED:
            raise CacheError(
                f"{longest} rows of {self._widest}",
                expected=f"at most {MAX_LISTED:,} entries in an example",
                where="record",
                remedy="Cut the text into shorter examples, or keep fewer ids.",
            )

    @property
    def _widest(self) -> int:
        return max(self.k, self.draws, self.temperatures, 1)

    def _check(self, profile: int, longest: int) -> None:
        if profile != PROFILE_CODES.get(self.profile):
            streams.corrupt(f"profile {profile}", f"{self.profile!r}")
        limit = MAX_LISTED // self._widest
        if longest > limit:
            streams.corrupt(f"{longest} rows or tokens", f"at most {limit}")

    def _exact(self, record: streams.Record | Joined, name: str) -> np.ndarray:
        if name == TOKENS:
            return record.stream(NAMES.index(name), _dtype(name), tokens=1)
        width = self.width(name)
        flat = record.stream(NAMES.index(name), _dtype(name), rows=int(np.prod(width)))
        return flat.reshape(record.rows, *width)

    def width(self, name: str) -> tuple[int, ...]:
        """Sizes of a row signal behind its rows."""
        widths = {"k": self.k, "draws": self.draws, "temperatures": self.temperatures}
        return tuple(widths[word] for word in ROW_SIGNALS[name].shape)

    def _checked(self, signals: Signals) -> Signals:
        """Arrays of the right dtype and width, in the order of `NAMES`."""
        if unknown := set(signals) - set(NAMES):
            raise ValueError(f"no such signals: {sorted(unknown)}")
        arrays = {n: np.asarray(signals[n], dtype=_dtype(n)) for n in NAMES if n in signals}
        for name, array in arrays.items():
            if array.shape[1:] != (() if name == TOKENS else self.width(name)):
                raise ValueError(f"{name} has shape {array.shape}")
        if len({len(array) for name, array in arrays.items() if name != TOKENS}) > 1:
            raise ValueError("row signals differ in their number of rows")
        return arrays

    def _lossy_rows(self) -> LossyRows:
        if self.codebook is None:
            raise ValueError(f"profile {self.profile!r} needs a codebook: use RowCodec.fit")
        rankings = Rankings(self.tables["lists"], self.tables["common"])
        if rankings.common.size != self.vocab_size:
            raise ValueError(f"table 'common' has {rankings.common.size} ids")
        max_kl = MAX_KL * self.mean_kl if self.profile == "small" else np.inf  # of one row
        sizes = {"k": self.k, "draws": self.draws, "temperatures": self.temperatures}
        return LossyRows(self.profile == "strict", self.codebook, rankings, max_kl, **sizes)


def _predicted(samples: list[Signals], k: int) -> np.ndarray:
    """int32 [R, n]: the ids that rankings are fitted to; the draws where there are no lists."""
    name = "topk_ids" if k else "draw_ids"
    return np.concatenate([s[name] for s in samples if name in s] or [np.empty((0, k), np.int32)])


def table_digest(table: np.ndarray) -> str:
    """sha256 over dtype, shape and little-endian bytes of a table."""
    head = f"{table.dtype.str}{table.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(table).tobytes()).hexdigest()


def _arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments out of facts, every value checked."""
    if facts["profile"] not in get_args(Profile):
        raise ValueError(f"profile {facts['profile']!r}")
    sizes = {name: facts[name] for name in ("k", "vocab_size", "draws", "temperatures")}
    for name, limit in (("k", 1 << 16), ("vocab_size", 1 << 24), ("draws", 1 << 16)):
        if not isinstance(sizes[name], int) or not 0 <= sizes[name] < limit:
            raise ValueError(f"{name} {sizes[name]!r}")
    if (nested := facts.get("nested", False)) not in (True, False):
        raise ValueError(f"nested {nested!r}")
    if "codebook" not in facts:
        return {"profile": facts["profile"], "nested": nested, **sizes}
    fitted = {"codebook": Codebook.from_facts(facts["codebook"]), "mean_kl": facts["mean_kl"]}
    return {"profile": facts["profile"], **sizes, **fitted}


def _dtype(name: str) -> str:
    return "int32" if name == TOKENS else ROW_SIGNALS[name].dtype
