"""Does what a cache holds make sense: what training would choke on, or swallow in silence.

One idea: every rule is one comparison over whole arrays, and the first entry that breaks it names
its example. Values that a profile rounds may pass a bound by what rounding can do, and no further.
It decodes nothing; that bytes are the bytes that were written is the receipts' business.
"""

from typing import Any

import numpy as np

from stillroom.cache_schemas.candidates import check_distances, check_ids
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.lists import repeated
from stillroom.cache_schemas.manifest import Plan
from stillroom.cache_schemas.signals import is_hidden
from stillroom.pipeline.cache.columns import Columns
from stillroom.pipeline.record import TeacherRecord, content_id

MASS_TOLERANCE = {"exact": 2e-3, "portable": 2e-3}
"""How far top-k and tail may be from summing to 1; the other profiles round the tail."""
ROUNDED_MASS_TOLERANCE = 0.3
LOGPROB_SLACK, ROUNDED_SLACK = 1e-3, 0.01
"""Nats above 0 that arithmetic leaves in a log-probability, and that rounding to steps leaves."""
FALLING_SLACK = 1e-6
FINITE = ("entropy", "lse", "logit_mean", "logit_std", "zscore_lse")
LOGPROBS = ("token_logprob", "behaviour_logprob", "tail_logprob")


def check_record(record: TeacherRecord, plan: Plan) -> None:
    """`check` of one record.

    Raises:
        ShardCorrupt: it makes no sense.
    """
    for name, array in record.signals.items():
        if "." in name and not np.isfinite(array).all():
            raise ShardCorrupt(f"{name} has a value that is not finite", where="example 0")
    check(Columns.of_record(record), plan)


def check(columns: Columns, plan: Plan) -> None:
    """What holds for all examples, whatever their codec.

    Raises:
        ShardCorrupt: an id outside the vocabulary, a weight or a scalar that is not finite, a
            positive log-probability, ranks below 1, positions that do not rise, repeated or
            unsorted top-k entries, mass that does not sum to one, draws that cannot be, an
            `example_id` of other content; names the example.
    """
    _check_examples(columns)
    _check_positions(columns, plan)
    _check_identity(columns)
    vocab = plan.facts["teacher"].get("vocab_size", 1)
    owner = np.repeat(columns.numbers, columns.tokens.sizes)
    tokens = columns.tokens.flat
    _refuse((tokens < 0) | (tokens >= vocab), owner, "a token is outside the vocabulary")
    _check_rows(columns, plan, vocab)
    _check_lists(columns, plan, vocab)


def _refuse(bad: Any, owner: np.ndarray, found: str) -> None:
    """Name the example of the first bad entry."""
    if bad.any():
        flat = bad.reshape(len(bad), -1).any(axis=1)
        raise ShardCorrupt(found, where=f"example {owner[int(np.argmax(flat))]}")


def _check_examples(columns: Columns) -> None:
    weights = columns.weights
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    _refuse(wrong, columns.numbers, "its weight is not a number of at least 0")
    for at, spans in enumerate(columns.images):
        limit = int(columns.tokens.sizes[at])
        for span in spans:
            inside = span.start >= -1 and span.length >= 0 and span.start + span.length <= limit
            if not inside or len(span.sha256) != 64:
                found = f"an image span of {span.length} tokens at {span.start}"
                raise ShardCorrupt(found, where=f"example {columns.numbers[at]}")


def _check_positions(columns: Columns, plan: Plan) -> None:
    """Positions of hidden states rise and are inside; each has its states."""
    positions, sizes = columns.positions.flat, columns.positions.sizes
    owner = np.repeat(columns.numbers, sizes)
    outside = (positions < 0) | (positions >= np.repeat(columns.tokens.sizes, sizes))
    _refuse(outside, owner, "a position of a hidden state is outside its tokens")
    falls = (np.diff(positions) <= 0) & (owner[1:] == owner[:-1])
    _refuse(falls, owner[1:], "positions of hidden states do not rise")
    names = sorted(plan.dense_signals)
    if not names or not columns.dense_lengths.sizes.any():
        return
    if (columns.dense_lengths.sizes != len(names)).any():
        raise ShardCorrupt("dense_lengths does not fit the plan", where="record")
    lengths = columns.dense_lengths.flat.reshape(-1, len(names))
    limits = np.array([plan.dense_signals[name]["positions"] for name in names])
    _refuse((lengths < 0) | (lengths > limits), columns.numbers, "dense_lengths beyond the plan's")
    hidden = lengths[:, [is_hidden(name) for name in names]]
    _refuse(hidden != sizes[:, None], columns.numbers, "hidden states without a position of each")


def _check_identity(columns: Columns) -> None:
    """`example_id` is the hash of the content, where there are tokens to hash."""
    tokens, masks = columns.tokens, columns.mask
    ends = tokens.ends.tolist()
    for at, (size, end) in enumerate(zip(tokens.sizes.tolist(), ends, strict=True)):
        if size:
            own = slice(end - size, end)
            spans = columns.images[at] if columns.images else ()
            if columns.ids[at] != content_id(tokens.flat[own], masks.flat[own], spans):
                found = f"example_id {columns.ids[at][:32]!r} is not the hash of its content"
                raise ShardCorrupt(found, where=f"example {columns.numbers[at]}")


def _check_rows(columns: Columns, plan: Plan, vocab: int) -> None:
    """Scalars of rows."""
    rows, owner = columns.rows, np.repeat(columns.numbers, columns.num_rows)
    for name, array in rows.items():
        if array.dtype.kind == "f":
            _refuse(np.isnan(array), owner, f"{name} has NaN")
    for name in (name for name in FINITE if name in rows):
        _refuse(~np.isfinite(rows[name]), owner, f"{name} has a value that is not finite")
    slack = LOGPROB_SLACK if _is_exact(plan) else ROUNDED_SLACK
    for name in (name for name in LOGPROBS if name in rows):
        _refuse(rows[name] > slack, owner, f"{name} is above 0")
    for name in (name for name in ("entropy", "logit_std") if name in rows):
        _refuse(rows[name] < -slack, owner, f"{name} is below 0")
    if "token_rank" in rows:
        ranks = rows["token_rank"]
        _refuse((ranks < 1) | (ranks > vocab), owner, f"token_rank is not within 1 .. {vocab}")


def _check_lists(columns: Columns, plan: Plan, vocab: int) -> None:
    rows, owner = columns.rows, np.repeat(columns.numbers, columns.num_rows)
    capture = plan.facts["capture"]
    if "topk_ids" in rows and "topk_logprobs" in rows:
        _check_topk(rows, vocab, capture.get("profile", ""), owner)
    if "draw_ids" in rows and "draw_counts" in rows:
        _check_draws(rows, vocab, capture.get("tail_draws", 0), owner)
    if "written_ids" in columns.whole:
        written = columns.whole["written_ids"]
        wrong = (written.flat < 0) | (written.flat >= vocab)
        by = np.repeat(columns.numbers, written.sizes)
        _refuse(wrong, by, "a written token is outside the vocabulary")
    for at in range(len(columns) if "candidate_ids" in columns.whole else 0):
        check_ids(
            columns.whole["candidate_ids"].of(at),
            capture["candidates"],
            capture["catalogue"]["items"],
        )
        check_distances(columns.whole["candidate_distances"].of(at), capture["candidates"])


def _check_topk(rows: dict[str, np.ndarray], vocab: int, profile: str, owner: np.ndarray) -> None:
    ids, logprobs = rows["topk_ids"], rows["topk_logprobs"].astype(np.float64)
    held = ids >= 0
    wrong = _outside(ids, vocab) | repeated(ids)
    _refuse(wrong, owner, "top-k ids are repeated or outside the vocabulary")
    with np.errstate(invalid="ignore"):
        rises = (np.diff(logprobs, axis=1) > FALLING_SLACK) & held[:, 1:]
    wrong = rises.any(axis=1) | (logprobs > LOGPROB_SLACK).any(axis=1)
    _refuse(wrong, owner, "top-k log-probabilities are not falling from 0")
    late = held[:, 1:] & ~held[:, :-1]
    _refuse(late, owner, "a top-k entry stands behind the padding")
    if "tail_logprob" in rows and len(ids):
        mass = np.where(held, np.exp(logprobs), 0).sum(axis=1)
        off = np.abs(mass + np.exp(rows["tail_logprob"].astype(np.float64)) - 1)
        allowed = MASS_TOLERANCE.get(profile, ROUNDED_MASS_TOLERANCE)
        _refuse(~(off <= allowed), owner, f"probabilities sum to 1 +- {off.max():.3g}")


def _check_draws(rows: dict[str, np.ndarray], vocab: int, draws: int, owner: np.ndarray) -> None:
    ids, times = rows["draw_ids"], rows["draw_counts"]
    held = ids >= 0
    wrong = _outside(ids, vocab) | repeated(ids)
    _refuse(wrong, owner, "draw ids are repeated or outside the vocabulary")
    wrong = ((times > 0) != held).any(axis=1) | (times.sum(axis=1, dtype=np.int64) > draws)
    _refuse(wrong, owner, f"draw counts are not those of {draws} draws")
    listed = rows.get("topk_ids", ids[:, :0])
    both = np.concatenate([np.where(held, ids, -1), listed], axis=1)
    _refuse(repeated(both), owner, "a draw is one of the top-k ids")


def _outside(ids: np.ndarray, vocab: int) -> Any:
    """bool [R]: whether a row has an id that is neither padding nor of the vocabulary."""
    return ((ids < -1) | (ids >= vocab)).any(axis=1)


def _is_exact(plan: Plan) -> bool:
    return plan.facts["capture"].get("profile") in MASS_TOLERANCE
