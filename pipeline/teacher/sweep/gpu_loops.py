"""The parts of `sweep_triton`'s program: sort keys, the cut, the search of a draw, runs of ids.

One idea: each is a loop or a closed form that Triton inlines into the kernel, over one row. They
know nothing of signals, columns or programs; barriers are the caller's, but for `store_runs`.
"""
# Triton's values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from stillroom.pipeline.kernels.triton.rows import FAR_BELOW, LOG2_E, lanes_and_words
from stillroom.pipeline.teacher import rows

SELECT = tl.constexpr(1024)
"""Words in registers at a time while a cut is looked for."""
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
LOWEST_32 = tl.constexpr(-(2**31))
HIGHEST_32 = tl.constexpr(2**31 - 1)
ROUNDING = tl.constexpr(rows.ROUNDING)


@triton.jit
def ordered(z):
    """int32 that rises with a float32; -0.0 and 0.0 are one."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def ordered_inverse(ordered):
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_of(z, ids):
    """int64 that rises with the logit and, at ties, falls with the id: see `definition.top_k`."""
    return (ordered(z).to(tl.int64) << 32) + (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def keys_of(values, near, listed, start, count):
    """Sort keys of SELECT words from `start` on: of the `listed` ones, or, with 0 of them, of all
    ids below `count`; LOWEST pads."""
    place = start + tl.arange(0, SELECT)
    inside = place < count
    ids = tl.load(near + place, mask=place < listed, other=0)
    ids = tl.where(place < listed, ids, place)
    z = tl.load(values + ids, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, key_of(z, ids), LOWEST)


@triton.jit
def reached_by(keys, low, high, count, wanted):
    """A number that exactly `wanted` of `count` keys in registers reach, by bisection of what lies
    between low and high; low where no key must go."""
    reached = count
    while (reached > wanted) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        found = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = found >= wanted
        low, reached = tl.where(enough, middle, low), tl.where(enough, found, reached)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def cut_of(values, near, listed, count, wanted):
    """A key that exactly `wanted` of the words reach; LOWEST where none must go."""
    low, high = tl.full((), LOWEST, tl.int64), tl.full((), HIGHEST, tl.int64)
    if count <= SELECT:
        low = reached_by(keys_of(values, near, listed, 0, count), low, high, count, wanted)
    else:
        reached = count
        while (reached > wanted) & (low + 1 < high):
            middle = (low & high) + ((low ^ high) >> 1)
            found = tl.full((), 0, tl.int32)
            for start in range(0, count, SELECT):
                keys = keys_of(values, near, listed, start, count)
                found += tl.sum((keys >= middle).to(tl.int32), 0)
            enough = found >= wanted
            low, reached = tl.where(enough, middle, low), tl.where(enough, found, reached)
            high = tl.where(enough, high, middle)
    return low


@triton.jit
def note(state, z, inside, token, origin, MOMENTS: tl.constexpr, WHOLE: tl.constexpr):
    """The first pass over a block: maxima, words above the token, and sums of offsets, by lanes.

    z and `inside`: [loads, lanes, words of a load].
    """
    maxima, above, offsets, squares = state
    maxima = tl.maximum(maxima, tl.max(tl.max(z, 2), 0))
    above += tl.sum(tl.sum((z > token).to(tl.int32), 2), 0)
    offset = z - origin
    if not WHOLE:
        offset = tl.where(inside, offset, 0.0)
    offsets += tl.sum(tl.sum(offset, 2), 0)
    if MOMENTS:
        squares += tl.sum(tl.sum(offset * offset, 2), 0)
    return maxima, above, offsets, squares


@triton.jit
def list_parts(maxima, listed_ptr, count, wanted, PARTS: tl.constexpr):
    """(bound that the `wanted`-th largest of `count` maxima reaches, number of parts that reach
    it): their numbers are stored, rising."""
    part = tl.arange(0, PARTS)
    largest = tl.load(maxima + part, mask=part < count, other=float("-inf"))
    keys = tl.where(part < count, ordered(largest), LOWEST_32)
    low, high = tl.full((), LOWEST_32, tl.int32), tl.full((), HIGHEST_32, tl.int32)
    bound = reached_by(keys, low, high, count, wanted)
    chosen = (keys >= bound) & (part < count)
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(listed_ptr + slot, part, mask=chosen)
    return bound, tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def list_words(
    logits,
    listed_ptr,
    num_listed,
    bound,
    near,
    groups,
    whole,
    vocab_size,
    NEAR: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    LOADS: tl.constexpr,
):
    """How many words of the listed parts reach the bound; the first NEAR are stored.

    A part is what one lane has loaded in LOADS turns; the part behind the last group is the rest of
    the row, which no block of words fills.
    """
    STEP: tl.constexpr = LANES * PER
    count = tl.full((), 0, tl.int32)
    for first in range(0, num_listed, LANES):
        place = first + tl.arange(0, LANES)
        part = tl.load(listed_ptr + place, mask=place < num_listed, other=0)
        group = part // LANES
        begin = tl.where(group == groups, whole, group * (LOADS * STEP))
        end = tl.where(group == groups, vocab_size, tl.minimum(begin + LOADS * STEP, whole))
        end = tl.where(place < num_listed, end, 0)
        begin += part % LANES * PER
        for turn in range(LOADS):
            ids = (begin + turn * STEP)[:, None] + tl.arange(0, PER)[None, :]
            inside = ids < end[:, None]
            z = tl.load(logits + ids, mask=inside, other=0.0).to(tl.float32)
            ids = tl.reshape(ids, (STEP,))
            chosen = tl.reshape(inside & (ordered(z) >= bound), (STEP,)).to(tl.int32)
            slot = count + tl.cumsum(chosen, 0) - 1
            tl.store(near + slot, ids, mask=(chosen > 0) & (slot < NEAR))
            count += tl.sum(chosen, 0)
    return count


@triton.jit
def exponents(z, ids, cut_z, cut_id, begin, KEPT: tl.constexpr):
    """z / ln 2 - begin of the tail's words, far below 0 for those of the top k."""
    x = tl.fma(z, LOG2_E, -begin)
    if KEPT:
        gone = (z > cut_z) | ((z == cut_z) & (ids <= cut_id))
        x = tl.where(gone, FAR_BELOW, x)
    return x


@triton.jit
def weigh(
    state,
    row_of,
    end,
    ids,
    start,
    K: tl.constexpr,
    DRAWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    OTHERS: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The second pass over a block: the tail's masses, their products with the exponents, and the
    sums at other temperatures, by lanes."""
    totals, products, sums = state
    logits, masses, inverse, vocab_size = row_of
    cut_z, cut_id, begin = end
    if WHOLE:
        z = tl.load(logits + ids).to(tl.float32)
    else:
        z = tl.load(logits + ids, mask=ids < vocab_size, other=0.0).to(tl.float32)
    x = exponents(z, ids, cut_z, cut_id, begin, K > 0)
    if not WHOLE:
        x = tl.where(ids < vocab_size, x, FAR_BELOW)
    x = lanes_and_words(x, LANES, PER)
    mass = tl.exp2(x)
    own = tl.sum(mass, 2)  # [loads, lanes]
    totals += tl.sum(own, 0)
    if DRAWS > 0:
        shape: tl.constexpr = (ids.shape[0] // PART, PART // PER)
        part_masses = tl.sum(tl.reshape(own, shape), 1)
        part = tl.arange(0, ids.shape[0] // PART)
        tl.store(masses + start // PART + part, part_masses)
    if ENTROPY:
        products += tl.sum(tl.sum(mass * x, 2), 0)
    if OTHERS > 0:
        # Reshaped, not indexed by None: the words stay where they were loaded.
        powers = tl.reshape(x, (1, x.shape[0], LANES, PER)) * inverse[:, None, None, None]
        powers = tl.exp2(powers)
        sums += tl.sum(tl.sum(powers, 3), 1)
    return totals, products, sums


@triton.jit
def accumulate(masses, cdf, parts):
    """Running sums of the parts' masses, and the last."""
    place = tl.arange(0, SELECT)
    before = tl.full((), 0.0, tl.float64)
    for start in range(0, parts, SELECT):
        inside = start + place < parts
        mass = tl.load(masses + start + place, mask=inside, other=0.0).to(tl.float64)
        tl.store(cdf + start + place, before + tl.cumsum(mass, 0), mask=inside)
        before += tl.sum(mass, 0)
    return before


@triton.jit
def uniform(key, counter):
    """(0, 1) from a counter: splitmix64, top 32 bits, midpoint (as in `definition.uniforms`)."""
    x = key.to(tl.uint64) + counter.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 32).to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def search(
    points,
    logits,
    cdf,
    tail,
    vocab_size,
    parts,
    half,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The tail's word at each point of its running sum: int32 [BLOCK_D].

    The part by bisection, in it the eight words whose sum passes the point, of these the word;
    where rounding leaves a point beyond its part, the last word that has any mass.
    """
    at = tl.zeros((BLOCK_D,), tl.int32)
    jump = half
    while jump > 0:
        probe = at + jump
        inside = probe <= parts
        reached = tl.load(cdf + probe - 1, mask=inside, other=float("inf"))
        at = tl.where(inside & (reached <= points), probe, at)
        jump = jump // 2
    at = tl.minimum(at, parts - 1)
    reached = tl.load(cdf + at - 1, mask=at > 0, other=0.0)
    EIGHT: tl.constexpr = min(8, PART)
    begin, before, done = at * PART, reached, tl.zeros((BLOCK_D,), tl.int1)
    for turn in range(PART // EIGHT):
        first = at * PART + turn * EIGHT
        _ids, mass = _masses(first, logits, tail, vocab_size, EIGHT, KEPT)
        own = tl.sum(mass, 1)
        better = (own > 0) & (done == 0)
        begin, before = tl.where(better, first, begin), tl.where(better, reached, before)
        reached += own
        done = done | (reached > points)
    ids, mass = _masses(begin, logits, tail, vocab_size, EIGHT, KEPT)
    passed = (before[:, None] + tl.cumsum(mass, 1) > points[:, None]) & (mass > 0)
    first = tl.min(tl.where(passed, ids, HIGHEST_32), 1)
    last = tl.max(tl.where(mass > 0, ids, -1), 1)
    return tl.where(first < HIGHEST_32, first, last)


@triton.jit
def _masses(first, logits, tail, vocab_size, EIGHT: tl.constexpr, KEPT: tl.constexpr):
    """Ids and float64 masses [BLOCK_D, EIGHT] of words from `first` on, as the second pass has
    them."""
    cut_z, cut_id, begin = tail
    ids = first[:, None] + tl.arange(0, EIGHT)[None, :]
    inside = ids < vocab_size
    z = tl.load(logits + ids, mask=inside, other=0.0).to(tl.float32)
    mass = tl.exp2(exponents(z, ids, cut_z, cut_id, begin, KEPT))
    return ids, tl.where(inside, mass, 0.0).to(tl.float64)


@triton.jit
def store_runs(drawn, draw, held, scratch, out, DRAWS: tl.constexpr):
    """Distinct ids of a row, rising where `held`, and how often each was drawn; -1 and 0 pad."""
    tl.store(scratch + draw, drawn)
    tl.store(out + draw, tl.full(drawn.shape, -1, tl.int32), mask=draw < DRAWS)
    tl.store(out + DRAWS + draw, tl.zeros(drawn.shape, tl.int32), mask=draw < DRAWS)
    tl.debug_barrier()
    before = tl.load(scratch + draw - 1, mask=draw > 0, other=-1)
    first = drawn != before
    slot = tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(out + slot, drawn, mask=first & held)
    tl.atomic_add(out + DRAWS + slot, 1, mask=held)
