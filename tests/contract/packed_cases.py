"""Packed top-k lists: as a cache of profile small or strict holds them, or made up.

Made-up ones need no codec, so that the kernels' contract runs where no cache can be read.
"""

import numpy as np
import torch

from stillroom.pipeline.kernels.packed_topk import PackedTopk


def packed_lists(rows=11, words=131, k=7, *, strict=False, spread=2.0, seed=0):
    """(packed, decoded lists): random rows, coded by the cache's own coder; some end early."""
    from stillroom.cache_schemas.codebook import Codebook
    from stillroom.cache_schemas.rankings import Rankings
    from stillroom.cache_schemas.topk_streams import TopkCoder

    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, words, generator=random, dtype=torch.float64)
    logprobs, ids = (t.numpy() for t in logits.log_softmax(1).topk(k, 1))
    logprobs, ids = logprobs.astype(np.float32), ids.astype(np.int32)
    if k > 2:
        ids[::4, -2:], logprobs[::4, -2:] = -1, -np.inf
    mass = np.exp(logprobs.astype(np.float64)).sum(1)
    tail = np.log(np.maximum(1 - mass, 1e-9)).astype(np.float32)
    sample = {"topk_logprobs": logprobs, "tail_logprob": tail}
    codebook = Codebook.strict() if strict else Codebook.fit([sample], 1e-4)
    rankings = Rankings.fit(ids, words)
    coder = TopkCoder(codebook, rankings, np.inf, normalise=not strict)
    _, lists, _ = coder.encode(ids, logprobs, tail, rankings.choose(ids))
    return PackedTopk.pack(lists, rankings), lists


def made_up(rows=11, words=131, k=7, *, wide=False, seed=0):
    """Rows of random levels and ranks under two classes of half the words; some end early.

    With `wide`, gaps and ranks need more than a byte and two.
    """
    random = torch.Generator().manual_seed(seed)
    length, classes = words // 2, 2
    gaps = torch.randint(0, 300 if wide else 60, (rows, k), generator=random)
    gaps[:, 0] = 0
    first = torch.randint(0, 40, (rows,), generator=random)
    orders = torch.stack([torch.randperm(words, generator=random) for _ in range(classes + 1)])
    lookup = torch.cat([orders[0], orders[1:, :length].flatten()])
    class_of = torch.randint(0, classes, (rows,), generator=random)
    counts = torch.full((rows,), k)
    if k > 2:
        counts[::4] -= 2
    ranks = torch.stack(
        [_distinct_ranks(orders[0], orders[1 + c, :length], k, random) for c in class_of.tolist()]
    )
    top = int((first + gaps.sum(1)).max()) + 1
    return PackedTopk(
        gaps=gaps.int() if wide else gaps.to(torch.uint8),
        first=first.int(),
        ranks=ranks.int() if wide else ranks.to(torch.int16),
        classes=class_of.to(torch.uint8),
        counts=counts.int(),
        shift=-torch.rand(rows, generator=random) - float(np.log(k)),
        scale=1.0,
        table=-0.02 * torch.arange(top),
        lookup=lookup.int(),
        length=length,
        words=words,
    )


def _distinct_ranks(common, own, k, random):
    """k ranks of one class that name k words: a rank from `len(own)` on is a place in `common`."""
    words = torch.randperm(len(common), generator=random)[:k].tolist()
    places = {word: len(own) + place for place, word in enumerate(common.tolist())}
    places |= {word: rank for rank, word in enumerate(own.tolist())}
    return torch.tensor([places[word] for word in words])
