"""Packed top-k lists as a cache of profile small or strict holds them."""

import numpy as np
import torch

from cache_schemas.codebook import Codebook
from cache_schemas.rankings import Rankings
from cache_schemas.topk_streams import TopkCoder
from pipeline.kernels.packed_topk import PackedTopk


def packed_lists(rows=11, words=131, k=7, *, strict=False, spread=2.0, seed=0):
    """(packed, decoded lists): random rows, coded by the cache's own coder; some end early."""
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
    return PackedTopk.pack(lists, rankings, codebook.logprobs), lists
