"""Gradients taken in the forward pass: handed over as they are or refused, never quietly others."""

from dataclasses import replace

import pytest
import torch

from stillroom.pipeline.kernels import compiled, scratch
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import DEVICE, IMPLEMENTATIONS, Recorder, error, make_case

FUSED = [impl for impl in IMPLEMENTATIONS if impl != "eager"]


@pytest.fixture(params=FUSED)
def impl(request):
    return request.param


@pytest.fixture
def case():
    return make_case()


def leaves_of(case):
    return [t.clone().requires_grad_() for t in (case.hidden, case.unembedding)]


def loss_of(case, hidden, unembedding, impl, **options):
    return topk_divergence(hidden, unembedding, case.ids, case.logprobs, impl=impl, **options)


def test_a_second_derivative_is_refused_and_not_zero(case, impl):
    hidden, head = leaves_of(case)
    loss = loss_of(case, hidden, head, impl).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    # Beside a term that has a second derivative, one that silently had none would go unnoticed.
    total = gradient.square().sum() + head.square().sum()
    with pytest.raises(RuntimeError, match=r"differentiated once.*impl='eager'"):
        torch.autograd.grad(total, [head], retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once.*impl='eager'"):
        total.backward()


def test_create_graph_alone_changes_no_gradient(case, impl):
    hidden, head = leaves_of(case)
    first = torch.autograd.grad(loss_of(case, hidden, head, impl).sum(), [hidden, head])
    graph = loss_of(case, hidden, head, impl).sum()
    for one, other in zip(first, torch.autograd.grad(graph, [hidden, head], create_graph=True)):
        assert torch.equal(one, other.detach())


@pytest.mark.parametrize("name", ["ids", "logprobs", "labels", "weights"])
def test_what_a_gradient_is_taken_again_of_may_not_have_changed(case, impl, name):
    rows = len(case.hidden)
    options = {
        "labels": torch.arange(rows, device=DEVICE),
        "weights": torch.ones(rows, device=DEVICE),
    }
    case = replace(case, ids=case.ids.clone(), logprobs=case.logprobs.clone())
    hidden, head = leaves_of(case)
    loss = loss_of(case, hidden, head, impl, ce_weight=0.5, **options)
    given = options | {"ids": case.ids, "logprobs": case.logprobs}
    given[name].copy_(given[name].flip(0))
    factors = torch.arange(rows, device=DEVICE)
    with pytest.raises(RuntimeError, match=rf"^{name}: changed in place.*factors as weights"):
        (loss * factors).sum().backward()


def test_a_kept_gradient_needs_no_teacher_any_more(case, impl):
    hidden, head = leaves_of(case)
    expected = torch.autograd.grad(loss_of(case, hidden, head, impl).sum(), head)[0]
    case = replace(case, logprobs=case.logprobs.clone())
    loss = loss_of(case, hidden, head, impl)
    case.logprobs.zero_()
    assert torch.equal(torch.autograd.grad(loss.sum(), head)[0], expected)


def test_a_dense_teacher_is_named_as_the_argument_is(case):
    hidden, head = leaves_of(case)
    teacher = case.hidden.flip(0)
    loss = linear_divergence(hidden, head, teacher, case.unembedding)
    teacher.zero_()
    with pytest.raises(RuntimeError, match=r"^teacher_hidden: changed in place"):
        loss.square().sum().backward()


def test_weights_that_would_get_no_gradient_are_refused(case, impl):
    weights = torch.ones(len(case.hidden), device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match=r"weights: require a gradient.*multiply the losses"):
        loss_of(case, *leaves_of(case), impl, weights=weights)
    with torch.no_grad():
        loss_of(case, *leaves_of(case), impl, weights=weights)


def test_a_gradient_taken_again_tells_no_cross_entropy(case, impl):
    hidden, head = leaves_of(case)
    rows = len(hidden)
    told, labels = torch.zeros(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
    loss = loss_of(case, hidden, head, impl, labels=labels, ce_weight=0.5, cross_entropy=told)
    before = told.clone()
    loss[::2].sum().backward()
    assert torch.equal(told, before)
    assert bool((told > 0).all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_nothing_records_no_gradient_is_computed(case, mode):
    hidden, head = leaves_of(case)
    with mode(), Recorder() as found:
        loss_of(case, hidden, head, "chunked")
    with mode(), Recorder() as plain:
        loss_of(case, case.hidden, case.unembedding, "chunked")
    products = ("aten::mm", "aten::addmm_")
    count = [sum(name in products for name in run.operations) for run in (found, plain)]
    assert count == [1, 1]  # the logits alone


@pytest.mark.parametrize("words", [61, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_lies_beside_a_buffers_words_counts_nothing(monkeypatch, words, dtype):
    # oneDNN's AMX products of 128 rows and more read on beyond a row's words, and multiply by 0.
    made = scratch.rows_of
    monkeypatch.setattr(scratch, "rows_of", lambda *size: made(*size).fill_(torch.nan))
    case = make_case(rows=130, words=words, dtype=dtype, with_bias=False)
    truth, found = case.to(torch.float64).run("eager"), case.run("chunked")
    assert error(found["hidden"], truth["hidden"]) < 0.02
    assert error(found["unembedding"], truth["unembedding"]) < 0.02


def test_an_operators_outputs_are_laid_out_as_it_states(case):
    hidden = case.hidden.T.contiguous().T.requires_grad_()
    numbers = [0.5, 0.1, 1.0, 0.0, 0.0, 0.0]
    flags = [True, True, False, False, False, False]
    how = "forward_kl bucket chunked", numbers, [131, 0], flags, torch.float32
    weights = torch.arange(len(hidden)) % 2.0
    for row_weights in (None, weights):
        given = hidden, case.unembedding, None, [case.ids, case.logprobs], None, row_weights
        torch.library.opcheck(compiled.fused, (*given, *how), test_utils="test_faketensor")


def test_a_word_beyond_the_vocabulary_has_no_probability():
    # `debug` refuses it; without, every implementation has to see the same loud loss.
    case = make_case(words=131)
    ids = case.ids.clone()
    ids[:, 0] = 130
    case = replace(case, ids=torch.where(ids == 130, 130, ids.clamp(max=128)))
    found = {
        impl: loss_of(case, case.hidden, case.unembedding, impl, valid_vocab=130, debug=False)
        for impl in ("eager", "chunked")
    }
    torch.testing.assert_close(found["chunked"], found["eager"])
