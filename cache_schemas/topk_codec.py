"""Top-k rows as a numcodecs codec, for anyone who keeps them in an array of their own.

One idea: a row is k + 1 pairs of id and log-probability, the last being the tail's, so lists are an
ordinary structured array; the bytes are those of `RowCodec`, whose tables travel in the codec's
configuration. Caches do not use it: they keep tables once, and tokens and scalars beside the lists.
"""

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy
from numcodecs.registry import register_codec

from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.record_codec import MEAN_KL, Profile, RowCodec

PAIR = np.dtype([("id", "<i4"), ("logprob", "<f4")])
CODEC_ID = "stillroom.topk"
MAX_TABLE_BYTES = 1 << 28


class TopkRows(Codec):
    """Codec of arrays of dtype `PAIR` and shape [R, k + 1].

    The first k columns of a row are its list by falling probability (id -1, log-probability -inf
    pad it); in the last, the log-probability is that of the mass outside and the id is -1. Ids come
    back exactly, in the order of their ranks where log-probabilities are equal; log-probabilities
    within the profile's bound (FORMAT.md, section 6).

    Args:
        facts: of a `RowCodec`.
        tables: its tables, as `get_config` gives them.
    """

    codec_id = CODEC_ID

    def __init__(self, facts: Mapping[str, Any], tables: Mapping[str, Any] | None = None):
        packed = dict(tables or {})
        try:
            unpacked = {name: _unpacked(**table) for name, table in packed.items()}
        except (TypeError, ValueError, zlib.error) as error:
            raise CacheError(f"a table that is none ({error!r})", where=CODEC_ID) from None
        self._config = {"id": CODEC_ID, "facts": dict(facts), "tables": packed}
        self._rows = RowCodec.from_facts(facts, unpacked)

    @classmethod
    def fit(
        cls, profile: Profile, rows: np.ndarray, vocab_size: int, mean_kl: float = MEAN_KL
    ) -> Self:
        """A codec for arrays like `rows` [R, k + 1].

        Args:
            profile: `small`, `strict` or `exact`.
            vocab_size: ids are below it.
            mean_kl: budget of `small`, nats per row.
        """
        k = rows.shape[1] - 1
        fitted = RowCodec.fit(
            profile, [_signals(rows)], k=k, vocab_size=vocab_size, mean_kl=mean_kl
        )
        return cls(fitted.facts(), {name: _packed(t) for name, t in fitted.tables.items()})

    def get_config(self) -> dict[str, Any]:
        """JSON that `numcodecs.get_codec` makes the same codec of."""
        return self._config

    def encode(self, buf: Any) -> bytes:
        """Bytes of an array.

        Raises:
            CacheError: a value that is no id or no log-probability, or that cannot be held within
                the bound.
        """
        flat = ensure_contiguous_ndarray(buf).view(np.uint8).view(PAIR)
        return self._rows.encode(_signals(flat.reshape(-1, self._rows.k + 1)))

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array of some bytes, flat; copied into `out` if it is given.

        Raises:
            ShardCorrupt: the bytes are not what this codec wrote.
        """
        found = self._rows.decode(ensure_contiguous_ndarray(buf).tobytes())
        rows = np.empty((len(found["topk_ids"]), self._rows.k + 1), dtype=PAIR)
        rows["id"][:, :-1], rows["id"][:, -1] = found["topk_ids"], -1
        rows["logprob"][:, :-1] = found["topk_logprobs"]
        rows["logprob"][:, -1] = found["tail_logprob"]
        return ndarray_copy(rows.reshape(-1), out)


register_codec(TopkRows)


def _signals(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "topk_ids": rows["id"][:, :-1],
        "topk_logprobs": rows["logprob"][:, :-1],
        "tail_logprob": rows["logprob"][:, -1],
    }


def _packed(table: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(table).tobytes())).decode()
    return {"dtype": table.dtype.str, "shape": list(table.shape), "zlib": data}


def _unpacked(dtype: str, shape: list[int], zlib: str) -> np.ndarray:
    """The inverse of `_packed`, of untrusted values."""
    from zlib import decompressobj

    if dtype not in ("<u2", "<u4") or not 1 <= len(shape) <= 2:
        raise ValueError(f"dtype {dtype!r}, shape {shape!r}")
    size = np.dtype(dtype).itemsize * math.prod(int(side) for side in shape)
    if not 0 <= size <= MAX_TABLE_BYTES:
        raise ValueError(f"{size} bytes")
    data = decompressobj().decompress(base64.b64decode(zlib, validate=True), size + 1)
    return np.frombuffer(data, dtype=dtype).reshape(shape)
