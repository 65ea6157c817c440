"""Packed lists say what the cache's own decoder says."""

import numpy as np
import pytest
import torch

from pipeline.kernels.packed_topk import PackedTopk
from tests.contract.packed_cases import packed_lists


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("words", "k"), [(131, 7), (20_000, 64), (70_000, 3), (50, 1), (600, 512)])
def test_it_unpacks_to_what_the_cache_decodes(words, k, strict):
    packed, lists = packed_lists(40, words, k, strict=strict)
    ids, logprobs = packed.unpack()
    assert np.array_equal(ids.numpy(), lists.ids)
    inside = lists.ids >= 0
    assert np.allclose(logprobs.numpy()[inside], lists.logprobs[inside], rtol=0, atol=4e-6)
    assert np.isneginf(logprobs.numpy()[~inside]).all()


def test_far_apart_levels_widen_the_gaps():
    packed, lists = packed_lists(spread=40.0, strict=True)
    assert packed.gaps.dtype == torch.int32
    assert np.array_equal(packed.unpack()[0].numpy(), lists.ids)


def test_a_row_is_three_bytes_an_entry():
    packed, _ = packed_lists(64, 20_000, 64)
    assert packed.row_bytes <= 3 * 64 + 17
    assert packed.row_bytes < 0.45 * 8 * 64


def test_records_join_though_their_codebooks_differ():
    parts = [
        packed_lists(5, strict=strict, seed=seed)[0] for strict, seed in ((True, 0), (False, 0))
    ]
    shared = [PackedTopk.cat([part]) for part in parts]
    joined = PackedTopk.cat(parts)
    rows = [part.unpack() for part in shared]
    for column, found in enumerate(joined.unpack()):
        expected = torch.cat([row[column] for row in rows])
        assert torch.equal(found, expected)
    assert torch.equal(joined[3:7].unpack()[0], joined.unpack()[0][3:7])
