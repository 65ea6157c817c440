"""Tokens, their ranks and sampled tails, coded next to the top-k lists that predict them.

One idea: the token after row t is usually in row t's list, so its place there stands for it; any
other id is its rank in the row's class. Everything here is lossless (draws come back in the order
of their ranks).
"""

import numpy as np

from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.joined import Joined
from stillroom.cache_schemas.lists import Lists
from stillroom.cache_schemas.rankings import Rankings
from stillroom.cache_schemas.streams import Record, Streams, corrupt

DRAW_SIZES, DRAW_STEPS, DRAW_TIMES = 26, 27, 28
PLACES, OUTSIDERS, PROMPT = 29, 30, 31
RANKS_ALONE, RANKS_IN_GROUP, RANKS_OUTSIDE = 32, 33, 34


def encode_tokens(tokens: np.ndarray, lists: Lists, rankings: Rankings) -> Streams:
    """Streams of int32 [L] tokens, of which the last R follow the rows."""
    following, prompt = _following(tokens, len(lists.ids))
    streams = {PROMPT: rankings.places[prompt]}
    if following.size:
        places = places_of(following, lists)  # [R]
        outside = places == lists.ids.shape[1]  # [R], not in the list
        ranks = rankings.ranks[lists.classes[outside], following[outside]]
        streams |= {PLACES: places.astype(np.uint16), OUTSIDERS: ranks.astype(np.uint32)}
    return streams


def decode_tokens(
    record: Record | Joined, lists: Lists, rankings: Rankings
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [L], places int64 [R] of the following tokens; empty when L < R + 1)."""
    each = int(record.tokens > record.rows > 0)  # tokens that follow a row
    prompt = record.stream(PROMPT, "u4", tokens=1, rows=-each)
    if prompt.max(initial=0) >= rankings.common.size:
        corrupt("a prompt token outside the vocabulary")
    prompt = rankings.common[prompt]
    if not each:
        return prompt, np.empty(0, dtype=np.int64)
    from stillroom.cache_schemas.kernels.places import tokens_after

    places = record.stream(PLACES, "u2", rows=1).astype(np.int64)
    k = lists.ids.shape[1]
    outsiders = record.stream(OUTSIDERS, "u4", rows=places >= k)
    following = np.empty(record.rows, dtype=np.int32)
    bases, length = rankings.base(lists.classes), rankings.lists.shape[1]
    tables = rankings.lookup, length, rankings.num_ranks
    if tokens_after(lists.ids, places, outsiders, bases, *tables, following)[0]:
        corrupt("a token's place or rank that does not exist")
    return record.in_order(prompt, following), np.minimum(places, k)


def places_of(following: np.ndarray, lists: Lists) -> np.ndarray:
    """int64 [R]: where each token stands in its row's list; k where it does not."""
    from stillroom.cache_schemas.kernels import places as kernel

    places = np.empty(len(following), dtype=np.int64)
    kernel.places_of(lists.ids, following, places)
    return places


def encode_ranks(ranks: np.ndarray, places: np.ndarray, lists: Lists) -> Streams:
    """Streams of token_rank: relative to the token's group where it has one, else to k."""
    start, alone, inside = _groups(places, lists)
    relative = ranks.astype(np.int64) - start
    return {
        RANKS_ALONE: _small(relative[inside & alone]),
        RANKS_IN_GROUP: _small(relative[inside & ~alone]),
        RANKS_OUTSIDE: _small(relative[~inside]),
    }


def decode_ranks(record: Record | Joined, places: np.ndarray, lists: Lists) -> np.ndarray:
    """token_rank, int32 [R]."""
    start, alone, inside = _groups(places, lists)
    ranks = start
    for number, rows in (
        (RANKS_ALONE, inside & alone),
        (RANKS_IN_GROUP, inside & ~alone),
        (RANKS_OUTSIDE, ~inside),
    ):
        ranks[rows] += record.stream(number, "i4", rows=rows)
    return ranks.astype(np.int32)


def encode_draws(
    ids: np.ndarray, times: np.ndarray, classes: np.ndarray, rankings: Rankings
) -> Streams:
    """Streams of draw_ids and draw_counts [R, draws].

    Raises:
        CacheError: an id outside the vocabulary, an entry after the padding, a count below one.
    """
    sizes = (ids >= 0).sum(axis=1)
    held = np.arange(ids.shape[1]) < sizes[:, None]
    _check_draws(ids, times, held, rankings.common.size)
    unused = np.iinfo(np.int64).max
    ranks = rankings.ranks[classes[:, None], np.where(held, ids, 0)].astype(np.int64)
    order = np.argsort(np.where(held, ranks, unused), axis=1, kind="stable")
    ranks = np.take_along_axis(ranks, order, 1)
    steps = np.diff(ranks, axis=1, prepend=0)[held]
    return {
        DRAW_SIZES: sizes.astype(np.uint16),
        DRAW_STEPS: steps.astype(rankings.dtype),
        # Drawn at least once, so stored less one.
        DRAW_TIMES: np.take_along_axis(times, order, 1)[held].astype(np.uint32) - 1,
    }


def decode_draws(
    record: Record | Joined, draws: int, classes: np.ndarray, rankings: Rankings
) -> tuple[np.ndarray, np.ndarray]:
    """(draw_ids, draw_counts), int32 [R, draws]."""
    sizes = record.stream(DRAW_SIZES, "u2", rows=1).astype(np.int64)
    if sizes.max(initial=0) > draws:
        corrupt(f"{sizes.max()} draws in a row", f"at most {draws}")
    held = np.arange(draws) < sizes[:, None]
    ranks = np.zeros(held.shape, dtype=np.int64)
    ranks[held] = record.stream(DRAW_STEPS, "u2", "u4", rows=sizes)
    ranks = np.cumsum(ranks, axis=1)  # past a row's end it repeats, and is not read
    ids = np.full(held.shape, -1, dtype=np.int32)
    row_classes = np.broadcast_to(classes[:, None], held.shape)[held]
    ids[held] = _looked_up(ranks[held], row_classes, rankings)
    times = np.zeros(held.shape, dtype=np.int32)
    times[held] = (record.stream(DRAW_TIMES, "u4", rows=sizes) + 1).astype(np.int32)
    return ids, times


def _following(tokens: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens after a row, tokens before those)."""
    at = len(tokens) - num_rows if len(tokens) > num_rows else len(tokens)
    return tokens[at:], tokens[:at]


def _looked_up(ranks: np.ndarray, classes: np.ndarray, rankings: Rankings) -> np.ndarray:
    if ranks.max(initial=0) >= rankings.num_ranks:
        corrupt("a rank outside its class")
    length = rankings.lists.shape[1]
    at = np.where(ranks < length, rankings.base(classes) + ranks, ranks - length)
    return rankings.lookup[at]


def _groups(places: np.ndarray, lists: Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1 + first place of the token's group, whether the token is alone in it, whether it is in
    the list at all), each [R]; tokens outside the list start at k + 1."""
    from stillroom.cache_schemas.kernels.places import groups

    start, sizes = np.empty(len(places), dtype=np.int64), np.empty(len(places), dtype=np.int64)
    groups(lists.levels, lists.counts, places, start, sizes)
    return start + 1, sizes <= 1, places < lists.levels.shape[1]


def _small(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32)


def _check_draws(ids: np.ndarray, times: np.ndarray, held: np.ndarray, vocab_size: int) -> None:
    problems = (
        ((ids >= vocab_size) & held, "draw_ids", ids, f"below {vocab_size}"),
        ((ids < 0) & held, "draw_ids", ids, "no id after the padding"),
        ((times < 1) & held, "draw_counts", times, "at least 1"),
        ((times != 0) & ~held, "draw_counts", times, "0 in the padding"),
    )
    for wrong, signal, values, bound in problems:
        if wrong.any():
            row = int(np.nonzero(wrong.any(axis=1))[0][0])
            found = int(values[row][wrong[row]][0])
            raise CacheError(f"{found}", expected=bound, where=f"signal {signal}, row {row}")
