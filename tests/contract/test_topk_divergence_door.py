"""The door of the top-k divergence: bad input, memory, synchronisation, what is not computed."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from stillroom.pipeline import kernels
from stillroom.pipeline.kernels.linear_divergence import linear_divergence
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import Recorder, assert_same, error, make_case, with_draws


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def change(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def drawn(case, name, value):
    """With a sampled tail of which row 2's first draw is spoilt."""
    case = with_draws(case, draws=3)
    return replace(case, options=case.options | {name: change(case.options[name], (2, 0), value)})


BAD_VALUES = {
    "id_at_vocabulary": (
        lambda c: replace(c, ids=change(c.ids, (4, 1), 131)),
        r"ids: row 4 holds 131; expected less than 131 words",
    ),
    "id_below_padding": (
        lambda c: replace(c, ids=change(c.ids, (2, 0), -2)),
        r"ids: row 2 holds -2; expected word ids, or -1",
    ),
    "duplicate_id": (
        lambda c: replace(c, ids=change(c.ids, (5, 1), int(c.ids[5, 0]))),
        r"ids: row 5 holds \d+; named twice",
    ),
    "positive_logprob": (
        lambda c: replace(c, logprobs=change(c.logprobs, (7, 2), 0.25)),
        r"logprobs: row 7 holds 0\.25; expected at most 0",
    ),
    "nan_logprob": (
        lambda c: replace(c, logprobs=change(c.logprobs, (1, 0), math.nan)),
        r"logprobs: row 1 holds nan",
    ),
    "mass_above_one": (
        lambda c: replace(c, logprobs=change(c.logprobs, 10, -1.0)),
        r"logprobs: row 10 holds 2\.57\d*; expected a total mass",
    ),
    "label_at_vocabulary": (
        lambda c: replace(c, options={"labels": change(torch.zeros(11).long(), 3, 131)}),
        r"labels: row 3 holds 131",
    ),
    "infinite_weight": (
        lambda c: replace(c, options={"weights": change(torch.ones(11), 6, math.inf)}),
        r"weights: row 6 holds inf",
    ),
    "draw_without_weight": (
        lambda c: drawn(c, "tail_weights", 0.0),
        r"tail_weights: row 2 holds 0\.0",
    ),
    "draws_above_the_tail": (
        lambda c: drawn(c, "tail_weights", 2.0),
        r"logprobs: row 2 holds 2\.\d+; .*mass",
    ),
    "draw_of_a_named_word": (
        lambda c: drawn(c, "tail_ids", int(c.ids[2, 1])),
        r"ids: row 2 .*named twice",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_name_argument_row_and_value(name):
    spoil, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=message):
        spoil(make_case()).run("chunked", debug=True)


def test_values_are_checked_on_the_cpu_without_asking():
    with pytest.raises(ValueError, match="ids: row 4"):
        BAD_VALUES["id_at_vocabulary"][0](make_case()).run("chunked")


BAD_SHAPES = {
    "hidden": ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: found shape \(2, 3, 4\)"),
    "unembedding": ({"unembedding": torch.zeros(131, 25)}, r"unembedding: .*expected \[V, 24\]"),
    "bias": ({"bias": torch.zeros(130)}, r"bias: found shape \(130,\); expected \(131,\)"),
    "ids_rows": ({"ids": torch.zeros(10, 7).long()}, r"ids: found shape \(10, 7\)"),
    "no_columns": (
        {"ids": torch.zeros(11, 0).long(), "logprobs": torch.zeros(11, 0)},
        r"ids: found shape \(11, 0\); expected \[11, k\] with k >= 1",
    ),
    "logprobs": ({"logprobs": torch.zeros(11, 6)}, r"logprobs: found shape \(11, 6\)"),
    "labels": ({"labels": torch.zeros(3).long()}, r"labels: found shape \(3,\)"),
    "weights": ({"weights": torch.zeros(11, 1)}, r"weights: found shape \(11, 1\)"),
    "device": ({"ids": torch.zeros(11, 7, device="meta").long()}, r"ids: is on meta; expected cpu"),
}
BAD_DTYPES = {
    "hidden": ({"hidden": torch.zeros(11, 24).long()}, r"hidden: found torch.int64"),
    "unembedding": (
        {"unembedding": torch.zeros(131, 24, dtype=torch.bfloat16)},
        r"unembedding: found torch.bfloat16; expected torch.float32",
    ),
    "ids": ({"ids": torch.zeros(11, 7)}, r"ids: found torch.float32; expected int32 or int64"),
    "logprobs": ({"logprobs": torch.zeros(11, 7).long()}, r"logprobs: found torch.int64"),
    "labels": ({"labels": torch.zeros(11)}, r"labels: found torch.float32"),
    "weights": ({"weights": torch.ones(11).bool()}, r"weights: found torch.bool"),
}
BAD_OPTIONS = {
    "divergence": ({"divergence": "kl"}, r"divergence: 'kl' is unknown; expected one of"),
    "tail": ({"tail": "drop"}, r"tail: 'drop' is unknown"),
    "impl": ({"impl": "cuda"}, r"impl: 'cuda' is unknown"),
    "temperature": ({"temperature": 0.0}, r"temperature: found 0\.0"),
    "nan_temperature": ({"temperature": math.nan}, r"temperature: found nan"),
    "beta": ({"beta": 1.0}, r"beta: found 1\.0; expected 0 < beta < 1"),
    "alpha": ({"alpha": 0.0}, r"alpha: found 0\.0"),
    "softcap": ({"softcap": -1.0}, r"softcap: found -1\.0"),
    "no_softcap": ({"softcap": math.inf}, r"softcap: found inf; .* None for no cap"),
    "ce_weight": ({"ce_weight": -0.1}, r"ce_weight: found -0\.1"),
    "labels": ({"ce_weight": 0.5}, r"ce_weight: found 0\.5 without labels"),
    "valid_vocab": ({"valid_vocab": 132}, r"valid_vocab: found 132; expected 1 to 131"),
    "no_draws": ({"tail": "sampled"}, r"tail: 'sampled' needs tail_ids and tail_weights"),
    "draws": ({"tail_ids": torch.zeros(11, 1).long()}, r"tail_ids: only for tail='sampled'"),
    "divergence_of_draws": (
        {"tail": "sampled", "divergence": "jsd"},
        r"tail: 'sampled' is for forward_kl only; found 'jsd'",
    ),
    "budget": ({"memory_budget": 0}, r"memory_budget: found 0"),
}


def call(dtype=torch.float32, **changes):
    case = make_case(dtype=dtype)
    arguments = {
        "hidden": case.hidden,
        "unembedding": case.unembedding,
        "ids": case.ids,
        "logprobs": case.logprobs,
        "bias": case.bias,
    }
    return topk_divergence(**(arguments | changes))


def dense_call(dtype=torch.float32, **changes):
    tensors = (torch.ones(shape, dtype=dtype) for shape in ((3, 4), (9, 4), (3, 5), (9, 5)))
    return linear_divergence(*tensors, **changes)


BAD_ARGUMENTS = [
    pytest.param(kind, *bad, id=name)
    for kind, table in (
        (ValueError, BAD_SHAPES),
        (ValueError, BAD_OPTIONS),
        (TypeError, BAD_DTYPES),
    )
    for name, bad in table.items()
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(kind, changes, message):
    with pytest.raises(kind, match=message):
        call(**changes)


def run_recorded(case, head_needs_gradient=True, **options):
    hidden = case.hidden.clone().requires_grad_()
    head = case.unembedding.clone().requires_grad_(head_needs_gradient)
    with Recorder() as record:
        topk_divergence(hidden, head, case.ids, case.logprobs, **options).sum().backward()
    return record


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0, "softcap": 5.0, "ce_weight": 0.5}], ids=["plain", "all"]
)
def test_nothing_of_size_rows_times_words_is_made(options):
    """The largest tensor is the head's gradient, or one chunk's buffer."""
    case = make_case(64, 8, 3001, 5, with_bias=False)
    if "ce_weight" in options:
        options = options | {"labels": case.ids[:, 0].long()}
    record = run_recorded(case, memory_budget=8 * 4 * 3001, **options)
    assert record.largest <= 8 * 3040
    assert record.largest < 64 * 3001 / 7


@pytest.mark.parametrize(("head_needs_gradient", "products"), [(True, 3), (False, 2)])
def test_three_products_or_two_with_a_frozen_head(head_needs_gradient, products):
    record = run_recorded(make_case(with_bias=False), head_needs_gradient)
    assert len([name for name in record.operations if "mm" in name]) == products


def test_rows_of_weight_zero_reach_no_product():
    case = make_case(40, 8, 131, 5, with_bias=False, dtype=torch.float64)
    weights = torch.zeros(40)
    weights[[3, 17]] = 1.0
    record = run_recorded(case, weights=weights)
    assert record.largest <= 2 * 131 * 8  # counted in fp32 elements
    kept = [3, 17]
    alone = topk_divergence(
        case.hidden[kept], case.unembedding, case.ids[kept], case.logprobs[kept]
    )
    whole = topk_divergence(case.hidden, case.unembedding, case.ids, case.logprobs, weights=weights)
    assert_same(whole[kept], alone)


def test_the_hot_path_asks_a_device_nothing():
    """On the meta device there are no values to ask for: any synchronisation raises."""
    hidden = torch.randn(64, 16, device="meta", requires_grad=True)
    head = torch.randn(1000, 16, device="meta", requires_grad=True)
    ids = torch.zeros(64, 8, device="meta", dtype=torch.int32)
    logprobs = torch.zeros(64, 8, device="meta")
    options = {
        "labels": torch.zeros(64, device="meta", dtype=torch.int64),
        "weights": torch.zeros(64, device="meta"),
        "ce_weight": 0.5,
        "temperature": 2.0,
        "softcap": 3.0,
        "memory_budget": 100_000,
    }
    loss = topk_divergence(hidden, head, ids, logprobs, **options)
    (loss.sum() / 3).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    with pytest.raises(RuntimeError, match="meta"):
        topk_divergence(hidden, head, ids, logprobs, **options, debug=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "adaptive_kl"])
def test_any_budget_gives_the_same(divergence):
    """From one row a chunk to all rows in one."""
    case = make_case(divergence=divergence, dtype=torch.float64)
    plain = case.run("chunked", memory_budget=2**30)
    for budget in (1, 2000, 3000):
        found = case.run("chunked", memory_budget=budget)
        for name in plain:
            assert_same(found[name], plain[name], (budget, name))


def test_bf16_head_summed_in_fp32_over_many_chunks():
    """Sixty-four chunks of one row: bf16 sums drift, fp32 ones are as good as one chunk."""
    case = make_case(64, 16, 131, 5, dtype=torch.bfloat16, with_bias=False)
    truth = case.to(torch.float64).run("eager")["unembedding"]
    drifted = case.run("chunked", memory_budget=1)["unembedding"]
    summed = case.run("chunked", memory_budget=1, accumulate_fp32=True)["unembedding"]
    assert summed.dtype == torch.bfloat16
    assert error(summed, truth) < 0.75 * error(drifted, truth)


def test_gradcheck():
    """Finite differences in fp64, through both autograd paths of the fused form."""
    case = make_case(5, 4, 17, 3, dtype=torch.float64, temperature=1.3, ce_weight=0.4)
    leaves = [t.requires_grad_() for t in (case.hidden, case.unembedding, case.bias)]
    options = case.options | {"labels": torch.tensor([0, -1, 3, 16, 2]), "softcap": 4.0}
    options["weights"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)

    def rows(hidden, head, bias):
        return topk_divergence(hidden, head, case.ids, case.logprobs, bias=bias, **options)

    assert torch.autograd.gradcheck(rows, leaves, nondet_tol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: rows(*t).sum() / 3, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("door", [call, dense_call])
@pytest.mark.parametrize(
    ("dtype", "interpret", "message"),
    [
        (torch.float32, None, "impl: 'triton' needs a CUDA device; hidden is on cpu"),
        (torch.float64, "1", "impl: 'triton' computes in fp32; found fp64 inputs"),
    ],
)
def test_triton_that_cannot_run_is_an_error_not_a_fallback(
    monkeypatch, door, dtype, interpret, message
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(RuntimeError, match=message):
        door(dtype, impl="triton")


def test_triton_missing_is_an_error_not_a_fallback(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("rows", "sweep"):
        monkeypatch.delitem(sys.modules, f"stillroom.pipeline.kernels.triton.{name}", raising=False)
        monkeypatch.delattr(kernels.triton, name, raising=False)
    with pytest.raises(RuntimeError, match="needs Triton, which does not import"):
        call(impl="triton")


@pytest.mark.parametrize("debug", [False, True])
def test_a_compiled_model_breaks_its_graph_only_where_values_are_to_be_checked(debug):
    """Nothing of the loss itself is traced; see `test_compiled_door`."""
    case = make_case(with_bias=False, dtype=torch.float64)

    def step(hidden, head):
        rows = topk_divergence(
            torch.tanh(hidden), head, case.ids, case.logprobs, impl="chunked", debug=debug
        )
        return 2 * rows.sum()

    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.unembedding)]
    seen = torch._dynamo.explain(step)(*leaves)
    assert (seen.graph_break_count > 0) == debug
    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
