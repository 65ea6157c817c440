"""Heads on several ranks: two gloo processes against one, value and gradient."""

import json
import traceback
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from stillroom.pipeline.kernels.distributed_head import (
    DivergenceHead,
    shard_of,
    sharded_topk_divergence,
)
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import assert_same, judged, make_case
from tests.ranks import leave

RANKS = 2
PATIENCE = timedelta(seconds=60)
"""Where one rank fails a check, the other does not wait for it for ever."""
IMPLS = ("chunked", "triton")
OPTIONS = {
    "plain": {"divergence": "forward_kl"},
    "reverse": {"divergence": "reverse_kl", "tail": "renormalise"},
    "tempered": {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5, "softcap": 4.0},
    "hard": {"divergence": "tv", "ce_weight": 0.5},
}
LABELS = torch.tensor([0, -1, 130, 66, 65, 3, -1, 64, 100, 1, 67])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every check said on every rank; one group of processes runs them all."""
    directory = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # The processes inherit it, and Triton reads it when they import it.
        patch.setenv("TRITON_INTERPRET", "1")
        mp.spawn(_join, (str(directory),), nprocs=RANKS)
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank*"))]


def _join(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    found = {check.__name__: _outcome(check) for check in CHECKS}
    Path(directory, f"rank{rank}").write_text(json.dumps(found))
    leave()


def _outcome(check):
    try:
        check()
    except BaseException:
        return traceback.format_exc()
    return "passed"


def case_of(options, impl):
    labels = {"labels": LABELS} if "ce_weight" in options else {}
    return make_case(words=131, dtype=judged(impl), **options, **labels)


def sharded(case, impl, valid_vocab=None, **options):
    """Loss and gradients of a case whose head is cut over the ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    leaves = {
        "hidden": distribute_tensor(case.hidden, mesh, [Replicate()]),
        "unembedding": distribute_tensor(case.unembedding, mesh, [Shard(0)]),
    }
    if case.bias is not None:
        leaves["bias"] = distribute_tensor(case.bias, mesh, [Shard(0)])
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    options = {"impl": impl, "valid_vocab": valid_vocab} | case.options | options
    loss = sharded_topk_divergence(**leaves, ids=case.ids, logprobs=case.logprobs, **options)
    loss.sum().backward()
    return {"loss": loss} | {name: leaf.grad.full_tensor() for name, leaf in leaves.items()}


def assert_all_same(found, plain, what):
    for name in found:
        assert_same(found[name], plain[name], (what, name))


def check_sharded_over_words():
    for impl, options in product(IMPLS, OPTIONS.values()):
        case, what = case_of(options, impl), (impl, options)
        assert_all_same(sharded(case, impl, memory_budget=4000), case.run("chunked"), what)
        case.unembedding = torch.cat([case.unembedding, case.unembedding.new_ones(1, 24)])
        case.bias = torch.cat([case.bias, case.bias.new_ones(1)])
        plain = case.run("chunked", valid_vocab=131)
        assert_all_same(sharded(case, impl, 131, memory_budget=4000), plain, what)


def check_a_rank_without_words():
    """Three rows of head on two ranks of which one is past the vocabulary."""
    for impl in IMPLS:
        case = make_case(words=3, k=2, padding=False, with_bias=False, dtype=judged(impl))
        case.unembedding = torch.cat([case.unembedding, case.unembedding.new_zeros(3, 24)])
        head = distribute_tensor(case.unembedding, init_device_mesh("cpu", (RANKS,)), [Shard(0)])
        assert shard_of(head, 3).width == (3 if dist.get_rank() == 0 else 0)
        assert_all_same(sharded(case, impl, 3), case.run("chunked", valid_vocab=3), impl)


def check_no_gradient_only_the_loss():
    mesh = init_device_mesh("cpu", (RANKS,))
    for impl in IMPLS:
        case = case_of(OPTIONS["tempered"], impl)
        hidden = distribute_tensor(case.hidden, mesh, [Replicate()])
        head = distribute_tensor(case.unembedding, mesh, [Shard(0)])
        bias = distribute_tensor(case.bias, mesh, [Shard(0)])
        loss = sharded_topk_divergence(
            hidden, head, case.ids, case.logprobs, bias=bias, impl=impl, **case.options
        )
        assert_same(loss, case.run("chunked")["loss"], impl)


def check_three_all_reduces():
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for impl in IMPLS:
        sharded(make_case(with_bias=False), impl)
    dist.all_reduce = all_reduce
    assert calls == [(11, 3), (11, 10), (11, 24)] * len(IMPLS)


def check_fsdp_head():
    """Each rank has rows of its own; FSDP2 averages gradients over ranks."""
    case = make_case(12, with_bias=False, dtype=torch.float64)
    plain = case.run("chunked")
    linear = nn.Linear(24, 131, bias=False)
    linear.weight = nn.Parameter(case.unembedding.clone())
    head = fully_shard(DivergenceHead(linear), mesh=init_device_mesh("cpu", (RANKS,)))
    mine = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    for _ in range(2):
        loss = head(case.hidden[mine], case.ids[mine], case.logprobs[mine])
        loss.sum().backward()
    assert_same(loss, plain["loss"][mine])
    assert_same(head.weight.grad.full_tensor(), 2 * plain["unembedding"] / RANKS)


def check_ambiguous_placements_are_refused():
    mesh = init_device_mesh("cpu", (RANKS,))
    case = make_case(with_bias=False)
    head = distribute_tensor(case.unembedding, mesh, [Shard(0)])
    hidden = distribute_tensor(case.hidden, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"hidden: found a plain tensor; expected a DTensor"):
        sharded_topk_divergence(case.hidden, head, case.ids, case.logprobs)
    whole = distribute_tensor(case.unembedding, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"unembedding: found \(Replicate\(\),\)"):
        sharded_topk_divergence(hidden, whole, case.ids, case.logprobs)
    with pytest.raises(ValueError, match=r"unembedding: is a DTensor; .*distributed_head"):
        topk_divergence(case.hidden, head, case.ids, case.logprobs)
    with pytest.raises(ValueError, match=r"shard: 'eager' needs the whole head"):
        sharded_topk_divergence(hidden, head, case.ids, case.logprobs, impl="eager")


CHECKS = [
    check_sharded_over_words,
    check_a_rank_without_words,
    check_no_gradient_only_the_loss,
    check_three_all_reduces,
    check_fsdp_head,
    check_ambiguous_placements_are_refused,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(outcomes, check):
    assert [found[check.__name__] for found in outcomes] == ["passed"] * RANKS
