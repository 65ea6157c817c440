"""Packed lists say what the cache's own decoder says."""

import numpy as np
import pytest
import torch

from stillroom.cache_schemas.errors import CacheError
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.kernels.packed_topk import PackedTopk
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from tests.contract.divergence_cases import DEVICE, IMPLEMENTATIONS, error, judged
from tests.contract.packed_cases import packed_lists
from tests.synthetic_records import TEMPERATURES, VOCAB, make_plan, records_of


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("words", "k"), [(131, 7), (20_000, 64), (70_000, 3), (50, 1), (600, 512)])
def test_it_unpacks_to_what_the_cache_decodes(words, k, strict):
    packed, lists = packed_lists(40, words, k, strict=strict)
    ids, logprobs = packed.unpack()
    assert np.array_equal(ids.numpy(), lists.ids)
    inside = lists.ids >= 0
    # Level and shift are added in fp32, where numbers between 16 and 32 are 2^-19 apart.
    assert np.allclose(logprobs.numpy()[inside], lists.logprobs[inside], rtol=0, atol=2 * 2.0**-19)
    assert np.isneginf(logprobs.numpy()[~inside]).all()


def test_far_apart_levels_widen_the_gaps():
    packed, lists = packed_lists(spread=40.0, strict=True)
    assert packed.gaps.dtype == torch.int32
    assert np.array_equal(packed.unpack()[0].numpy(), lists.ids)


def test_a_row_is_three_bytes_an_entry():
    packed, _ = packed_lists(64, 20_000, 64)
    assert packed.row_bytes <= 3 * 64 + 17
    assert packed.row_bytes < 0.45 * 8 * 64


def test_records_join_though_their_codebooks_differ():
    parts = [
        packed_lists(5, strict=strict, seed=seed)[0] for strict, seed in ((True, 0), (False, 0))
    ]
    shared = [PackedTopk.cat([part]) for part in parts]
    joined = PackedTopk.cat(parts)
    rows = [part.unpack() for part in shared]
    for column, found in enumerate(joined.unpack()):
        expected = torch.cat([row[column] for row in rows])
        assert torch.equal(found, expected)
    assert torch.equal(joined[3:7].unpack()[0], joined.unpack()[0][3:7])


def sealed_cache(root, **capture):
    plan = make_plan(**capture)
    writer = CacheWriter.open(root, plan)
    for shard in range(plan.num_shards):
        writer.write(shard, records_of(plan, shard))
    writer.seal()
    return TeacherCache.open(root)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("profile", ["small", "strict"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_from_a_cache_to_the_loss_without_plain_lists(tmp_path, profile, temperature, impl):
    """Value and gradient of a cache's rows are those of the signals that `read` gives; under
    Triton's interpreter, of one example of each shard.

    Either way adds fp32 numbers below 32 three times: each sum is within 2^-20, which is the
    relative error of a probability.
    """
    cache = sealed_cache(tmp_path, profile=profile)
    numbers = range(0, 10, 3 if impl == "triton" and DEVICE == "cpu" else 1)
    read = [cache.read(number, ["topk_ids", "topk_logprobs", "lse"]) for number in numbers]
    ids, logprobs, lse = (
        torch.from_numpy(np.concatenate([record.signals[name] for record in read]))
        for name in ("topk_ids", "topk_logprobs", "lse")
    )
    packed = PackedTopk.cat([PackedTopk.pack(*cache.lists(number)) for number in numbers])
    at_one, at_t = (lse[:, TEMPERATURES.index(t)] for t in (1.0, temperature))
    packed = packed.at_temperature(temperature, at_one, at_t)
    logprobs = (logprobs + at_one[:, None]) / temperature - at_t[:, None]
    torch.manual_seed(0)
    shapes = (len(ids), 16), (VOCAB, 16)
    hidden, head = (torch.randn(shape, dtype=judged(impl)) for shape in shapes)
    options = {"temperature": temperature, "impl": impl, "debug": False}
    results = []
    for lists in ((ids, logprobs), (packed,)):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = topk_divergence(*leaves, *lists, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for plain, found in zip(*results, strict=True):
        assert error(found, plain) < 2 * 3 * 2.0**-20


@pytest.mark.parametrize("profile", ["exact", "portable"])
def test_profiles_that_code_no_lists_say_so(tmp_path, profile):
    with pytest.raises(CacheError, match=f"profile '{profile}' codes no lists"):
        sealed_cache(tmp_path, profile=profile).lists(0)
