"""Our layout tuned to the error of another: bytes at equal or better KL.

One idea: the budget of profile `small` is moved until its mean KL on held-out rows is just below
the other layout's; where that is zero, profile `exact` is what is left. The same rankings serve
all.
"""

import numpy as np

from benchmarks.cache_divergence import row_kl
from stillroom.cache_schemas.codebook import Codebook
from stillroom.cache_schemas.record_codec import RowCodec

GOALS = {"raw": 4.9, "parquet": 1.75, "distillkit": 1.8, "megatron": 1.9}
"""How much smaller than each other layout ours is meant to be."""

Records = list[dict[str, np.ndarray]]


def goal(layout: str) -> float:
    """The goal of a layout."""
    return next(ratio for name, ratio in GOALS.items() if layout.startswith(name))


def tuned(codec: RowCodec, kl_mean: float, samples: Records, records: Records) -> dict:
    """Bytes and error of our layout on `records` at a mean KL of at most `kl_mean` nats.

    Args:
        codec: of profile `small`; its tables are used.
        kl_mean: of the other layout.
        samples: what codebooks are fitted on.
    """
    if kl_mean == 0:
        exact = RowCodec("exact", k=codec.k, vocab_size=codec.vocab_size)
        return {"profile": "exact", **_cost(exact, records)}
    best, budget = {}, kl_mean
    for _ in range(4):
        facts = codec.facts() | {"mean_kl": budget}
        facts["codebook"] = Codebook.fit(samples, budget).facts()
        found = _cost(RowCodec.from_facts(facts, codec.tables), records)
        if found["kl_mean"] <= kl_mean:
            best = {"profile": "small", "budget": budget, **found}
        budget *= 0.999 * kl_mean / found["kl_mean"]
    return best


def _cost(codec: RowCodec, records: Records) -> dict:
    blobs = [codec.encode(record) for record in records]
    kl = np.concatenate([row_kl(record, codec.decode(b)) for record, b in zip(records, blobs)])
    rows = sum(len(record["topk_ids"]) for record in records)
    return {
        "bytes_per_token": sum(map(len, blobs)) / rows,
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
    }
