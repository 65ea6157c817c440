"""A reader of records written from FORMAT.md alone: NumPy, pcodec, xxhash, none of our code.

One idea: if this short program reads every record, whatever its profile, section 6 says enough. It
is slow and trusts its input, but for the number of elements of each stream.
"""

import math
import struct

import numpy as np
import xxhash
from pcodec import standalone

TYPES = ("u1", "<u2", "<u4", "<i4", "<f4", "<u8", "<i2")
SCALARS = ("token_logprob", "entropy", "lse", "logit_mean", "zscore_lse", "behaviour_logprob",
           "tail_logprob")  # fmt: skip
WIDTHS = {"topk_ids": "k", "topk_logprobs": "k", "draw_ids": "draws", "draw_counts": "draws",
          "lse": "temperatures"}  # fmt: skip
EXACT = ("topk_ids", "topk_logprobs", "tail_logprob", "token_logprob", "token_rank", "entropy",
         "lse", "logit_mean", "logit_std", "zscore_lse", "draw_ids", "draw_counts",
         "behaviour_logprob", "token_ids")  # fmt: skip


class Streams:
    """Section 6.1."""

    def __init__(self, blob: bytes):
        assert xxhash.xxh3_64_intdigest(blob[:-8]) == int.from_bytes(blob[-8:], "little")
        head = struct.unpack_from("<2sBBIIH", blob)
        magic, version, self.profile, self.rows, self.tokens, count = head
        assert (magic, version) == (b"SR", 1)
        self.parts, at = {}, 14 + 6 * count
        for line in range(count):
            number, kind, size = struct.unpack_from("<BBI", blob, 14 + 6 * line)
            self.parts[number] = kind, blob[at : at + size]
            at += size
        assert at == len(blob) - 8

    def __contains__(self, number: int) -> bool:
        return number in self.parts

    def __call__(self, number: int, count: int) -> np.ndarray:
        kind, payload = self.parts[number]
        if kind >> 4 == 1:
            values = standalone.simple_decompress(payload)
        else:
            values = np.frombuffer(payload, TYPES[kind & 15])
            values = np.repeat(values, count) if kind >> 4 == 2 else values
        assert values.size == count, number
        return values


def levels_of(book: dict, finer: int) -> np.ndarray:
    """Section 6.3: the value of every level, float32."""
    edges = [0.0]
    while edges[-1] < book["floor"]:
        width = book["first_step"] / 2**finer * np.exp(book["gamma"] * edges[-1])
        edges.append(edges[-1] + min(book["max_step"] / 2**finer, width))
    edges = np.array(edges)
    return np.append(-(edges[1:] + edges[:-1]) / 2, -np.inf).astype(np.float32)


def read(blob: bytes, facts: dict, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every signal that a record holds, and its tokens."""
    streams = Streams(blob)
    assert streams.profile == {"exact": 0, "small": 1, "strict": 2}[facts["profile"]]
    found: dict[str, np.ndarray] = {}
    lists = Lists(streams, facts, tables) if 16 in streams else None
    if lists is not None:
        found |= lists.signals()
        if 31 in streams:
            found["token_ids"] = lists.tokens()
        if 32 in streams:
            found["token_rank"] = lists.ranks()
        if 26 in streams:
            found["draw_ids"], found["draw_counts"] = lists.draws(facts["draws"])
    found |= _scalars(streams, lists, facts)
    return found | _kept(streams, facts)  # section 6.2: these first


def _kept(streams: Streams, facts: dict) -> dict[str, np.ndarray]:
    """Section 6.2."""
    found, rows = {}, streams.rows
    for number, name in enumerate(EXACT):
        if number in streams:
            width = facts[WIDTHS[name]] if name in WIDTHS else 1
            count = streams.tokens if name == "token_ids" else rows * width
            flat = streams(number, count)
            found[name] = flat.reshape(rows, width) if name in WIDTHS else flat
    return found


class Lists:
    """Section 6.4, and 6.5 that builds on it."""

    def __init__(self, streams: Streams, facts: dict, tables: dict[str, np.ndarray]):
        self.streams, self.rows, self.k = streams, streams.rows, facts["k"]
        self.finer, self.scale = (int(v) for v in streams(16, 2))
        self.value = levels_of(facts["codebook"], self.finer)
        self.counts = np.full(self.rows, self.k)
        if 17 in streams:
            self.counts = streams(17, self.rows).astype(int)
        self.classes = streams(18, self.rows)
        self.table, self.common = tables["lists"], tables["common"]
        self.levels = np.full((self.rows, self.k), -1)
        self.ids = np.full((self.rows, self.k), -1, np.int32)
        self.logprobs = np.full((self.rows, self.k), -np.inf, np.float32)
        self.tail_levels = streams(19, self.rows) if 19 in streams else None
        self.tail = None if self.tail_levels is None else self.value[self.tail_levels].copy()
        self._fill()
        places = 29 in streams
        self.places = streams(29, self.rows).astype(int) if places else np.empty(0, int)

    def id_of(self, t: int, rank: int) -> int:
        n = self.table.shape[1]
        return int(self.table[self.classes[t], rank] if rank < n else self.common[rank - n])

    def _gap_sizes(self) -> list[int]:
        n = self.counts
        quads = [
            int((-(-np.clip(n - start, 0, end - start) // 4)).sum())
            for start, end in ((4, 16), (16, 64), (64, 1 << 16))
        ]
        return [int((n > 0).sum()), int(np.clip(n - 1, 0, 3).sum()), *quads]

    def _fill(self) -> None:
        sizes = self._gap_sizes()
        gaps = [iter(self.streams(20 + i, size).tolist()) for i, size in enumerate(sizes)]
        steps = iter(self.streams(25, int(self.counts.sum())).tolist())
        for t in range(self.rows):
            level = rank = quad = 0
            for r in range(self.counts[t]):
                if r < 4:
                    gap = next(gaps[min(r, 1)])
                else:
                    if r % 4 == 0:
                        quad = next(gaps[2 + (r >= 16) + (r >= 64)])
                    gap = sum((quad >> (4 * b + r % 4) & 1) << b for b in range(16))
                level += gap
                rank = next(steps) + (rank if r and gap == 0 else 0)
                self.levels[t, r], self.ids[t, r] = level, self.id_of(t, rank)
                self.logprobs[t, r] = self.value[level]
            if self.scale and self.tail is not None:
                self._shift(t)

    def _shift(self, t: int) -> None:
        mass = np.rint(2.0**40 * np.exp(self.value.astype(np.float64))).astype(np.int64)
        held = self.counts[t]
        total = int(mass[self.levels[t, :held]].sum() + mass[self.tail_levels[t]])
        if total > 0:
            shift = np.float32(math.log(total) - 40 * math.log(2.0))
            self.logprobs[t, :held] -= shift
            self.tail[t] -= shift

    def signals(self) -> dict[str, np.ndarray]:
        found = {"topk_ids": self.ids, "topk_logprobs": self.logprobs}
        return found if self.tail is None else found | {"tail_logprob": self.tail}

    def tokens(self) -> np.ndarray:
        """Section 6.5: tokens before the rows, and each token after one."""
        tokens, rows = self.streams.tokens, self.rows
        after = tokens > rows > 0
        prompt = self.common[self.streams(31, tokens - rows if after else tokens)]
        following = []
        if after:
            outside = iter(self.streams(30, int((self.places == self.k).sum())).tolist())
            following = [
                self.id_of(t, next(outside)) if place == self.k else self.ids[t, place]
                for t, place in enumerate(self.places)
            ]
        return np.concatenate([prompt, following]).astype(np.int32)

    def ranks(self) -> np.ndarray:
        first, kinds = [], []
        for t, place in enumerate(self.places):
            group = np.empty(0, int)
            if place < self.k:
                group = np.flatnonzero(self.levels[t] == self.levels[t, place])
            first.append(group[0] if group.size else self.k)
            kinds.append(34 if not group.size else 32 if group.size == 1 else 33)
        rest = {n: iter(self.streams(n, kinds.count(n)).tolist()) for n in (32, 33, 34)}
        return np.array([1 + f + next(rest[n]) for f, n in zip(first, kinds)], np.int32)

    def draws(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.streams(26, self.rows).astype(int)
        steps, times = (self.streams(n, int(sizes.sum())) for n in (27, 28))
        ids = np.full((self.rows, width), -1, np.int32)
        counts = np.zeros_like(ids)
        at = 0
        for t, size in enumerate(sizes):
            ranks = np.cumsum(steps[at : at + size].astype(int))
            ids[t, :size] = [self.id_of(t, rank) for rank in ranks]
            counts[t, :size] = times[at : at + size].astype(int) + 1
            at += size
        return ids, counts

    def entropy(self) -> np.ndarray:
        """Section 6.6, float64."""
        logp = np.where(np.isfinite(self.logprobs), self.logprobs, 0).astype(np.float64)
        p = np.where(np.isfinite(self.logprobs), np.exp(self.logprobs, dtype=np.float64), 0)
        found = -(p * logp).sum(axis=1)
        if self.tail is not None:
            tail = self.tail.astype(np.float64)
            found += np.exp(tail) * (6 - np.where(np.isfinite(tail), tail, 0))
        return found

    def at_places(self) -> np.ndarray:
        """Section 6.6, float64; the last entry for a token that is not listed."""
        found = np.zeros(self.rows)
        for t, place in enumerate(self.places):
            place = place if place < self.k else self.counts[t] - 1
            if place >= 0 and np.isfinite(self.logprobs[t, place]):
                found[t] = self.logprobs[t, place]
        return found


def _scalars(streams: Streams, lists: Lists | None, facts: dict) -> dict[str, np.ndarray]:
    """Section 6.6."""
    rows, found = streams.rows, {}
    for number, name in enumerate(SCALARS):
        if 48 + number not in streams:
            continue
        step = (1 / 256 if name == "behaviour_logprob" else 1 / 64) / (
            4 if facts["profile"] == "strict" else 1
        )
        predicted = np.zeros(rows)
        if lists is not None and name == "entropy":
            predicted = lists.entropy()
        if lists is not None and name == "token_logprob":
            predicted = lists.at_places()
        width = facts["temperatures"] if name == "lse" else 1
        q = streams(48 + number, rows * width).reshape(width, rows).T.astype(np.float64)
        exact = (predicted[:, None] + q * step).astype(np.float32)
        found[name] = exact if name == "lse" else exact[:, 0]
    if 55 in streams:
        found["logit_std"] = (streams(55, rows) << 14).astype("<u4").view(np.float32)
    return found
