"""The divergences inside torch.compile and torch.export: one graph, the same numbers."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import Tensor

from stillroom.pipeline.kernels import compiled
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import assert_same, make_case, with_draws
from tests.contract.packed_cases import made_up

ROWS, WORDS = 11, 131
LABELS = torch.arange(ROWS) - 1
WEIGHTS = torch.linspace(0, 1, ROWS)
CASES = {
    "plain": {},
    "no bias": {"with_bias": False},
    "everything": {
        "temperature": 2.0,
        "softcap": 5.0,
        "labels": LABELS,
        "ce_weight": 0.3,
        "weights": WEIGHTS,
        "valid_vocab": 120,
        "memory_budget": 4096,
    },
    "reverse": {"divergence": "reverse_kl", "tail": "renormalise"},
    "jsd": {"divergence": "jsd", "beta": 0.3, "tail": "truncate"},
}


def case_of(name):
    case = make_case(ROWS, dtype=torch.float64, **CASES[name])
    real = case.ids < CASES[name].get("valid_vocab", WORDS)
    return replace(case, ids=torch.where(real, case.ids, -1))


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


def with_gradients(function, *leaves: Tensor):
    """What a function gives, and the gradients of its sum."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*own)
    return [found.detach(), *torch.autograd.grad(found.sum(), own)]


def in_one_graph(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def leaves_of(case):
    return [t for t in (case.hidden, case.unembedding, case.bias) if t is not None]


def sparse(case):
    def loss(hidden, unembedding, bias=None):
        given = case.ids, case.logprobs
        return topk_divergence(hidden, unembedding, *given, bias=bias, **case.options)

    return loss


def dense(case):
    teacher = torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(WORDS, 6, dtype=torch.float64)
    options = {name: value for name, value in case.options.items() if name != "tail"}

    def loss(hidden, unembedding, bias=None):
        return linear_divergence(hidden, unembedding, *teacher, bias=bias, **options)

    return loss


@pytest.mark.parametrize("door", [sparse, dense])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_what_no_compiler_gives(door, name):
    case = case_of(name)
    loss = door(case)
    truth = with_gradients(loss, *leaves_of(case))
    for part, expected in zip(with_gradients(in_one_graph(loss), *leaves_of(case)), truth):
        assert_same(part, expected, name)


def test_draws_from_the_tail():
    case = with_draws(make_case(ROWS, dtype=torch.float64), 5)
    truth = with_gradients(sparse(case), *leaves_of(case))
    found = with_gradients(in_one_graph(sparse(case)), *leaves_of(case))
    for part, expected in zip(found, truth):
        assert_same(part, expected)


def test_rows_that_count_differently_afterwards():
    """Then what was kept is of no use, and the chunks are computed again."""
    case = case_of("everything")
    factors = torch.linspace(-1, 2, ROWS, dtype=torch.float64)

    def loss(*leaves):
        return sparse(case)(*leaves) * factors

    truth = with_gradients(loss, *leaves_of(case))
    for part, expected in zip(with_gradients(in_one_graph(loss), *leaves_of(case)), truth):
        assert_same(part, expected)


def test_only_what_is_asked_for_gets_a_gradient():
    case = case_of("plain")

    def loss(hidden):
        return sparse(case)(hidden, case.unembedding, case.bias)

    truth = with_gradients(loss, case.hidden)
    for part, expected in zip(with_gradients(in_one_graph(loss), case.hidden), truth):
        assert_same(part, expected)
    with torch.no_grad():
        assert_same(in_one_graph(loss)(case.hidden), truth[0])


def test_cross_entropies_are_told():
    case = case_of("everything")
    told = torch.zeros(ROWS)

    def loss(hidden, unembedding, bias, told):
        options = case.options | {"cross_entropy": told}
        given = case.ids, case.logprobs
        return topk_divergence(hidden, unembedding, *given, bias=bias, **options)

    expected = torch.zeros(ROWS)
    loss(*leaves_of(case), expected)
    in_one_graph(loss)(*leaves_of(case), told)
    torch.testing.assert_close(told, expected, rtol=0, atol=0)
    assert expected.count_nonzero() > 5


def test_under_autocast_the_products_are_as_narrow():
    """Of the same arithmetic on one machine, so to the bit."""
    case = make_case(ROWS)
    loss = sparse(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truth = with_gradients(loss, *leaves_of(case))
        found = with_gradients(in_one_graph(loss), *leaves_of(case))
    wide = with_gradients(loss, *leaves_of(case))
    for part, expected in zip(found, truth):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    assert not torch.equal(wide[0], truth[0])


def test_other_numbers_of_rows_need_no_other_graph():
    case = case_of("plain")

    def loss(hidden, ids, logprobs):
        return topk_divergence(hidden, case.unembedding, ids, logprobs)

    same_graph = in_one_graph(loss, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (ROWS, 5, 8):
            given = [t[:rows].clone() for t in (case.hidden, case.ids, case.logprobs)]
            assert_same(same_graph(*given), loss(*given))


def test_the_default_compiler():
    case = case_of("everything")

    def loss(*leaves):
        return (sparse(case)(leaves[0].tanh(), *leaves[1:]) / 3).sum()

    truth = with_gradients(loss, *leaves_of(case))
    found = with_gradients(torch.compile(loss, fullgraph=True), *leaves_of(case))
    for part, expected in zip(found, truth):
        assert_same(part, expected)


class Loss(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.loss = sparse(case)

    def forward(self, hidden, unembedding, bias):
        return self.loss(hidden, unembedding, bias)


def test_an_exported_program_says_the_same():
    case = case_of("everything")
    program = torch.export.export(Loss(case), tuple(leaves_of(case)))
    assert_same(program.module()(*leaves_of(case)), sparse(case)(*leaves_of(case)))
    assert "stillroom.fused_divergence" in str(program.graph)


CALL = ("forward_kl bucket chunked", [0.5, 0.1, 2.0, 0.3, 0.0, 0.0], [WORDS, 0])


def arguments(flags, weights=None, teacher=None):
    case = case_of("plain")
    leaves = [leaf.requires_grad_(wanted) for leaf, wanted in zip(leaves_of(case), flags)]
    rows = (teacher or [case.ids, case.logprobs]), LABELS, weights
    return (*leaves, *rows, *CALL, flags, torch.float64)


@pytest.mark.parametrize(
    "given",
    [
        arguments([True, True, True, False, False, False]),
        arguments([True, False, False, True, False, False], WEIGHTS),
        arguments(
            [True, True, False, False, True, True],
            teacher=[torch.randn(ROWS, 6).double(), torch.randn(WORDS, 6).double()],
        ),
    ],
)
def test_opcheck(given):
    torch.library.opcheck(compiled.fused, given)
    leaves = [given[0].detach(), given[1].detach(), given[2].detach()]
    _, _, *kept, unit = compiled.fused(*leaves, *given[3:])
    grad = torch.linspace(0, 1, ROWS, dtype=torch.float64)
    torch.library.opcheck(compiled.fused_backward, (grad, kept, unit, *leaves, *given[3:]))


def test_packed_lists_break_the_graph_and_say_the_same():
    case, packed = make_case(ROWS), made_up(ROWS, WORDS)

    def loss(hidden):
        return topk_divergence(hidden, case.unembedding, packed).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        in_one_graph(loss)(case.hidden)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loss, backend="aot_eager")(case.hidden), loss(case.hidden))
