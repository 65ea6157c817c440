"""Which numbers a teacher gives for one row, and how they are laid out while they travel.

One idea: everything said about a row fits in two matrices, one int32 and one float32, with fixed
columns. Sweeps fill them, engines move them, `unpack` turns them into named signals; so a
transport (vLLM's worker-to-driver path, a queue) never needs to know a signal's name.

Layout (R rows, K top ids, D draws, T temperatures):
    ints   [R, K + 2D + 1]   topk_ids | draw_ids | draw_counts | token_rank
    floats [R, K + 2 + T + E + 3M]
           topk_logprobs | tail_logprob | token_logprob | lse | entropy? | mean, std, zscore_lse?
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stillroom.pipeline.config import Capture

MARK = "stillroom"
"""Key of our mark in a vLLM request's `extra_args`, and of our settings in `additional_config`."""
ROUNDING = 1e-4
"""Of a draw: what may go over a whole number before there is one more, so that sweeps agree."""


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What is asked of every scored row.

    Attributes:
        k: ids kept exactly.
        draws: draws from the tail, one for every 1 / draws of the probability: see
            `definition.draw_tail`.
        temperatures: rising; a log-sum-exp is kept at each, 1.0 among them.
        entropy, moments: whether these scalars are kept.
        seed: of the draws.
    """

    k: int
    draws: int
    temperatures: tuple[float, ...]
    entropy: bool
    moments: bool
    seed: int

    @classmethod
    def of(cls, capture: Capture) -> "RowSpec":
        """The part of a run's [capture] table that concerns rows."""
        return cls(
            capture.k,
            capture.tail_draws,
            kept_temperatures(capture),
            capture.entropy,
            capture.moments,
            capture.seed,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RowSpec":
        """The inverse of `to_json`."""
        numbers: dict[str, Any] = data | {"temperatures": tuple(data["temperatures"])}
        return cls(**numbers)

    def to_json(self) -> dict:
        """Plain JSON, for the trip into another process."""
        return asdict(self) | {"temperatures": list(self.temperatures)}

    @property
    def int_columns(self) -> int:
        """Width of the int32 matrix."""
        return self.k + 2 * self.draws + 1  # ids, draws and counts, the rank

    @property
    def float_columns(self) -> int:
        """Width of the float32 matrix."""
        # Log-probabilities, tail and token, log-sum-exps, the scalars asked for.
        return self.k + 2 + len(self.temperatures) + self.entropy + 3 * self.moments

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row in both matrices."""
        return 4 * (self.int_columns + self.float_columns)  # both have 4-byte numbers

    def unpack(self, ints: np.ndarray, floats: np.ndarray) -> dict[str, np.ndarray]:
        """Named signals (see `stillroom.cache_schemas.signals`) from the two matrices."""
        k, draws, num_temperatures = self.k, self.draws, len(self.temperatures)
        id_parts = np.split(ints, [k, k + draws, k + 2 * draws], axis=1)
        # The top k, the tail, the token, the temperatures, the rest.
        parts = np.split(floats, [k, k + 1, k + 2, k + 2 + num_temperatures], axis=1)
        signals = {
            "topk_ids": id_parts[0],
            "topk_logprobs": parts[0],
            "tail_logprob": parts[1][:, 0],
            "token_logprob": parts[2][:, 0],
            "token_rank": id_parts[3][:, 0],
            "lse": parts[3],
        }
        if draws:
            signals |= {"draw_ids": id_parts[1], "draw_counts": id_parts[2]}
        rest = parts[4]
        if self.entropy:
            signals["entropy"], rest = rest[:, 0], rest[:, 1:]
        if self.moments:
            names = ("logit_mean", "logit_std", "zscore_lse")
            signals |= {name: rest[:, i] for i, name in enumerate(names)}
        return {name: np.ascontiguousarray(array) for name, array in signals.items()}


def within_nucleus(signals: dict[str, np.ndarray], mass: float) -> None:
    """Cut each row's list, in place, to the fewest ids whose probabilities reach `mass`.

    What is cut off joins the tail; its places hold id -1 and -inf. A list that does not reach
    `mass` stays as it is. With `mass` 0 nothing happens.
    """
    if not mass:
        return
    logprobs = signals["topk_logprobs"]
    p = np.exp(logprobs, dtype=np.float64)  # [R, k]
    cut = np.cumsum(p, axis=1) - p >= mass  # those before an id reach the mass without it
    outside = np.where(cut, p, 0.0).sum(axis=1) + np.exp(signals["tail_logprob"], dtype=np.float64)
    changed = cut.any(axis=1)  # [R]; all others keep their tail to the bit
    signals["tail_logprob"][changed] = np.log(outside[changed])
    signals["topk_ids"][cut] = -1
    logprobs[cut] = -np.inf


def kept_temperatures(capture: Capture) -> tuple[float, ...]:
    """The temperatures of a run, rising, each once, always with 1.0."""
    return tuple(sorted({1.0, *(float(t) for t in capture.temperatures)}))


def draw_key(seed: int, example_id: str) -> int:
    """63-bit key of an example's draws: a hash, so that no example shares another's draws."""
    digest = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # never negative as an int64
