"""All logit signals of a block of rows, in plain torch: the definition that fast paths must meet.

One idea: each signal is the line of torch that its meaning says, over [R, V] logits, on any device.
Callers hand in blocks small enough for their memory; `teacher.sweep.cpu` computes the
same two matrices in one pass over the vocabulary and is tested against this file.
"""

import torch

from stillroom.pipeline.teacher.rows import ROUNDING, RowSpec

_MASK32 = 0xFFFFFFFF
_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def sweep(
    logits: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    key: int | torch.Tensor,
    spec: RowSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals of R rows.

    Args:
        logits: [R, V], any float dtype; only real vocabulary columns.
        targets: int64 [R], the token that follows each row.
        positions: int64 [R], row index in the example: with `key` it fixes the draws.
        key: see `rows.draw_key`; one for all rows, or int64 [R].
        spec: what is asked.

    Returns:
        int32 [R, spec.int_columns] and float32 [R, spec.float_columns], see `rows`.
    """
    z = logits.float()  # [R, V]
    temperatures = spec.temperatures
    lse = torch.stack([torch.logsumexp(z / t, -1) for t in temperatures], 1)  # [R, T]
    lse_1 = lse[:, temperatures.index(1.0), None]  # [R, 1]
    top_ids = top_k(z, spec.k)  # [R, k]
    tail = z.scatter(1, top_ids, -torch.inf)  # [R, V]
    token = z.gather(1, targets[:, None])  # [R, 1]
    rank = 1 + (z > token).sum(1, keepdim=True)  # [R, 1]; equal logits share the better rank
    tail_logprob = torch.logsumexp(tail, 1, keepdim=True) - lse_1
    draws = draw_tail(tail, tail_logprob.exp(), positions, key, spec.draws)
    floats = [z.gather(1, top_ids) - lse_1, tail_logprob, token - lse_1, lse]
    floats += _scalars(z, lse_1, spec)
    ints = torch.cat([top_ids, *draws, rank], 1)
    return ints.to(torch.int32), torch.cat(floats, 1)


def _scalars(z: torch.Tensor, lse_1: torch.Tensor, spec: RowSpec) -> list[torch.Tensor]:
    out = []
    if spec.entropy:
        logp = z - lse_1
        out.append(-(logp.exp() * logp).sum(1, keepdim=True))
    if spec.moments:
        mean, std = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)  # population
        scaled = (z - mean) / (1e-7 + std)  # LLaVADI's norm_logits
        out += [mean, std, torch.logsumexp(scaled, 1, keepdim=True)]
    return out


def top_k(z: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [R, k]: ids by falling logit, ties by rising id (`torch.topk` leaves ties open)."""
    bits = (z + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 tie with 0.0
    # A float's bits rise with it where it is positive and fall where it is negative: flip those.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    vocab_size = z.shape[1]
    # Counted from the end, so that of two equal logits the lower id has the larger key.
    ids = torch.arange(vocab_size - 1, -1, -1, device=z.device)
    keys = (ordered << 32) + ids  # [R, V]
    return vocab_size - 1 - (torch.topk(keys, k, dim=1).values & _MASK32)


def draw_tail(
    tail: torch.Tensor,
    mass: torch.Tensor,
    positions: torch.Tensor,
    key: int | torch.Tensor,
    draws: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Systematic draws from the tail, one for every 1 / draws of the teacher's probability.

    A tail of mass M gets N = ceil(draws M) points (u + j) / N of its running sum in id order, with
    one uniform u a row and j = 0 .. N - 1 (systematic sampling with unequal probabilities: Madow,
    "On the theory of systematic sampling, II", 1949). An id of share s of the tail is drawn N s
    times in expectation and never further than one away from that, and unsure rows get more draws
    than sure ones.

    Args:
        tail: float32 [R, V] logits with -inf at the ids outside the tail.
        mass: float32 [R, 1], the tail's share of the probability.
        positions, key: the counter and key of the uniform numbers.
        draws: of a row whose tail is everything.

    Returns:
        (ids, counts), both int64 [R, draws]: distinct ids rising, padded with -1 and 0.
    """
    if draws == 0:
        empty = tail.new_empty((len(tail), 0), dtype=torch.int64)
        return empty, empty
    weights = (tail - tail.amax(1, keepdim=True)).double().exp()  # [R, V], at most 1
    cdf = weights.cumsum(1)  # [R, V]
    count = (draws * mass.double() - ROUNDING).ceil().clamp(1, draws)  # [R, 1], N
    place = torch.arange(draws, device=tail.device)
    points = (uniforms(positions, key)[:, None] + place) / count  # [R, draws], shares of the sum
    # Points from the N-th on lie beyond the sum, where the search says V.
    ids, counts = _runs(torch.searchsorted(cdf, points * cdf[:, -1:], right=True))
    beyond = ids == tail.shape[1]
    return ids.masked_fill(beyond, -1), counts.masked_fill(beyond, 0)


def _runs(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct values and counts of each rising row."""
    starts = torch.ones_like(drawn, dtype=torch.bool)
    starts[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = starts.cumsum(1) - 1  # which distinct value of its row each is
    ids = torch.full_like(drawn, -1).scatter(1, slot, drawn)
    counts = torch.zeros_like(drawn).scatter_add(1, slot, torch.ones_like(drawn))
    return ids, counts


def uniforms(positions: torch.Tensor, key: int | torch.Tensor) -> torch.Tensor:
    """float64 [R] in (0, 1): splitmix64 of key + counter, top 32 bits, midpoint.

    Counter-based, so the numbers depend on nothing but the example and the row (Steele, Lea, Flood
    2014: "Fast splittable pseudorandom number generators").
    """
    x = key + ((positions << 10) + 1) * _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    top = _shift(x ^ _shift(x, 31), 32)
    return (top.double() + 0.5) * 2.0**-32


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
