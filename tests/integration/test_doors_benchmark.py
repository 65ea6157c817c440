"""The benchmark that sets trainers of others beside ours still runs, and finds the same losses.

One idea: it is measured by hand and rarely, so what it asks of the product is asked here each time,
on a cache and students of a few thousand weights. Its seconds mean nothing here.
"""

from argparse import Namespace

from benchmarks import doors
from tests import memory_cache, tiny_models


def test_trainers_are_set_beside_ours_on_one_cache(tiny_llama, tmp_path):
    made = memory_cache.captured(tiny_llama, memory_cache.examples(12))
    student = tiny_models.save_llama(tmp_path / "student", num_layers=1, seed=3)
    asked = Namespace(
        cache=str(made.write(tmp_path / "cache")),
        teacher=str(tiny_llama),
        student=str(student),
        steps=2,
        batch=2,
        about="made here",
    )
    found = doors.measure(asked, tmp_path / "work")
    assert found["steps"] == 2
    assert found["trl_loss_difference"] < 1e-6
    assert found["trainer_loss_difference"] < 1e-6
