"""Trainers of transformers and TRL on a cache: the loss of `stillroom train`, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from stillroom.cache_schemas.errors import StillroomError
from stillroom.hf import CachedSFTTrainer, CachedTrainer
from stillroom.pipeline.data.loader import DistillLoader, Geometry
from stillroom.pipeline.data.packing import Position
from stillroom.pipeline.objectives.combine import Distiller, signals_needed
from tests import memory_cache

LINES = [
    {"name": "forward_kl", "options": {"ce_weight": 0.1}},
    {"name": "reverse_kl", "weight": 0.5, "reduction": "sample"},
]


@pytest.fixture(scope="module")
def cache(deep_llama, tmp_path_factory):
    made = memory_cache.captured(
        deep_llama, memory_cache.examples(40), temperatures=(1.0, 2.0), hidden_layers=("final",)
    )
    return str(made.write(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="module")
def held(deep_llama, tmp_path_factory):
    made = memory_cache.captured(
        deep_llama,
        memory_cache.examples(7, seed=1),
        temperatures=(1.0, 2.0),
        hidden_layers=("final",),
    )
    return str(made.write(tmp_path_factory.mktemp("held") / "cache"))


@pytest.fixture
def student(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


KINDS = [(CachedTrainer, TrainingArguments), (CachedSFTTrainer, SFTConfig)]


def arguments(kind, directory, **more):
    return kind(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }
        | more
    )


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_ten_lines(kind, config, student, cache, tmp_path):
    trainer = kind(student, arguments(config, tmp_path), cache=cache, objectives=LINES)
    trainer.train()
    assert len(logged(trainer)) == 2
    print(trainer.state.log_history)
