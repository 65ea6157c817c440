"""Steps without any picture: what sees has no gradient in them, and going on is not to stop."""

from dataclasses import replace

import pytest
import torch

from stillroom.cache_schemas.errors import StudentError
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import Interrupted, train
from tests.in_float64 import assert_same_weights, in_float64
from tests.integration import test_parallel_training
from tests.integration.test_parallel_images import compare, on_two_ranks
from tests.integration.test_vision_training import FROZEN, PLAIN, in_memory, run_of, weights, world

__all__ = ["world"]

ONE_TEXT = {"batch_tokens": 26, "learning_rate": 1e-3}
EVEN = {"schedule": "constant", "warmup": 0.0}  # so that a longer run begins as a shorter one


def seldom(world, *with_picture: int):
    """The texts of the world, of which only some keep their picture."""
    records = []
    for number, record in enumerate(world["cache"].records):
        bare = record.example.token_ids.copy()
        bare[2:18] = 5
        without = replace(record, example=replace(record.example, token_ids=bare, images=()))
        records.append(record if number in with_picture else without)
    return in_memory(records, world["llava"])


def stopped_after(run, cache, step: int) -> None:
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        train(run, caches={"": cache}, stop=lambda: next(asked) == step)


def norms(run) -> list[float]:
    return [line["gradient_norm"] for line in read_metrics(run.path())]


@pytest.fixture(scope="module")
def whole(world):
    """What twelve steps make of two pictures among eight texts, without a checkpoint between."""
    run = run_of(world, "whole", [PLAIN], steps=12, checkpoint_every=100, ema=0.9, **ONE_TEXT)
    train(run, caches={"": seldom(world, 2, 5)})
    return weights(run.path("student"))


@pytest.mark.parametrize("step", [1, 4, 9])  # before the first picture, and with some behind
def test_going_on_is_not_to_stop(world, whole, step):
    settings = {"steps": 12, "checkpoint_every": 3, "ema": 0.9} | ONE_TEXT
    run, cache = run_of(world, f"cut-{step}", [PLAIN], **settings), seldom(world, 2, 5)
    stopped_after(run, cache, step)
    train(run, caches={"": cache})
    found = weights(run.path("student"))
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_a_projector_alone_is_left_as_it_is_by_a_step_without_a_picture(world):
    """Adam's decay and moments too; and a cache without any picture is refused."""
    settings = {"freeze": FROZEN, "steps": 8} | ONE_TEXT
    run, cache = run_of(world, "projector", [PLAIN], **settings), seldom(world, 2, 5)
    stopped_after(run, cache, 3)
    train(run, caches={"": cache})
    assert [norm > 0 for norm in norms(run)].count(True) == 2
    texts = seldom(world)
    texts.plan.facts["images"] = False
    nothing = run_of(world, "nothing", [PLAIN], **settings)
    with pytest.raises(StudentError, match="only what sees is trained"):
        train(nothing, caches={"": texts})


@pytest.fixture(scope="module")
def scarce(world, tmp_path_factory):
    """Where such texts lie, to train on and held out."""
    root = tmp_path_factory.mktemp("scarce")
    records = seldom(world, 2, 6).records
    trained, heldout = (in_memory(part, world["llava"]) for part in (records[:5], records[5:]))
    return {
        "cache": str(trained.write(root / "cache")),
        "heldout_cache": str(heldout.write(root / "heldout")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("freeze", [FROZEN, []], ids=["projector", "everything"])
def test_two_ranks_are_two_microbatches(world, scarce, kind, freeze):
    settings = {"accumulate": 2, "steps": 5, "evaluate_every": 5, "freeze": freeze} | ONE_TEXT
    name = f"{kind}-{len(freeze)}"
    compare(world, name, [PLAIN], "cross_entropy", kind, **settings, **scarce)
    if freeze:
        assert 0.0 in norms(run_of(world, f"two-{name}", [PLAIN]))


@pytest.mark.slow
def test_two_ranks_go_on_where_one_stopped(world, scarce):
    settings = {"accumulate": 2, "steps": 6} | ONE_TEXT | EVEN | scarce
    alone, cut = (run_of(world, f"{name}-ranks", [PLAIN], **settings) for name in ("one", "cut"))
    with in_float64():
        train(alone)
        train(run_of(world, "cut-ranks", [PLAIN], **settings | {"steps": 3}))
    on_two_ranks(run_of(world, "cut-ranks", [PLAIN], **settings, parallel="fsdp"))
    found, wanted = (test_parallel_training.weights(run.path()) for run in (cut, alone))
    assert_same_weights(found, wanted)
