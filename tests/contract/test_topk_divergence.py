"""The contract of the top-k divergence, the same for every implementation."""

from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.pipeline.kernels.divergences import DivergenceName
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import (
    DEVICE,
    IMPLEMENTATIONS,
    ROUNDING,
    TOLERANCE,
    assert_no_worse_than_naive,
    assert_same,
    error,
    judged,
    logit_gradients,
    make_case,
    with_draws,
)

DIVERGENCES = get_args(DivergenceName)
TAILS = ("bucket", "truncate", "renormalise")
KINDS = [*product(DIVERGENCES, TAILS), ("forward_kl", "sampled")]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def labels(rows, words, seed=1):
    return torch.randint(-1, words, (rows,), generator=torch.Generator().manual_seed(seed))


def row_weights(rows, seed=2):
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    weights[rows // 2] = 0
    return weights


def of_kind(divergence, tail, **options):
    if tail == "sampled":
        return with_draws(make_case(divergence=divergence, **options), draws=5)
    return make_case(divergence=divergence, tail=tail, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_value_and_gradient_are_right(impl, divergence, tail, dtype):
    assert_no_worse_than_naive(of_kind(divergence, tail, dtype=dtype), impl)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_every_option_at_once(impl, divergence, tail):
    case = of_kind(
        divergence,
        tail,
        words=141,
        temperature=2.0,
        labels=labels(11, 131),
        ce_weight=0.7,
        softcap=3.0,
        weights=row_weights(11),
        valid_vocab=141,
    )
    assert_no_worse_than_naive(case, impl)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_temperature_cap_and_cross_entropy(impl, divergence, temperature, softcap, ce_weight):
    case = make_case(
        divergence=divergence,
        temperature=temperature,
        softcap=softcap,
        ce_weight=ce_weight,
        labels=labels(11, 131),
    )
    assert_no_worse_than_naive(case, impl)


def test_temperature_scales_value_and_gradient_by_its_square(impl):
    """With logits doubled and T = 2, x is unchanged: loss times 4, logit gradient times 4 / 2."""
    case = make_case()
    logits = torch.randn(11, 131, device=DEVICE, dtype=judged(impl))
    at_one = logit_gradients(case, impl, logits)
    at_two = logit_gradients(case, impl, 2 * logits, temperature=2.0)
    assert_same(at_two["loss"], 4 * at_one["loss"])
    assert_same(at_two["logits"], 2 * at_one["logits"])


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, 511, 512])
def test_any_k_and_either_id_dtype(impl, k, ids_dtype):
    assert_no_worse_than_naive(make_case(5, 16, 1031, k, ids_dtype=ids_dtype), impl)


@pytest.mark.parametrize("words", [2, 17, 1024, 4999])
def test_any_vocabulary(impl, words):
    assert_no_worse_than_naive(make_case(5, 8, words, 2), impl)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_words_named_is_the_dense_divergence(impl, divergence):
    """k = V and an empty tail, against formulas over the whole vocabulary."""
    logits, teacher = torch.randn(2, 6, 40, dtype=torch.float64, device=DEVICE).unbind()
    log_p, log_q = teacher.log_softmax(1), logits.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    falling = p.sort(1, descending=True).values
    head = p >= falling.gather(
        1, ((falling.cumsum(1) <= 0.5).sum(1, keepdim=True) - 1).clamp(min=0)
    )
    share = ((p - q).abs() * head).sum(1) / (p - q).abs().sum(1)
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
        "skew_forward_kl": kl(p, 0.2 * p + 0.8 * q),
        "skew_reverse_kl": kl(q, 0.8 * p + 0.2 * q),
        "tv": (p - q).abs().sum(1) / 2,
        "adaptive_kl": share * kl(p, q) + (1 - share) * kl(q, p),
    }[divergence]
    order = torch.stack([torch.randperm(40) for _ in range(6)]).to(DEVICE)
    case = make_case(6, 8, 40, 40, padding=False, divergence=divergence, beta=0.3, alpha=0.2)
    case.ids, case.logprobs = order, log_p.gather(1, order)
    found = logit_gradients(case, impl, logits.to(judged(impl)))
    assert_same(found["loss"], expected)


def test_bucket_equals_merging_the_tail_by_hand(impl):
    """KL between the k+1-outcome distributions, by its definition."""
    case = make_case(padding=False)
    logits = torch.randn(11, 131, dtype=torch.float64, device=DEVICE)
    p, q = case.logprobs.double().exp(), logits.softmax(1).gather(1, case.ids)
    p, q = (torch.cat([m, 1 - m.sum(1, keepdim=True)], 1) for m in (p, q))
    found = logit_gradients(case, impl, logits.to(judged(impl)))["loss"]
    assert_same(found, (p * (p / q).log()).sum(1))


def test_truncated_gradient_is_mass_times_renormalised(impl):
    case = make_case(padding=False)
    logits = torch.randn(11, 131, device=DEVICE, dtype=judged(impl))
    truncated = logit_gradients(case, impl, logits, tail="truncate")["logits"]
    renormalised = logit_gradients(case, impl, logits, tail="renormalise")["logits"]
    mass = case.logprobs.double().exp().sum(1, keepdim=True)
    assert_same(truncated, mass * renormalised)


def test_sampled_tail_is_unbiased(impl):
    """One draw from the tail, averaged over every word it could be: the full forward KL's
    gradient, q - p."""
    words, k = 23, 4
    case = make_case(1, 8, words, k, padding=False)
    logits, teacher = torch.randn(2, 1, words, device=DEVICE, dtype=judged(impl)).unbind()
    log_p = teacher.log_softmax(1)
    case.logprobs, case.ids = log_p.topk(k, 1)
    p = log_p.exp()
    tail = [w for w in range(words) if w not in case.ids[0].tolist()]
    mass = p[0, tail].sum()
    mean = torch.zeros_like(logits)
    for word in tail:
        draw = {"tail_ids": torch.tensor([[word]], device=DEVICE), "tail_weights": mass[None, None]}
        gradient = logit_gradients(case, impl, logits, tail="sampled", **draw)["logits"]
        mean += p[0, word] / mass * gradient
    assert_same(mean, logits.softmax(1) - p)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_gradient_rows_sum_to_zero(impl, divergence, tail):
    case = of_kind(divergence, tail, labels=labels(11, 131), ce_weight=0.5, temperature=2.0)
    logits = 2 * torch.randn(11, 131, device=DEVICE, dtype=judged(impl))
    gradient = logit_gradients(case, impl, logits)["logits"]
    sums = gradient.sum(1).abs() / gradient.abs().sum(1)
    assert (sums <= ROUNDING[gradient.dtype]).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail_mass", [1e-2, 1e-5, 1e-7, 1e-9, 1e-11])
def test_student_tail_mass_is_summed_directly(impl, divergence, tail_mass):
    """The student's tail down to 1e-11, where 1 - sum of the k has no digit left.

    Its log-probabilities lie near -30, where fp32 numbers are 2^-19 apart: the relative error of
    its probabilities is two such roundings.
    """
    case = make_case(8, 16, 301, 6, padding=False, divergence=divergence)
    logits = torch.randn(8, 301, device=DEVICE)
    odds = torch.logsumexp(logits, 1, keepdim=True) + torch.tensor(tail_mass).log().to(DEVICE)
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, case.ids, False)
    logits = torch.where(outside, logits + odds - logits.logsumexp(1, keepdim=True), logits)
    truth = logit_gradients(case, "eager", logits.double())
    found = logit_gradients(case, impl, logits)
    assert_same(found["loss"], truth["loss"])
    assert error(found["logits"][outside], truth["logits"][outside]) < 2 * 2.0**-19


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [10.0, 30.0, 300.0])
def test_saturated_rows_stay_finite_and_right(impl, divergence, scale):
    """Where q is nearly all on one word the gradient is tiny; naive fp32 loses it, we do not."""
    case = make_case(divergence=divergence)
    logits = scale * torch.randn(11, 131, device=DEVICE)
    truth = logit_gradients(case, "eager", logits.double())
    naive, found = logit_gradients(case, "eager", logits), logit_gradients(case, impl, logits)
    for name in truth:
        allowed = 2e-5 + (error(naive[name], truth[name]) if impl == "eager" else 0)
        assert error(found[name], truth[name]) <= allowed, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_certain_teacher(impl, divergence):
    """One word has all the mass and the others none: no NaN from 0 * log 0."""
    case = make_case(5, 8, 33, 3, padding=False, divergence=divergence)
    case.logprobs = torch.tensor([0.0, -torch.inf, -torch.inf], device=DEVICE).repeat(5, 1)
    logits = torch.randn(5, 33, device=DEVICE)
    truth = logit_gradients(case, "eager", logits.double())
    found = logit_gradients(case, impl, logits)
    assert_same(found["loss"], truth["loss"])
    assert_same(found["logits"], truth["logits"])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_words_the_student_forbids(impl, divergence):
    """A bias of minus infinity, on a word that no row's teacher names."""
    case = make_case(6, 8, 50, 4, padding=False, divergence=divergence)
    case.bias[min(set(range(50)) - set(case.ids.flatten().tolist()))] = -torch.inf
    assert_no_worse_than_naive(case, impl)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_words_the_teacher_names_and_the_student_forbids(impl, divergence):
    """The divergence may be infinite; what comes out is finite, so one row cannot end a run."""
    case = make_case(6, 8, 50, 4, padding=False, divergence=divergence)
    case.bias[int(case.ids[0, 1])] = -torch.inf
    for name, value in case.run(impl).items():
        assert value.isfinite().all(), name


def test_rows_of_weight_zero_are_left_out(impl):
    weights = row_weights(11)
    weights[:4] = 0
    case = make_case(labels=labels(11, 131), ce_weight=0.5, weights=weights)
    found = case.run(impl)
    assert (found["loss"][:4] == 0).all()
    assert (found["hidden"][:4] == 0).all()
    assert_no_worse_than_naive(case, impl)


@pytest.mark.parametrize("k_padded", [True, False])
def test_all_rows_ignored(impl, k_padded):
    case = make_case(
        labels=torch.full((11,), -1), ce_weight=0.5, weights=torch.zeros(11), temperature=2.0
    )
    if k_padded:
        case.ids = torch.full_like(case.ids, -1)
    for name, value in case.run(impl).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize(("divergence", "tail"), KINDS[:-1])
def test_a_row_without_words_counts_nothing(impl, divergence, tail):
    case = make_case(divergence=divergence, tail=tail)
    case.ids[4] = -1
    found = case.run(impl)
    assert found["loss"][4] == 0
    assert (found["hidden"][4].abs() < 1e-6).all()
    assert_no_worse_than_naive(case, impl)


def test_no_rows_at_all(impl):
    found = make_case(rows=1).run(impl, weights=torch.zeros(1, device=DEVICE))
    case = make_case(rows=1)
    case.hidden, case.ids, case.logprobs = case.hidden[:0], case.ids[:0], case.logprobs[:0]
    empty = case.run(impl)
    assert empty["loss"].shape == (0,)
    assert (empty["unembedding"] == 0).all()
    assert (found["unembedding"] == 0).all()


@pytest.mark.parametrize("valid_vocab", [None, 100])
def test_padded_head_rows_do_not_exist(impl, valid_vocab):
    """Rows of the head beyond the vocabulary change nothing and get no gradient."""
    case = make_case(words=100, dtype=judged(impl))
    grown = make_case(words=100, dtype=judged(impl))
    if valid_vocab:
        grown.unembedding = torch.cat([grown.unembedding, grown.unembedding.new_full((28, 24), 9)])
        grown.bias = torch.cat([grown.bias, grown.bias.new_full((28,), 9)])
    plain, found = case.run(impl), grown.run(impl, valid_vocab=valid_vocab)
    assert (found["unembedding"][100:] == 0).all()
    assert (found["bias"][100:] == 0).all()
    assert_same(found["loss"], plain["loss"])
    assert_same(found["unembedding"][:100], plain["unembedding"])


def grad_with(case, impl, reduce, **options):
    hidden = case.hidden.clone().requires_grad_()
    head = case.unembedding.clone().requires_grad_()
    loss = topk_divergence(hidden, head, case.ids, case.logprobs, impl=impl, **options)
    reduce(loss).backward()
    return hidden.grad, head.grad


@pytest.mark.parametrize(
    "reduce",
    [
        lambda loss: -2.5 * loss.sum(),
        lambda loss: loss.mean(),
        lambda loss: (loss * torch.linspace(-1, 2, 11, device=loss.device)).sum(),
        lambda loss: loss[3],
        lambda loss: loss.square().sum(),
    ],
    ids=["scaled", "mean", "per_row", "one_row", "nonlinear"],
)
def test_any_grad_output(impl, reduce):
    case = make_case(with_bias=False, dtype=judged(impl))
    truth = grad_with(case.to(torch.float64), "eager", reduce)
    for found, expected in zip(grad_with(case, impl, reduce), truth, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("weights", [None, row_weights(11)])
def test_backward_twice(impl, weights):
    case = make_case(weights=weights, dtype=judged(impl))
    hidden = case.hidden.clone().requires_grad_()
    head = case.unembedding.clone().requires_grad_()
    loss = topk_divergence(hidden, head, case.ids, case.logprobs, impl=impl, **case.options).sum()
    loss.backward(torch.tensor(0.5, device=DEVICE), retain_graph=True)
    first = hidden.grad.clone(), head.grad.clone()
    (3 * loss).backward()
    assert_same(hidden.grad, 7 * first[0])
    assert_same(head.grad, 7 * first[1])


def test_gradient_accumulation(impl):
    """Two microbatches add up to the batch."""
    case = make_case(12, dtype=judged(impl))
    whole = case.run(impl)
    head = case.unembedding.clone().requires_grad_()
    for rows in (slice(0, 5), slice(5, 12)):
        topk_divergence(
            case.hidden[rows],
            head,
            case.ids[rows],
            case.logprobs[rows],
            bias=case.bias,
            impl=impl,
        ).sum().backward()
    assert_same(head.grad, whole["unembedding"])


def test_rows_may_come_in_any_order(impl):
    case = make_case(dtype=judged(impl))
    order = torch.randperm(11, device=DEVICE)
    plain = case.run(impl)
    case.hidden, case.ids, case.logprobs = (
        tensor[order] for tensor in (case.hidden, case.ids, case.logprobs)
    )
    found = case.run(impl)
    assert_same(found["loss"], plain["loss"][order])
    assert_same(found["hidden"], plain["hidden"][order])
    assert_same(found["unembedding"], plain["unembedding"])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ids_may_come_in_any_order(impl, divergence):
    case = make_case(divergence=divergence, dtype=judged(impl))
    plain = case.run(impl)
    order = torch.stack([torch.randperm(7) for _ in range(11)]).to(DEVICE)
    case.ids, case.logprobs = case.ids.gather(1, order), case.logprobs.gather(1, order)
    found = case.run(impl)
    for name in plain:
        assert_same(found[name], plain[name], name)


def test_a_constant_added_to_the_logits_changes_nothing(impl):
    case = make_case(dtype=judged(impl))
    plain = case.run(impl)
    case.bias = case.bias + 5
    assert_same(case.run(impl)["loss"], plain["loss"])


def test_inputs_need_not_be_contiguous(impl):
    case = make_case(12, 24, dtype=judged(impl))
    plain = case.run(impl)
    strided = make_case(12, 24, dtype=judged(impl))
    strided.hidden = case.hidden.T.contiguous().T
    strided.unembedding = torch.stack([case.unembedding, case.unembedding], 2)[..., 0]
    strided.ids = case.ids.T.contiguous().T
    strided.logprobs = torch.stack([case.logprobs, case.logprobs], 1)[:, 1]
    leaves = [strided.hidden.requires_grad_(), strided.unembedding.requires_grad_()]
    loss = topk_divergence(*leaves, strided.ids, strided.logprobs, bias=case.bias, impl=impl)
    loss.sum().backward()
    assert not strided.ids.is_contiguous()
    assert_same(loss, plain["loss"])
    assert_same(leaves[0].grad, plain["hidden"])
    assert_same(leaves[1].grad, plain["unembedding"])


def test_tied_embedding_gets_both_gradients(impl):
    case = make_case(with_bias=False)
    tokens = torch.arange(11, device=DEVICE)

    def tied(which, dtype):
        weight = case.unembedding.to(dtype).clone().requires_grad_()
        hidden = torch.tanh(weight[tokens])
        topk_divergence(hidden, weight, case.ids, case.logprobs, impl=which).sum().backward()
        return weight.grad

    assert_same(tied(impl, judged(impl)), tied("eager", torch.float64))


def test_autocast_with_fp32_weights(impl):
    """The trainer's case: bf16 products, an fp32 head with an fp32 gradient."""
    case = make_case(16, 32, 257, with_bias=False)
    truth = case.to(torch.float64).run("eager")
    rounded = case.to(torch.bfloat16).run("eager")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = case.run(impl)
    assert found["unembedding"].dtype == found["hidden"].dtype == torch.float32
    for name in truth:
        allowed = error(rounded[name], truth[name]) + TOLERANCE[torch.bfloat16]
        assert error(found[name], truth[name]) <= allowed, name


def test_fp16_survives_small_weights(impl):
    """Weights of 1 / (a million rows) under a loss scale: nothing is flushed on the way."""
    case = make_case(dtype=torch.float16)
    plain = case.run(impl)
    hidden = case.hidden.clone().requires_grad_()
    head = case.unembedding.clone().requires_grad_()
    weights = torch.full((11,), 1e-6, device=DEVICE)
    loss = topk_divergence(
        hidden, head, case.ids, case.logprobs, bias=case.bias, weights=weights, impl=impl
    )
    (1e6 * loss.sum()).backward()
    assert error(hidden.grad, plain["hidden"]) < 2e-3
    assert error(head.grad, plain["unembedding"]) < 2e-3


def test_a_frozen_head_gets_no_gradient(impl):
    case = make_case(with_bias=False, dtype=judged(impl))
    hidden = case.hidden.clone().requires_grad_()
    topk_divergence(hidden, case.unembedding, case.ids, case.logprobs, impl=impl).sum().backward()
    assert_same(hidden.grad, case.run(impl)["hidden"])


def test_without_gradient_only_the_loss(impl):
    options = {"labels": labels(11, 131), "ce_weight": 0.3, "temperature": 2.0, "softcap": 5.0}
    case = make_case(dtype=judged(impl), **options)
    with torch.no_grad():
        loss = topk_divergence(
            case.hidden,
            case.unembedding,
            case.ids,
            case.logprobs,
            bias=case.bias,
            impl=impl,
            **case.options,
        )
    assert not loss.requires_grad
    assert_same(loss, case.run(impl)["loss"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 33),
    words=st.integers(2, 300),
    k=st.integers(1, 40),
    kind=st.sampled_from(KINDS[:-1]),
    temperature=st.sampled_from([1.0, 1.7]),
    ce_weight=st.sampled_from([0.0, 0.4]),
    sharpness=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(impl, rows, width, words, k, kind, temperature, ce_weight, sharpness, seed):
    case = make_case(
        rows,
        width,
        words,
        min(k, words),
        seed=seed,
        sharpness=sharpness,
        divergence=kind[0],
        tail=kind[1],
        temperature=temperature,
        ce_weight=ce_weight,
        labels=labels(rows, words, seed),
    )
    truth, found = case.to(torch.float64).run("eager"), case.run(impl)
    scale = 1 + truth["loss"].abs().max()
    assert ((found["loss"].double() - truth["loss"]).abs() <= 2e-5 * scale).all()
    for name in ("hidden", "unembedding", "bias"):
        difference = (found[name].double() - truth[name]).abs().max()
        assert difference <= 2e-5 * (1 + truth[name].abs().max()), name
