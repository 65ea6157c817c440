"""Every capture profile, in every form of the tail, trains every objective of rows from disk."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.cache.care.verification import verify
from stillroom.pipeline.cache.reader import TeacherCache
from stillroom.pipeline.cache.storage.directory import DirectoryStorage
from stillroom.pipeline.cache.writer import CacheWriter
from stillroom.pipeline.objectives.registry import OBJECTIVES
from stillroom.pipeline.training.trainer import train
from tests import memory_cache
from tests.integration.test_every_objective import written_by
from tests.integration.test_training import losses, make_run

PROFILES = ("exact", "strict", "small", "portable")
TAILS = {
    "list": {"k": 12},
    "list and draws": {"k": 4, "tail_draws": 8},
    "nucleus": {"k": 12, "nucleus": 0.5},
    "draws alone": {"k": 0, "tail_draws": 8},
}
DRAWS = ("list and draws", "draws alone")
NEEDS_A_LIST = {"name": "forward_kl", "options": {"temperature": 0.5, "tail": "bucket"}}


def lines(tail: str) -> list[dict]:
    """Objectives that a cache of that tail can serve, each a small part of one mean."""
    drawn = [{"name": "forward_kl", "options": {"tail": "sampled"}}] * (tail in DRAWS)
    plain = [{"name": "cross_entropy"}]
    if tail == "draws alone":
        return drawn + plain
    every = sorted(n for n in OBJECTIVES if OBJECTIVES[n].unit == "row")
    listed = [{"name": n} for n in every if n not in ("cross_entropy", "full_vocabulary")]
    kinds = ("truncate", "renormalise", "bucket")
    tails = [{"name": "forward_kl", "options": {"tail": kind}} for kind in kinds]
    return drawn + plain + listed + tails + [NEEDS_A_LIST]


@pytest.fixture(scope="module")
def teacher(deep_llama, tmp_path_factory):
    """A sharp teacher: its lists hold nearly all mass, so what a profile rounds may pass 1."""
    model = AutoModelForCausalLM.from_pretrained(deep_llama)
    with torch.no_grad():
        model.model.norm.weight *= 12
    root = tmp_path_factory.mktemp("sharp") / "teacher"
    shutil.copytree(deep_llama, root)
    model.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def captured(teacher):
    """tail -> the teacher's records."""
    texts = written_by(teacher, 8, seed=0)
    common = {"moments": True, "temperatures": (0.5, 1.0), "entropy": True}
    return {
        tail: memory_cache.captured(teacher, texts, **common, **settings)
        for tail, settings in TAILS.items()
    }


def written(root, cache, profile):
    """The same records on disk under a profile."""
    facts = cache.plan.facts
    capture = facts["capture"] | {"profile": profile}
    plan = type(cache.plan).from_facts(facts | {"capture": capture}, "test")
    writer = CacheWriter.open(root, plan)
    if writer.needs_fit:
        writer.fit(cache.records)
    for shard in writer.missing():
        writer.write(shard, [cache.records[number] for number in plan.shard_range(shard)])
    writer.seal()
    return root


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_was_verified_trains(tmp_path, teacher, captured, profile, tail):
    root = written(tmp_path / "cache", captured[tail], profile)
    assert verify(DirectoryStorage(root)).problems == []
    cache = TeacherCache.open(root)
    run = make_run(tmp_path / "run", teacher, objective=lines(tail), steps=1, checkpoint_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(run, caches={"": cache})
    assert np.isfinite(losses(run)).all()


def test_rounded_rows_do_pass_one(tmp_path, captured):
    """What the tests above rest on: `strict` does decode rows that the kernel would refuse."""
    cache = TeacherCache.open(written(tmp_path / "cache", captured["list"], "strict"))
    masses = np.concatenate([np.exp(record.signals["topk_logprobs"]).sum(1) for record in cache])
    assert masses.max() > 1.001
