"""Heads on several ranks: two gloo processes against one, value and gradient."""

import json
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pipeline.kernels.distributed_head import (
    DivergenceHead,
    shard_of,
    sharded_topk_divergence,
)
from pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import error, make_case

RANKS = 2
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
    mp.spawn(_join, (str(directory),), nprocs=RANKS)
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank*"))]


def _join(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {check.__name__: _outcome(check) for check in CHECKS}
    Path(directory, f"rank{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def _outcome(check):
    try:
        check()
    except BaseException:
        return traceback.format_exc()
    return "passed"


def case_of(options):
    labels = {"labels": LABELS} if "ce_weight" in options else {}
    return make_case(words=131, **options, **labels)


def check_sharded_over_words():
    mesh = init_device_mesh("cpu", (RANKS,))
    for options in OPTIONS.values():
        for valid_vocab in (131, 132):
            case = case_of(options)
            if valid_vocab == 132:
                case.options |= {"valid_vocab": 131}
                case.unembedding = torch.cat([case.unembedding, torch.ones(1, 24)])
                case.bias = torch.cat([case.bias, torch.ones(1)])
            plain = case.run("chunked")
            hidden = distribute_tensor(case.hidden, mesh, [Replicate()]).requires_grad_()
            head = distribute_tensor(case.unembedding, mesh, [Shard(0)]).requires_grad_()
            bias = distribute_tensor(case.bias, mesh, [Shard(0)]).requires_grad_()
            loss = sharded_topk_divergence(
                hidden, head, case.ids, case.logprobs, bias=bias, memory_budget=4000, **case.options
            )
            loss.sum().backward()
            assert error(loss, plain["loss"]) < 1e-6, options
            for leaf, name in ((hidden, "hidden"), (head, "unembedding"), (bias, "bias")):
                assert error(leaf.grad.full_tensor(), plain[name]) < 2e-6, (options, name)


def check_a_rank_without_words():
    """Three rows of head on two ranks of which one is past the vocabulary."""
    mesh = init_device_mesh("cpu", (RANKS,))
    case = make_case(words=3, k=2, padding=False)
    case.unembedding = torch.cat([case.unembedding, torch.zeros(3, 24)])
    head = distribute_tensor(case.unembedding, mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(case.hidden, mesh, [Replicate()]).requires_grad_()
    assert shard_of(head, 3).width == (3 if dist.get_rank() == 0 else 0)
    loss = sharded_topk_divergence(hidden, head, case.ids, case.logprobs, valid_vocab=3)
    loss.sum().backward()
    case.bias = None
    plain = case.run("chunked", valid_vocab=3)
    assert error(loss, plain["loss"]) < 1e-6
    assert error(hidden.grad.full_tensor(), plain["hidden"]) < 2e-6
    assert error(head.grad.full_tensor(), plain["unembedding"]) < 2e-6


def check_three_all_reduces():
    mesh = init_device_mesh("cpu", (RANKS,))
    case = make_case()
    head = distribute_tensor(case.unembedding, mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(case.hidden, mesh, [Replicate()]).requires_grad_()
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    sharded_topk_divergence(hidden, head, case.ids, case.logprobs).sum().backward()
    dist.all_reduce = all_reduce
    assert calls == [(11, 3), (11, 10), (11, 24)]


def check_fsdp_head():
    """Each rank has rows of its own; FSDP2 averages gradients over ranks."""
    case = make_case(12, with_bias=False)
    plain = case.run("chunked")
    linear = nn.Linear(24, 131, bias=False)
    linear.weight = nn.Parameter(case.unembedding.clone())
    head = fully_shard(DivergenceHead(linear), mesh=init_device_mesh("cpu", (RANKS,)))
    mine = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    for _ in range(2):
        loss = head(case.hidden[mine], case.ids[mine], case.logprobs[mine])
        loss.sum().backward()
    assert error(loss, plain["loss"][mine]) < 1e-6
    assert error(head.weight.grad.full_tensor(), 2 * plain["unembedding"] / RANKS) < 1e-6


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
    with pytest.raises(ValueError, match=r"shard: needs impl='chunked'; found 'eager'"):
        sharded_topk_divergence(hidden, head, case.ids, case.logprobs, impl="eager")


CHECKS = [
    check_sharded_over_words,
    check_a_rank_without_words,
    check_three_all_reduces,
    check_fsdp_head,
    check_ambiguous_placements_are_refused,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(outcomes, check):
    assert [found[check.__name__] for found in outcomes] == ["passed"] * RANKS
