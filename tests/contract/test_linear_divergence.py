"""The contract of the dense divergence: both sides a head over hidden states."""

from typing import get_args

import pytest
import torch

from stillroom.pipeline.kernels.divergences import DivergenceName
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import (
    DEVICE,
    IMPLEMENTATIONS,
    ROUNDING,
    TOLERANCE,
    assert_same,
    error,
    judged,
)

DIVERGENCES = get_args(DivergenceName)
NAMES = ("hidden", "unembedding", "bias")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    return request.param


def make_case(rows=9, words=61, dtype=torch.float32, teacher_words=None):
    """(student leaves, teacher's hidden states and head)."""
    student = [torch.randn(rows, 16), torch.randn(words, 16) * 0.5, torch.randn(words) * 0.3]
    teacher = [torch.randn(rows, 24), torch.randn(teacher_words or words, 24) * 0.5]
    return [t.to(DEVICE, dtype) for t in student], [t.to(DEVICE, dtype) for t in teacher]


def run(impl, student, teacher, dtype=None, **options):
    leaves = [t.to(dtype or t.dtype, copy=True).detach().requires_grad_() for t in student]
    teacher = [t.to(dtype or t.dtype) for t in teacher]
    loss = linear_divergence(leaves[0], leaves[1], *teacher, bias=leaves[2], impl=impl, **options)
    loss.sum().backward()
    return {"loss": loss.detach()} | {n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True)}


def assert_right(impl, student, teacher, **options):
    truth = run("eager", student, teacher, torch.float64, **options)
    naive = run("eager", student, teacher, **options)
    found = run(impl, student, teacher, **options)
    for name in truth:
        allowed = error(naive[name], truth[name]) + TOLERANCE[student[0].dtype]
        assert error(found[name], truth[name]) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_right(impl, divergence, dtype):
    assert_right(impl, *make_case(dtype=dtype), divergence=divergence, memory_budget=2000)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_option_at_once(impl, divergence, temperature):
    weights = torch.rand(9)
    weights[[2, 5]] = 0
    options = {
        "temperature": temperature,
        "labels": torch.tensor([3, -1, 0, 55, 7, -1, 20, 1, 2], device=DEVICE),
        "ce_weight": 0.6,
        "softcap": 3.0,
        "teacher_softcap": 4.0,
        "teacher_bias": torch.randn(70, device=DEVICE),
        "weights": weights,
        "valid_vocab": 56,
    }
    assert_right(impl, *make_case(teacher_words=70), divergence=divergence, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_several_blocks_of_words_and_saturated_rows(impl, divergence, scale):
    """More words than a block of the kernel has; the most probable word may lie in any of them.

    Logits of a size of 500 are off by more than the rest together, and alike in both ways: both
    have them from one matrix product.
    """
    student, teacher = make_case(7, 9001)
    student[0] *= scale
    truth = run("eager", student, teacher, torch.float64, divergence=divergence)
    naive = run("eager", student, teacher, divergence=divergence)
    found = run(impl, student, teacher, divergence=divergence)
    for name in truth:
        allowed = error(naive[name], truth[name]) + 2e-6
        assert error(found[name], truth[name]) <= allowed, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_sparse_divergence_with_every_word_named(impl, divergence):
    student, (teacher_hidden, teacher_head) = make_case(dtype=judged(impl))
    logprobs = (teacher_hidden @ teacher_head.T / 2).log_softmax(1)
    ids = torch.arange(61, device=DEVICE).expand(9, -1).contiguous()
    options = {"divergence": divergence, "temperature": 2.0, "bias": student[2]}
    sparse = topk_divergence(*student[:2], ids, logprobs, **options)
    dense = linear_divergence(*student[:2], teacher_hidden, teacher_head, impl=impl, **options)
    assert_same(dense, sparse)


def test_equal_heads_have_no_divergence(impl):
    """Sums of p (log p - log q) over words, of which none is above 1 in size."""
    student, _ = make_case(dtype=judged(impl))
    found = run(impl, [*student[:2], student[2] * 0], student[:2])
    assert found["loss"].abs().max() < ROUNDING[judged(impl)]
    assert found["hidden"].abs().max() < ROUNDING[judged(impl)]


def test_teacher_in_another_dtype(impl):
    """A bf16 teacher head beside an fp32 student; cached states may be fp32."""
    student, (teacher_hidden, teacher_head) = make_case()
    head = teacher_head.bfloat16()
    states = teacher_hidden.bfloat16()
    truth = run("eager", student, [states.double(), head.double()], torch.float64)
    found = run(impl, student, [states.float(), head])
    assert error(found["loss"], truth["loss"]) < 1e-2
