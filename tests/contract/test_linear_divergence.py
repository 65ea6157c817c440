"""The contract of the dense divergence: both sides a head over hidden states."""

from typing import get_args

import pytest
import torch

from pipeline.kernels.divergences import DivergenceName
from pipeline.kernels.linear_divergence import linear_divergence
from pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import TOLERANCE, Recorder, error

DIVERGENCES = get_args(DivergenceName)
NAMES = ("hidden", "unembedding", "bias")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "chunked"])
def impl(request):
    return request.param


def make_case(rows=9, words=61, dtype=torch.float32, teacher_words=None):
    """(student leaves, teacher's hidden states and head)."""
    student = [torch.randn(rows, 16), torch.randn(words, 16) * 0.5, torch.randn(words) * 0.3]
    teacher = [torch.randn(rows, 24), torch.randn(teacher_words or words, 24) * 0.5]
    return [t.to(dtype) for t in student], [t.to(dtype) for t in teacher]


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
        "labels": torch.tensor([3, -1, 0, 55, 7, -1, 20, 1, 2]),
        "ce_weight": 0.6,
        "softcap": 3.0,
        "teacher_softcap": 4.0,
        "teacher_bias": torch.randn(70),
        "weights": weights,
        "valid_vocab": 56,
    }
    assert_right(impl, *make_case(teacher_words=70), divergence=divergence, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_sparse_divergence_with_every_word_named(impl, divergence):
    student, (teacher_hidden, teacher_head) = make_case()
    logprobs = (teacher_hidden @ teacher_head.T / 2).log_softmax(1)
    ids = torch.arange(61).expand(9, -1).contiguous()
    options = {"divergence": divergence, "temperature": 2.0, "bias": student[2]}
    sparse = topk_divergence(*student[:2], ids, logprobs, **options)
    dense = linear_divergence(*student[:2], teacher_hidden, teacher_head, impl=impl, **options)
    assert error(dense, sparse) < 2e-6


def test_equal_heads_have_no_divergence(impl):
    student, _ = make_case()
    found = run(impl, [*student[:2], torch.zeros(61)], student[:2])
    assert found["loss"].abs().max() < 1e-6
    assert found["hidden"].abs().max() < 1e-6


def test_teacher_in_another_dtype(impl):
    """A bf16 teacher head beside an fp32 student; cached states may be fp32."""
    student, (teacher_hidden, teacher_head) = make_case()
    head = teacher_head.bfloat16()
    states = teacher_hidden.bfloat16()
    truth = run("eager", student, [states.double(), head.double()], torch.float64)
    found = run(impl, student, [states.float(), head])
    assert error(found["loss"], truth["loss"]) < 1e-2


def test_nothing_of_size_rows_times_words_is_made():
    student, teacher = make_case(rows=96, words=3001)
    leaves = [t.requires_grad_() for t in student[:2]]
    with Recorder() as record:
        linear_divergence(*leaves, *teacher, memory_budget=8 * 4 * 3001).sum().backward()
    assert record.largest <= 3001 * 48
    assert record.largest < 96 * 3001 / 1.9


def test_the_hot_path_asks_a_device_nothing():
    student, teacher = ([t.to("meta") for t in part] for part in make_case())
    leaves = [t.requires_grad_() for t in student]
    loss = linear_divergence(*leaves[:2], *teacher, bias=leaves[2], temperature=2.0)
    loss.sum().backward()
    assert leaves[0].grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hidden": torch.zeros(8, 24)}, r"teacher_hidden: found shape \(8, 24\)"),
        ({"teacher_unembedding": torch.zeros(61, 23)}, r"teacher_unembedding: .*\(61, 23\)"),
        ({"teacher_unembedding": torch.zeros(60, 24)}, r"expected \[V', 24\] with V' >= 61"),
        ({"teacher_bias": torch.zeros(60)}, r"teacher_bias: found shape \(60,\)"),
        ({"labels": torch.full((9,), 61), "ce_weight": 0.5}, r"labels: row 0 holds 61"),
        ({"teacher_hidden": torch.zeros(9, 24, device="meta")}, r"teacher_hidden: is on meta"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    student, teacher = make_case()
    names = ("hidden", "unembedding", "teacher_hidden", "teacher_unembedding")
    arguments = dict(zip(names, (*student[:2], *teacher), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(arguments | changes))


def test_there_is_no_triton_kernel_and_no_fallback():
    student, teacher = make_case()
    with pytest.raises(RuntimeError, match="no dense kernel"):
        linear_divergence(*student[:2], *teacher, impl="triton")
