"""A reader of lossy records written from FORMAT.md alone: NumPy, pcodec, xxhash, none of our code.

One idea: if this short program reads the golden records, the page says enough. It is slow, trusts
its input, and reads lists, tokens, ranks, draws and scalars.
"""

import struct

import numpy as np
import xxhash
from pcodec import standalone

TYPES = ("u1", "<u2", "<u4", "<i4", "<f4", "<u8", "<i2")
SCALARS = ("token_logprob", "entropy", "lse", "logit_mean", "zscore_lse", "behaviour_logprob")
EXACT = ("topk_ids", "topk_logprobs", "tail_logprob", "token_logprob", "token_rank", "entropy",
         "lse", "logit_mean", "logit_std", "zscore_lse", "draw_ids", "draw_counts",
         "behaviour_logprob", "token_ids")  # fmt: skip


class Streams:
    """Section 6.1."""

    def __init__(self, blob: bytes):
        assert xxhash.xxh3_64_intdigest(blob[:-8]) == int.from_bytes(blob[-8:], "little")
        magic, version, _, self.rows, self.tokens, count = struct.unpack_from("<2sBBIIH", blob)
        assert (magic, version) == (b"SR", 1)
        self.parts, at = {}, 14 + 6 * count
        for line in range(count):
            number, kind, size = struct.unpack_from("<BBI", blob, 14 + 6 * line)
            self.parts[number] = kind, blob[at : at + size]
            at += size

    def __contains__(self, number: int) -> bool:
        return number in self.parts

    def __call__(self, number: int, count: int) -> np.ndarray:
        kind, payload = self.parts[number]
        if kind >> 4 == 1:
            values = standalone.simple_decompress(payload)
            return np.empty(0, TYPES[kind & 15]) if values is None else values
        values = np.frombuffer(payload, TYPES[kind & 15])
        return np.repeat(values, count) if kind >> 4 == 2 else values


def levels_of(book: dict, finer: int) -> np.ndarray:
    """Section 6.3: the value of every level, float32."""
    edges = [0.0]
    while edges[-1] < book["floor"]:
        width = book["first_step"] / 2**finer * np.exp(book["gamma"] * edges[-1])
        edges.append(edges[-1] + min(book["max_step"] / 2**finer, width))
    edges = np.array(edges)
    return np.append(-(edges[1:] + edges[:-1]) / 2, -np.inf).astype(np.float32)


def read(blob: bytes, facts: dict, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every signal of a record of profile `small` or `strict` that has lists."""
    streams = Streams(blob)
    rows, k = streams.rows, facts["k"]
    finer, scale = (int(v) for v in streams(16, 2))
    value = levels_of(facts["codebook"], finer)
    mass = np.rint(2.0**40 * np.exp(value.astype(np.float64))).astype(np.int64)
    counts = streams(17, rows).astype(int) if 17 in streams else np.full(rows, k)
    classes, lists, common = streams(18, rows), tables["lists"], tables["common"]

    def id_of(t: int, rank: int) -> int:
        n = lists.shape[1]
        return int(lists[classes[t], rank]) if rank < n else int(common[rank - n])

    gaps = [iter(streams(20 + i, rows * k).tolist()) for i in range(5)]
    steps = iter(streams(25, rows * k).tolist())
    levels = np.full((rows, k), -1)
    found = {
        "topk_ids": np.full((rows, k), -1, np.int32),
        "topk_logprobs": np.full((rows, k), -np.inf, np.float32),
        "tail_logprob": value[streams(19, rows)].copy(),
    }
    for t in range(rows):
        level = rank = quad = 0
        for r in range(counts[t]):
            if r < 4:
                gap = next(gaps[min(r, 1)])
            else:
                if r % 4 == 0:
                    quad = next(gaps[2 + (r >= 16) + (r >= 64)])
                gap = sum((quad >> (4 * b + r % 4) & 1) << b for b in range(16))
            level += gap
            rank = next(steps) + (rank if r and gap == 0 else 0)
            levels[t, r] = level
            found["topk_ids"][t, r] = id_of(t, rank)
            found["topk_logprobs"][t, r] = value[level]
        if scale:
            total = mass[levels[t, : counts[t]]].sum() + mass[streams(19, rows)[t]]
            shift = np.float32(np.log(float(total)) - 40 * np.log(2.0))
            found["topk_logprobs"][t, : counts[t]] -= shift
            found["tail_logprob"][t] -= shift
    places = _tokens(streams, found, common, id_of, k)
    _ranks(streams, found, places, levels, k)
    _draws(streams, found, id_of, facts["draws"])
    _scalars(streams, found, places, counts, facts)
    return found


def _tokens(streams, found, common, id_of, k) -> np.ndarray:
    """Section 6.5: tokens, and their places in the lists."""
    rows = streams.rows
    places = streams(29, rows).astype(int)
    outside = iter(streams(30, int((places == k).sum())).tolist())
    following = [
        id_of(t, next(outside)) if place == k else found["topk_ids"][t, place]
        for t, place in enumerate(places)
    ]
    prompt = common[streams(31, streams.tokens - rows)]
    found["token_ids"] = np.concatenate([prompt, following]).astype(np.int32)
    return places


def _ranks(streams, found, places, levels, k) -> None:
    alone, grouped, outside = (iter(streams(n, streams.rows).tolist()) for n in (32, 33, 34))
    ranks = []
    for t, place in enumerate(places):
        if place == k:
            ranks.append(1 + k + next(outside))
            continue
        group = np.flatnonzero(levels[t] == levels[t, place])
        ranks.append(1 + group[0] + (next(alone) if len(group) == 1 else next(grouped)))
    found["token_rank"] = np.array(ranks, np.int32)


def _draws(streams, found, id_of, draws) -> None:
    sizes = streams(26, streams.rows).astype(int)
    steps, times = (streams(n, int(sizes.sum())) for n in (27, 28))
    ids = np.full((streams.rows, draws), -1, np.int32)
    counts = np.zeros_like(ids)
    at = 0
    for t, size in enumerate(sizes):
        ranks = np.cumsum(steps[at : at + size].astype(int))
        ids[t, :size] = [id_of(t, rank) for rank in ranks]
        counts[t, :size] = times[at : at + size].astype(int) + 1
        at += size
    found["draw_ids"], found["draw_counts"] = ids, counts


def _scalars(streams, found, places, counts, facts) -> None:
    """Section 6.6."""
    rows = streams.rows
    logprobs, tail = found["topk_logprobs"], found["tail_logprob"].astype(np.float64)
    listed = np.where(np.isfinite(logprobs), logprobs, 0).astype(np.float64)
    at = np.minimum(places, counts - 1)
    entropy = -(np.exp(logprobs, dtype=np.float64) * listed).sum(axis=1)
    entropy += np.exp(tail) * (6 - np.where(np.isfinite(tail), tail, 0))
    predicted = {"token_logprob": listed[np.arange(rows), at], "entropy": entropy}
    for number, name in enumerate(SCALARS):
        step = (1 / 256 if name == "behaviour_logprob" else 1 / 64) / (
            4 if facts["profile"] == "strict" else 1
        )
        width = facts["temperatures"] if name == "lse" else 1
        if 48 + number in streams:
            q = streams(48 + number, rows * width).reshape(width, rows).T
            exact = predicted.get(name, np.zeros(rows))[:, None] + step * q
            found[name] = exact.astype(np.float32).reshape((rows, width) if name == "lse" else rows)
        else:
            kept = streams(EXACT.index(name), rows * width)
            found[name] = kept.reshape((rows, width) if name == "lse" else rows)
    found["logit_std"] = (streams(55, rows) << 14).astype("<u4").view(np.float32)
