"""A teacher for each source of text: several caches trained from as one."""

import json

import numpy as np
import pytest

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.config import parse
from stillroom.pipeline.data.joined import Joined
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.heldout_sets import held_out_sets
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models


@pytest.fixture(scope="module")
def caches(tiny_llama, deep_llama, tmp_path_factory):
    """Of two teachers, each asked about texts of its own."""
    root = tmp_path_factory.mktemp("two")
    made = [
        memory_cache.captured(teacher, memory_cache.examples(count, seed=seed))
        for seed, (teacher, count) in enumerate([(tiny_llama, 7), (deep_llama, 5)])
    ]
    return [str(one.write(root / str(number))) for number, one in enumerate(made)]


def test_every_text_has_its_own_teachers_answers(caches):
    data = CachedDataset(caches)
    parts = [CachedDataset(one) for one in caches]
    assert len(data) == 12
    apart = [part[number][""] for part in parts for number in range(len(part))]
    for number, expected in enumerate(apart):
        found = data[number][""]
        assert found.example == expected.example
        for name, array in found.signals.items():
            np.testing.assert_array_equal(array, expected.signals[name])
    assert data.lengths.tolist() == [len(one.example.token_ids) for one in apart]
    shards = [data.sources[""].shard_of(number) for number in range(12)]
    assert shards == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert data[-1][""].example == apart[-1].example
    again = CachedDataset(caches[::-1])
    assert again.sources[""].plan.digest != data.sources[""].plan.digest


def test_a_run_trains_on_both(caches, tiny_llama, tmp_path):
    document = {
        "name": "both",
        "directory": str(tmp_path),
        "teacher": {"model": str(tiny_llama)},
        "student": {"keep_every": 2},
        "objective": [{"name": "forward_kl"}],
        "train": {
            "cache": caches[0],
            "joined": caches[1:],
            "steps": 2,
            "batch_tokens": 240,
            "workers": 0,
        },
    }
    run = parse(document, "test")
    assert np.isfinite(train(run).final_loss)
    identity = json.loads(run.path("train.json").read_text())["identity"]
    assert identity["cache train.cache"] == CachedDataset(caches).sources[""].plan.digest


def test_one_teachers_head_rebuilds_joined_caches(deep_llama, tiny_llama, tmp_path):
    """Of one teacher, or the vocabulary of some texts would be another's."""
    settings = {"hidden_layers": ("final",)}
    made = [
        memory_cache.captured(tiny_llama, memory_cache.examples(4, seed=seed), **settings)
        for seed in (20, 21)
    ]
    other = memory_cache.captured(deep_llama, memory_cache.examples(4, seed=22), **settings)
    places = [str(one.write(tmp_path / str(n))) for n, one in enumerate([*made, other])]
    document = {
        "name": "both",
        "directory": str(tmp_path / "run"),
        "teacher": {"model": str(tiny_llama), "dtype": "float32"},
        "student": {"keep_every": 2},
        "objective": [{"name": "full_vocabulary"}],
        "train": {"cache": places[0], "steps": 1, "batch_tokens": 240, "workers": 0},
    }
    document["train"]["joined"] = places[2:]
    with pytest.raises(StillroomError, match=r"joined cache 2: is another teacher.*of one teacher"):
        train(parse(document, "test"))
    document["train"]["joined"] = places[1:2]
    assert train(parse(document, "test")).steps == 1


def test_each_source_is_measured_by_itself(caches, tiny_llama, tmp_path_factory):
    """A held-out cache is of one of the joined teachers, or of several of them."""
    root = tmp_path_factory.mktemp("held")
    other = tiny_models.save_llama(root / "other", num_layers=1, seed=9)
    held = {
        name: str(memory_cache.captured(one, memory_cache.examples(3, seed=9)).write(root / name))
        for name, one in (("first", tiny_llama), ("nobody", other))
    }
    trained = CachedDataset(caches)
    sets = held_out_sets({"first": held["first"], "both": caches, "turned": caches[::-1]}, trained)
    assert [len(one.dataset) for one in sets.values()] == [3, 12, 12]
    with pytest.raises(StillroomError, match=r"is another teacher: .*one of the 2 that are joined"):
        held_out_sets({"nobody": held["nobody"]}, trained)
    with pytest.raises(StillroomError, match="is another teacher"):  # one of the two alone is known
        held_out_sets(caches, CachedDataset(caches[0]))


def test_what_cannot_be_trained_from_together(caches, tiny_llama):
    other = memory_cache.captured(tiny_llama, memory_cache.examples(3, seed=9), k=4)
    with pytest.raises(StillroomError, match=r"joined cache 2 has \[capture\] k = 4; expected 16"):
        CachedDataset([caches[0], other])
    with pytest.raises(StillroomError, match="two of the joined caches are about example"):
        CachedDataset([caches[0], caches[0]])
    first, _ = (CachedDataset(one).sources[""] for one in caches)
    with pytest.raises(IndexError):
        Joined([first]).read(7)
