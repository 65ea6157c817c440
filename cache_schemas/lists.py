"""What a record's top-k lists are once decoded, and what may be wrong with those given.

One idea: everything beside the lists is predicted from `Lists`, so encoder and decoder share it.
"""

from dataclasses import dataclass

import numpy as np

from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.errors import CacheError
from stillroom.cache_schemas.streams import corrupt


@dataclass(frozen=True, slots=True)
class Lists:
    """Decoded top-k lists, and what they were coded with.

    Attributes:
        ids, logprobs: int32, float32 [R, k]; padded with -1 and -inf.
        tail: float32 [R], or empty where the record has none.
        levels: uint32 [R, k]; equal levels are one group.
        counts: int32 [R] entries before the padding.
        classes: uint8 [R].
        shifts: float32 [R], taken from the values of the levels so that a row sums to one.
        table: of the levels.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    levels: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    shifts: np.ndarray
    table: "LevelTable"

    def rounding(self) -> np.ndarray:
        """KL divergence that rounding to levels costs each row, as far as the lists tell, nats [R].

        An entry anywhere in its level of width w costs p (1 - p) w^2 / 24 on average: p w^2 / 24
        (see `codebook`), less what normalising the row gives back.
        """
        widths = np.append(np.diff(self.table.edges), 0.0)
        held = self.ids >= 0
        width = widths[np.where(held, self.levels, len(widths) - 1)]  # [R, k], nats
        p = np.where(held, np.exp(self.logprobs, dtype=np.float64), 0.0)
        return (p * (1 - p) * width**2).sum(axis=1) / 24


@dataclass(frozen=True, slots=True)
class RowError:
    """What coding did to a record's rows: KL(given || decoded) in nats, max |delta log p|."""

    kl_sum: float = 0.0
    kl_max: float = 0.0
    delta_max: float = 0.0
    rows: int = 0

    @property
    def kl_mean(self) -> float:
        """Mean KL over rows; 0 without rows."""
        return self.kl_sum / max(self.rows, 1)


@dataclass(frozen=True, slots=True)
class LevelTable:
    """Edges, log-probabilities, probabilities and masses (probabilities in units of 2**-MASS_BITS)
    of a codebook's levels, and where the search for one starts (see `coarse_levels`)."""

    edges: np.ndarray
    coarse: np.ndarray
    per_nat: float
    logprobs: np.ndarray
    probabilities: np.ndarray
    masses: np.ndarray

    @property
    def search(self) -> tuple[np.ndarray, np.ndarray, float]:
        """What the search for a level needs."""
        return self.edges, self.coarse, self.per_nat

    @classmethod
    def of(cls, codebook: Codebook) -> "LevelTable":
        """The table of a codebook."""
        from stillroom.cache_schemas.kernels.topk import MASS_BITS, coarse_levels

        edges, logprobs = codebook.edges, codebook.logprobs
        probabilities = np.exp(logprobs.astype(np.float64))
        masses = np.rint(probabilities * 2.0**MASS_BITS).astype(np.int64)
        coarse, per_nat = coarse_levels(edges)
        return cls(edges, coarse, per_nat, logprobs, probabilities, masses)


def refuse(status: tuple[int, int]) -> None:
    """Turn a decoding kernel's status into a corrupt record."""
    code, row = status
    if code:
        corrupt(f"row {row} names a level or rank that does not exist")


def explain(signal: str, ids: np.ndarray, values: np.ndarray, code: int, row: int) -> None:
    """Turn a kernel's status into an error that names signal, row, value and bound."""
    from stillroom.cache_schemas.kernels import topk

    if not code:
        return
    problems = {
        topk.BAD_ID: ("topk_ids", f"id {ids[row].max(initial=-1)}", "an id of the vocabulary"),
        topk.BAD_PADDING: ("topk_ids", "an entry after the padding", "-1 with -inf to the end"),
        topk.BAD_LOGPROB: (
            signal if signal != "topk" else "topk_logprobs",
            f"log-probability {np.max(values[row]):.6g}",
            f"at most 0 (+{topk.SLACK})",
        ),
    }
    signal, found, bound = problems[code]
    raise CacheError(found, expected=bound, where=f"signal {signal}, row {row}")


def repeated(ids: np.ndarray) -> np.ndarray:
    """bool [R]: whether a row of ids [R, k] names one twice; -1 pads."""
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return twice.any(axis=1)
