"""The parts of `sweep_triton`'s program: sort keys, the cut, the search of a draw, runs of ids.

One idea: each is a loop or a closed form that Triton inlines into the kernel, over one row. They
know nothing of signals, columns or programs; barriers are the caller's, but for `store_runs`.
"""
# Triton's values have no types.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from stillroom.pipeline.teacher import rows

SELECT = tl.constexpr(1024)
"""Words in registers at a time while a cut is looked for."""
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
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
def cut_of(values, near, listed, count, wanted):
    """A key that exactly `wanted` of the words reach, by bisection; LOWEST where none must go."""
    low, high = tl.full((), LOWEST, tl.int64), tl.full((), HIGHEST, tl.int64)
    reached = count
    while (reached > wanted) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        found = tl.full((), 0, tl.int32)
        for start in range(0, count, SELECT):
            keys = keys_of(values, near, listed, start, count)
            found += tl.sum((keys >= middle).to(tl.int32), 0)
        enough = found >= wanted
        low, reached = tl.where(enough, middle, low), tl.where(enough, found, reached)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def accumulate(masses, cdf, parts):
    """Running sums of the parts' masses."""
    place = tl.arange(0, SELECT)
    before = tl.full((), 0.0, tl.float64)
    for start in range(0, parts, SELECT):
        inside = start + place < parts
        mass = tl.load(masses + start + place, mask=inside, other=0.0).to(tl.float64)
        tl.store(cdf + start + place, before + tl.cumsum(mass, 0), mask=inside)
        before += tl.sum(mass, 0)


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
    cut,
    tail_peak,
    vocab_size,
    parts,
    half,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):
    """The tail's word at each point of its running sum: int32 [BLOCK_D]."""
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
    drawn, done = tl.full((BLOCK_D,), -1, tl.int32), tl.zeros((BLOCK_D,), tl.int1)
    for word in range(PART):
        ids = at * PART + word
        z = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        gone = (key_of(z, ids) >= cut) | (ids >= vocab_size)
        mass = tl.where(gone, 0.0, tl.exp(z - tail_peak))
        drawn = tl.where((mass > 0) & (done == 0), ids, drawn)
        reached += mass.to(tl.float64)
        done = done | (reached > points)
    return drawn


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
