"""Every implementation tells a row's own cross-entropy beside the sum that it is part of."""

import pytest
import torch

from stillroom.pipeline.kernels.execution import triton_runs_on
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence

ROWS, WIDTH, WORDS = 7, 8, 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = [
    "eager",
    "chunked",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not triton_runs_on(DEVICE), reason="needs TRITON_INTERPRET=1"),
    ),
]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("door", [topk_divergence, linear_divergence])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_torchs_cross_entropy(impl, door, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH).to(DEVICE).requires_grad_()
    head = torch.randn(WORDS, WIDTH).to(DEVICE).requires_grad_()
    labels = torch.randint(0, WORDS, (ROWS,)).to(DEVICE)
    labels[2] = -1
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 2.0, 1.0, 1.0])
    listed = torch.randn(ROWS, WORDS).to(DEVICE).log_softmax(-1).topk(4)
    teacher = {
        topk_divergence: (listed.indices, listed.values),
        linear_divergence: (torch.randn(ROWS, 5).to(DEVICE), torch.randn(WORDS, 5).to(DEVICE)),
    }[door]
    shared = {"labels": labels, "weights": weights, "temperature": temperature, "impl": impl}
    told = torch.full((ROWS,), 7.0, device=DEVICE)
    # One row a chunk, so that every chunk has to find its own place.
    loss = door(
        hidden, head, *teacher, ce_weight=0.3, cross_entropy=told, memory_budget=1, **shared
    )
    wanted = torch.nn.functional.cross_entropy(
        hidden @ head.T, labels, ignore_index=-1, reduction="none"
    ).detach()
    if impl != "eager":
        wanted[1] = 0.0
    torch.testing.assert_close(told, wanted, rtol=1e-5, atol=1e-6)
    without = door(hidden, head, *teacher, **shared)
    torch.testing.assert_close(
        loss - 0.3 * weights.to(DEVICE) * told, without, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("door", [topk_divergence, linear_divergence])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_label_beyond_the_words_is_no_number(impl, door, temperature):
    # `debug` refuses it; a finite loss would pass for that of a label which the head has.
    hidden, head = (torch.randn(n, WIDTH).to(DEVICE).requires_grad_() for n in (ROWS, WORDS))
    labels = torch.arange(ROWS).to(DEVICE)
    labels[3] = WORDS
    listed = torch.randn(ROWS, WORDS).to(DEVICE).log_softmax(-1).topk(4)
    teacher = {
        topk_divergence: (listed.indices, listed.values),
        linear_divergence: (hidden.detach(), head.detach().flip(0)),
    }[door]
    told = torch.zeros(ROWS, device=DEVICE)
    shared = {"labels": labels, "temperature": temperature, "impl": impl, "debug": False}
    loss = door(hidden, head, *teacher, ce_weight=0.3, cross_entropy=told, **shared)
    gradient = torch.autograd.grad(loss.sum(), hidden)[0].sum(1)
    for found in (loss, told, *([] if impl == "eager" else [gradient])):
        assert (~found.isfinite()).nonzero().flatten().tolist() == [3]
    assert bool(door(hidden, head, *teacher, **shared).isfinite().all())


REFUSED = {
    "shape": (torch.zeros(ROWS + 1), ValueError, r"found shape \(8,\); expected \(7,\)"),
    "dtype": (torch.zeros(ROWS).long(), TypeError, r"found torch.int64; expected float32"),
    "column": (torch.zeros(ROWS, 3)[:, 1], ValueError, r"expected contiguous"),
}


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize(("told", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_where_it_cannot_be_told_is_refused(told, kind, message, ce_weight):
    # A kernel wrote a column's numbers one after another, into its neighbours.
    hidden, head = torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH)
    listed = torch.randn(ROWS, WORDS).log_softmax(-1).topk(4)
    labels = torch.zeros(ROWS).long()
    given = hidden, head, listed.indices, listed.values
    if not ce_weight:
        kind, message = ValueError, r"is told where ce_weight is above 0"
    with pytest.raises(kind, match=rf"cross_entropy: .*{message}"):
        topk_divergence(*given, labels=labels, ce_weight=ce_weight, cross_entropy=told)
