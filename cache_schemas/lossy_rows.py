"""Row signals of profiles `small` and `strict`: lists first, the rest predicted from them.

One idea: the encoder decodes its own lists and predicts from those, so reader and writer agree.
A signal that cannot be coded within its bound stays in the caller's dict and is kept exactly.
"""

from collections.abc import Collection

import numpy as np

from stillroom.cache_schemas import scalar_streams, token_streams
from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.joined import Joined
from stillroom.cache_schemas.lists import Lists, RowError
from stillroom.cache_schemas.rankings import Rankings
from stillroom.cache_schemas.streams import Record, Streams
from stillroom.cache_schemas.topk_streams import PARAMETERS, TAIL, TopkCoder

LISTS = ("topk_ids", "topk_logprobs", "tail_logprob")
DRAWS = ("draw_ids", "draw_counts")
_FROM_PLACES = {"token_ids", "token_rank", "token_logprob"}
_FROM_LISTS = _FROM_PLACES | {*LISTS, *DRAWS, "entropy"}


class LossyRows:
    """Encodes and decodes a record's streams.

    Args:
        strict: bound |delta log p| of every entry rather than the KL divergence of rows.
        codebook, rankings: what was fitted.
        max_kl: bound of one row's KL divergence, nats.
        k, draws, temperatures: widths of the arrays.
    """

    def __init__(
        self,
        strict: bool,
        codebook: Codebook,
        rankings: Rankings,
        max_kl: float,
        *,
        k: int,
        draws: int,
        temperatures: int,
    ):
        self.rankings, self.k, self.draws, self.temperatures = rankings, k, draws, temperatures
        self._lists = TopkCoder(codebook, rankings, max_kl, normalise=not strict)
        self._finer = scalar_streams.STRICT_FINER if strict else 1

    def encode(self, arrays: dict[str, np.ndarray], rows: int) -> tuple[Streams, RowError]:
        """Streams of what can be coded, which is taken out of `arrays`, and the lists' error."""
        streams: Streams = {}
        lists, error, places = None, RowError(), None
        classes = self._choose(arrays)
        if "topk_ids" in arrays and "topk_logprobs" in arrays:
            tail = arrays.pop("tail_logprob", None) if self.k else None
            given = arrays.pop("topk_ids"), arrays.pop("topk_logprobs")
            streams, lists, error = self._lists.encode(*given, tail, classes)
        if "draw_ids" in arrays and "draw_counts" in arrays and lists is not None:
            draws = arrays.pop("draw_ids"), arrays.pop("draw_counts")
            streams |= token_streams.encode_draws(*draws, classes, self.rankings)
        if lists is not None:
            places = self._encode_tokens(arrays, lists, streams)
        self._encode_scalars(arrays, lists, places, rows, streams)
        return streams, error

    def lists(self, record: Record | Joined) -> Lists | None:
        """The record's lists with the levels and classes they were coded in, if it codes any."""
        return self._lists.decode(record, self.k) if PARAMETERS in record.entries else None

    def decode(
        self, record: Record | Joined, names: Collection[str], lists: Lists | None = None
    ) -> dict[str, np.ndarray]:
        """Those of `names` that the record codes; `lists` where they are decoded already."""
        found: dict[str, np.ndarray] = {}
        if lists is None and not _FROM_LISTS.isdisjoint(names):
            lists = self.lists(record)
        places = None
        if lists is not None:
            found = {"topk_ids": lists.ids, "topk_logprobs": lists.logprobs}
            if TAIL in record.entries:
                found["tail_logprob"] = lists.tail
            if token_streams.PROMPT in record.entries and not _FROM_PLACES.isdisjoint(names):
                tokens, places = token_streams.decode_tokens(record, lists, self.rankings)
                found["token_ids"] = tokens
            if token_streams.RANKS_ALONE in record.entries and places is not None:
                found["token_rank"] = token_streams.decode_ranks(record, places, lists)
            if token_streams.DRAW_SIZES in record.entries and not set(DRAWS).isdisjoint(names):
                classes, ranks = lists.classes, self.rankings
                draws = token_streams.decode_draws(record, self.draws, classes, ranks)
                found |= dict(zip(DRAWS, draws))
        found |= self._decode_scalars(record, names, lists, places)
        return {name: array for name, array in found.items() if name in names}

    def _choose(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Class of every row, by its list and draws; ids that are none are found out later."""
        ids = [arrays[name] for name in ("topk_ids", "draw_ids") if name in arrays]
        if not ids:
            return np.empty(0, dtype=np.uint8)
        together = np.ascontiguousarray(np.concatenate(ids, axis=1))  # [R, k + draws]
        known = together.max(initial=-1) < self.rankings.common.size
        return self.rankings.choose(together if known else np.full_like(together, -1))

    def _encode_tokens(
        self, arrays: dict[str, np.ndarray], lists: Lists, streams: Streams
    ) -> np.ndarray | None:
        """Code tokens and their ranks; returns the tokens' places in the lists."""
        tokens = arrays.get("token_ids")
        vocab_size = self.rankings.common.size
        if tokens is None or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
            return None
        streams |= token_streams.encode_tokens(arrays.pop("token_ids"), lists, self.rankings)
        if token_streams.PLACES not in streams:
            return None
        places = streams[token_streams.PLACES].astype(np.int64)
        if "token_rank" in arrays:
            ranks = arrays.pop("token_rank")
            streams |= token_streams.encode_ranks(ranks, places, lists)
        return places

    def _encode_scalars(
        self,
        arrays: dict[str, np.ndarray],
        lists: Lists | None,
        places: np.ndarray | None,
        rows: int,
        streams: Streams,
    ) -> None:
        for name in [n for n in scalar_streams.ORDER if n in arrays]:
            predicted = _broadcastable(lists, places, rows, name, arrays[name].ndim)
            coded = scalar_streams.encode(name, arrays[name], predicted, self._finer)
            if coded is not None:
                streams |= coded
                arrays.pop(name)

    def _decode_scalars(
        self,
        record: Record | Joined,
        names: Collection[str],
        lists: Lists | None,
        places: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            if name in scalar_streams.ORDER and scalar_streams.stream_of(name) in record.entries:
                width = (self.temperatures,) if name == "lse" else ()
                shape = (record.rows, *width)
                predicted = _broadcastable(lists, places, record.rows, name, len(shape))
                found[name] = scalar_streams.decode(name, record, predicted, shape, self._finer)
        return found


def _broadcastable(
    lists: Lists | None, places: np.ndarray | None, rows: int, name: str, ndim: int
) -> np.ndarray:
    predicted = scalar_streams.predict(name, lists, places, rows)
    return predicted.reshape(-1, *(1 for _ in range(ndim - 1)))
