"""The door of the dense divergence: memory, synchronisation, bad input."""

import pytest
import torch

from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from tests.contract.divergence_cases import Recorder
from tests.contract.test_linear_divergence import make_case


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
        ({"teacher_softcap": 0.0}, r"teacher_softcap: found 0\.0; .* None for no cap"),
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
