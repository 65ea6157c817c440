"""Packed lists say what the cache's decoder says, and the divergence of both is the same."""

import numpy as np
import pytest
import torch

from pipeline.kernels.packed_topk import PackedTopk
from pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import DEVICE, IMPLEMENTATIONS, error, make_case
from tests.contract.packed_cases import packed_lists


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return request.param


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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "adaptive_kl"])
@pytest.mark.parametrize("strict", [False, True])
def test_the_divergence_is_that_of_the_plain_lists(impl, divergence, strict):
    packed, _ = packed_lists(strict=strict)
    case = make_case(divergence=divergence)
    case.ids, case.logprobs = (t.to(DEVICE) for t in packed.unpack())
    plain = case.run(impl)
    case.ids, case.logprobs = packed.to(DEVICE), None
    found = case.run(impl)
    for name in plain:
        assert error(found[name], plain[name]) < 1e-6, name


def test_another_temperature(impl):
    """log p_T = (log p_1 + lse_1) / T - lse_T, in the row's shift."""
    packed, _ = packed_lists(strict=True)
    lse_one, lse = torch.randn(11) + 5, torch.randn(11) + 6
    ids, logprobs = packed.unpack()
    logprobs = (logprobs + lse_one[:, None]) / 2 - lse[:, None]
    case = make_case(temperature=2.0)
    case.ids, case.logprobs = ids.to(DEVICE), logprobs.to(DEVICE)
    plain = case.run(impl, debug=False)
    case.ids, case.logprobs = packed.at_temperature(2.0, lse_one, lse).to(DEVICE), None
    assert error(case.run(impl, debug=False)["loss"], plain["loss"]) < 2e-6


def test_rows_of_weight_zero_are_left_out(impl):
    packed, _ = packed_lists()
    case = make_case(weights=torch.tensor([1.0, 0.0] * 5 + [2.0]))
    case.ids, case.logprobs = (t.to(DEVICE) for t in packed.unpack())
    plain = case.run(impl)
    case.ids, case.logprobs = packed.to(DEVICE), None
    assert error(case.run(impl)["unembedding"], plain["unembedding"]) < 1e-6


@pytest.mark.parametrize(
    ("rows", "logprobs", "message"),
    [
        (10, None, r"ids: found packed lists \(10, 7\); expected \[11, k\]"),
        (11, torch.zeros(11, 7), r"logprobs: are in the packed lists already"),
    ],
)
def test_bad_arguments_are_named(rows, logprobs, message):
    packed, _ = packed_lists(rows)
    case = make_case()
    with pytest.raises(ValueError, match=message):
        topk_divergence(case.hidden, case.unembedding, packed, logprobs)


def test_plain_ids_need_logprobs():
    case = make_case()
    with pytest.raises(ValueError, match="logprobs: missing"):
        topk_divergence(case.hidden, case.unembedding, case.ids)
