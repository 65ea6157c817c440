"""Chunks of more elements than int32 counts: each Triton sweep finds its rows, and only those.

Two rows lie 2^31 elements apart, in memory of which only the pages that are touched exist. In a
process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import subprocess
import sys

import torch

from stillroom.pipeline.kernels.dense_sweep import DenseTargets
from stillroom.pipeline.kernels.divergences import Objective
from stillroom.pipeline.kernels.targets import Targets
from stillroom.pipeline.kernels.vocabulary_shards import Shard

WORDS, APART = 100, 2**31


def far_apart(logits):
    """The rows, `APART` elements from each other; behind each a word that must stay as it is."""
    storage = torch.empty(APART + 2 * WORDS, dtype=torch.bfloat16)
    buffer = storage.as_strided((2, WORDS + 1), (APART, 1))
    buffer[:, :WORDS], buffer[:, WORDS] = logits, 7.0
    return buffer


def sparse_targets():
    logprobs, ids = torch.randn(2, WORDS).log_softmax(1).topk(5, 1)
    return Targets(ids, logprobs, torch.tensor([3, 99]), None)


def dense_targets():
    return DenseTargets(
        torch.randn(2, 8), torch.randn(WORDS, 8), None, None, torch.tensor([3, 99]), None
    )


def check():
    """Run by the test, under the interpreter."""
    from stillroom.pipeline.kernels.triton import (
        dense_sweep as triton_dense_sweep,
    )
    from stillroom.pipeline.kernels.triton import (
        shard_sweep as triton_shard_sweep,
    )
    from stillroom.pipeline.kernels.triton import (
        sweep as triton_sweep,
    )

    torch.manual_seed(0)
    objective, shard = Objective(ce_weight=0.5), Shard.whole(WORDS)
    for sweep, targets in (
        (triton_sweep.sweep, sparse_targets()),
        (triton_shard_sweep.sweep, sparse_targets()),
        (triton_dense_sweep.sweep, dense_targets()),
    ):
        near = torch.cat([torch.randn(2, WORDS).bfloat16(), torch.full((2, 1), 7.0).bfloat16()], 1)
        far = far_apart(near[:, :WORDS])
        losses = [sweep(buffer, targets, objective, shard, True) for buffer in (near, far)]
        assert torch.equal(*losses)
        assert torch.equal(near, far)
        assert (far[:, WORDS] == 7.0).all()
        assert not torch.equal(near[0], near[1])


def check_words_beyond_the_head():
    """`debug` names them; without it they must not touch the next row."""
    from stillroom.pipeline.kernels.triton import (
        dense_sweep as triton_dense_sweep,
    )
    from stillroom.pipeline.kernels.triton import (
        sweep as triton_sweep,
    )

    torch.manual_seed(0)
    shard, objective = Shard.whole(WORDS), Objective(ce_weight=0.5)
    for sweep, targets in (
        (triton_sweep.sweep, sparse_targets()),
        (triton_dense_sweep.sweep, dense_targets()),
    ):
        buffer = torch.full((3, WORDS + 28), 7.0)
        buffer[:, :WORDS] = torch.randn(3, WORDS)
        if isinstance(targets, Targets):
            targets.ids[:, 2] = WORDS + 5
        targets.labels[0] = WORDS + 3
        sweep(buffer[:2], targets, objective, shard, True)
        assert (buffer[:, WORDS:] == 7.0).all()


def test_rows_beyond_int32_and_words_beyond_the_head():
    program = "from tests.contract import test_large_chunks as t; t.check()"
    program += "; t.check_words_beyond_the_head(); print('passed')"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "passed", run.stderr[-3000:]
