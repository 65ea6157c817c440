"""The divergence of packed lists is that of the lists they unpack to."""

import pytest
import torch

from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_same,
    error,
    judged,
    make_case,
)
from tests.contract.packed_cases import made_up


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return request.param


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "adaptive_kl"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_divergence_is_that_of_the_plain_lists(impl, divergence, wide):
    packed = made_up(wide=wide)
    case = make_case(divergence=divergence, dtype=judged(impl))
    case.ids, case.logprobs = (t.to(DEVICE) for t in packed.unpack())
    plain = case.run(impl)
    case.ids, case.logprobs = packed.to(DEVICE), None
    found = case.run(impl)
    for name in plain:
        assert_same(found[name], plain[name], name)


def test_another_temperature(impl):
    """log p_T = (log p_1 + lse_1) / T - lse_T, in the row's shift.

    Either way adds fp32 numbers below 16 three times: each sum is within 2^-21, which is the
    relative error of a probability.
    """
    packed = made_up()
    lse_one, lse = torch.randn(11) + 5, torch.randn(11) + 6
    ids, logprobs = packed.unpack()
    logprobs = (logprobs + lse_one[:, None]) / 2 - lse[:, None]
    case = make_case(temperature=2.0, dtype=judged(impl))
    case.ids, case.logprobs = ids.to(DEVICE), logprobs.to(DEVICE)
    plain = case.run(impl, debug=False)
    case.ids, case.logprobs = packed.at_temperature(2.0, lse_one, lse).to(DEVICE), None
    assert error(case.run(impl, debug=False)["loss"], plain["loss"]) < 2 * 3 * 2.0**-21


def test_rows_of_weight_zero_are_left_out(impl):
    packed = made_up()
    case = make_case(weights=torch.tensor([1.0, 0.0] * 5 + [2.0]), dtype=judged(impl))
    case.ids, case.logprobs = (t.to(DEVICE) for t in packed.unpack())
    plain = case.run(impl)
    case.ids, case.logprobs = packed.to(DEVICE), None
    assert_same(case.run(impl)["unembedding"], plain["unembedding"])


@pytest.mark.parametrize(
    ("rows", "logprobs", "message"),
    [
        (10, None, r"ids: found packed lists \(10, 7\); expected \[11, k\]"),
        (11, torch.zeros(11, 7), r"logprobs: are in the packed lists already"),
    ],
)
def test_bad_arguments_are_named(rows, logprobs, message):
    packed = made_up(rows)
    case = make_case()
    with pytest.raises(ValueError, match=message):
        topk_divergence(case.hidden, case.unembedding, packed, logprobs)


def test_plain_ids_need_logprobs():
    case = make_case()
    with pytest.raises(ValueError, match="logprobs: missing"):
        topk_divergence(case.hidden, case.unembedding, case.ids)
