"""Trainers on image-text caches and on objectives that read the teacher's head."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    TrainingArguments,
)

from stillroom.cache_schemas.errors import StillroomError
from stillroom.hf import CachedTrainer, dataset_of
from stillroom.pipeline.data.packing import RowPlan
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.student.llava import TASK_TOKENS
from stillroom.pipeline.student.teacher_head import FILE
from stillroom.pipeline.training.trainer import train
from tests import memory_cache
from tests.in_float64 import in_float64, norms_in_float64
from tests.integration.test_doors_trainers import USUAL, logged
from tests.integration.test_vision_training import EMBEDDING, PLAIN, run_of, world  # noqa: F401

STEPS = 2
MORE = USUAL | {"max_steps": STEPS}


def sees(world, tmp_path, corpus=True, model=None, **more):  # noqa: F811
    model = model or AutoModelForImageTextToText.from_pretrained(world["llava"], dtype="float64")
    return CachedTrainer(
        model,
        TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **MORE),
        cache=world["cache"],
        corpus=str(world["root"] / "run" / "corpus") if corpus else "",
        **({"objectives": [PLAIN]} | more),
    )


def test_an_image_text_cache_gives_the_losses_of_stillroom_train(world, tmp_path):  # noqa: F811
    same = {"schedule": "constant", "warmup": 0.0, "images": {}, "packing": "never"}
    run = run_of(world, "doors", [PLAIN], batch_tokens=52, **same | {"steps": STEPS})
    ours = []
    with in_float64():
        train(run, caches={"": world["cache"]}, on_progress=lambda now: ours.append(now.loss))
    count = len(world["cache"])
    plan = RowPlan(np.full(count, 26), np.arange(count) // 4, 26, packed=False)
    order = dataset_of(CachedDataset(world["cache"], [PLAIN]))
    order = order.select([number for (number,) in plan.epoch(0)])
    with norms_in_float64():
        trainer = sees(world, tmp_path, train_dataset=order, eval_cache=world["cache"])
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
    np.testing.assert_allclose(logged(trainer), ours, rtol=1e-6)
    batch = trainer.data.collate([trainer.data[0]])
    assert batch.batch.images.pixels.shape[:2] == (1, 3)


def test_images_that_nobody_would_see_are_refused(world, tiny_llama, tmp_path):  # noqa: F811
    with pytest.raises(StillroomError, match=r"keeps no pictures.*Give corpus ="):
        sees(world, tmp_path, corpus=False)
    text = AutoModelForCausalLM.from_pretrained(tiny_llama)
    words = AutoTokenizer.from_pretrained(world["llava"])
    with pytest.raises(StillroomError, match=r"hold images, and LlamaForCausalLM sees none"):
        sees(world, tmp_path, model=text, processing_class=words)
    batch = CachedDataset(world["cache"], [PLAIN])
    with pytest.raises(StillroomError, match="tokens alone do not show"):
        batch.collate([batch[0]]).inputs  # noqa: B018
    save_file({"task_tokens": torch.zeros(4, 64)}, world["llava"] / TASK_TOKENS)
    try:
        with pytest.raises(StillroomError, match=r"trained with task tokens.*stillroom train"):
            sees(world, tmp_path)
    finally:
        (world["llava"] / TASK_TOKENS).unlink()
    line = EMBEDDING | {"cache": ""}
    with pytest.raises(StillroomError, match=r"needs signal|brings task tokens"):
        sees(world, tmp_path, objectives=[line])


HEAD = {"name": "full_vocabulary"}


def test_the_teachers_head_is_taken_once(deep_llama, tiny_llama, tmp_path):
    texts = memory_cache.examples(8)
    cache = memory_cache.captured(deep_llama, texts, hidden_layers=("final",))
    losses = []
    for teacher in (str(deep_llama), ""):  # the second finds the head of the first
        trainer = CachedTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64),
            TrainingArguments(str(tmp_path), **MORE),
            cache=cache,
            objectives=[HEAD],
            teacher=teacher,
        )
        trainer.train()
        losses.append(logged(trainer))
    assert (tmp_path / FILE).is_file()
    assert losses[0] == losses[1]
    for directory, teacher, message in (
        (tmp_path / "other", tiny_llama, r"is another teacher.*weights.*teacher = of a trainer"),
        (tmp_path, tiny_llama, r"is another teacher.*weights"),  # where the right head is kept
        (tmp_path, tmp_path / "gone", r"cannot be compared.*Leave teacher out"),
    ):
        with pytest.raises(StillroomError, match=message):
            CachedTrainer(
                AutoModelForCausalLM.from_pretrained(tiny_llama),
                TrainingArguments(str(directory), **MORE),
                cache=cache,
                objectives=[HEAD],
                teacher=str(teacher),
            )
    assert not (tmp_path / "other" / FILE).exists()
