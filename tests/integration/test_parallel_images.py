"""Ranks whose microbatches hold no image, beside ranks whose do: gloo on the CPU, in float64."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests.in_float64 import assert_same_losses, assert_same_weights, in_float64
from tests.integration.test_parallel_training import THREADS, meeting_place, weights
from tests.integration.test_vision_training import FROZEN, PLAIN, in_memory, run_of, world

__all__ = ["world"]

CHILD = """
import json, sys
from stillroom.pipeline.config import parse
from stillroom.pipeline.training.trainer import train
from stillroom.stages.__main__ import leave_group
from tests.in_float64 import in_float64

with in_float64():
    train(parse(json.loads(sys.argv[1]), "test"))
leave_group(0)
"""
# Negatives are of one microbatch, over all ranks: not of another microbatch of the same rank.
EMBEDDING = {
    "name": "embedding",
    "cache": "vision",
    "options": {"target": "dino", "layers": [1, 2], "seek": 4, "contrastive": 0.0},
}
SETTINGS = {"batch_tokens": 26, "accumulate": 2, "freeze": FROZEN, "steps": 4, "evaluate_every": 2}
PATIENCE = 120  # seconds; ranks that wait for each other wait for ever


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """Where texts lie of which a third is without a picture, to train on and held out; one fits a
    microbatch."""
    records, root = [], tmp_path_factory.mktemp("mixed")
    for number, record in enumerate(world["cache"].records):
        bare = record.example.token_ids.copy()
        bare[2:18] = 5
        without = replace(record.example, token_ids=bare, images=())
        records.append(record if number % 3 else replace(record, example=without))
    trained, heldout = (in_memory(part, world["llava"]) for part in (records[:5], records[5:]))
    return {
        "cache": str(trained.write(root / "cache")),
        "heldout_cache": str(heldout.write(root / "heldout")),
    }


def on_two_ranks(run) -> None:
    """Train in two processes as torchrun would start them."""
    argument, children = run.model_dump_json(), []
    with meeting_place() as place:
        for rank in range(2):
            names = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
            told = {name: str(value) for name, value in names.items()} | place
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, argument],
                env=os.environ | told | THREADS,
                stderr=subprocess.PIPE,
                text=True,
            )
            children.append(child)
        try:
            errors = [child.communicate(timeout=PATIENCE)[1] for child in children]
        finally:
            for child in children:
                child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("objectives", [[EMBEDDING], [PLAIN, EMBEDDING]])
def test_two_ranks_are_two_microbatches(world, mixed, objectives):
    settings, name = SETTINGS | mixed, len(objectives)
    compare(world, name, objectives, "embedding@vision", **settings)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_sees_has_no_gradient_on_a_rank_without_images(world, mixed, parallel):
    settings = SETTINGS | mixed | {"freeze": []}
    compare(world, f"sees-{parallel}", [PLAIN], "cross_entropy", parallel, **settings)


def compare(world, name, objectives, measure, parallel="ddp", **settings):
    """One rank and two take the same steps and measure the same."""
    alone = run_of(world, f"alone-{name}", objectives, **settings)
    together = run_of(world, f"two-{name}", objectives, **settings, parallel=parallel)
    with in_float64():
        train(alone)
    on_two_ranks(together)
    one, other = read_metrics(alone.path()), read_metrics(together.path())
    assert_same_losses([line["loss"] for line in other], [line["loss"] for line in one])
    label = next(key for key in one[-1] if key.endswith(measure) and "heldout" in key)
    assert_same_losses([other[-1][label]], [one[-1][label]])
    assert_same_weights(weights(together.path()), weights(alone.path()))
