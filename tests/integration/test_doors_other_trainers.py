"""Trainers of axolotl and ms-swift on a cache, by their plugins: the steps of ours."""

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from stillroom.cache_schemas.errors import StillroomError
from tests import other_trainers
from tests.in_float64 import norms_in_float64
from tests.integration import test_doors_trainers as trials
from tests.integration.test_doors_trainers import (
    BATCH,
    LINES,
    ROOT,
    STEPS,
    arguments,
    assert_same_weights,
    logged,
    order_of,
    student,
)

cache, held, ours = trials.cache, trials.held, trials.ours  # its fixtures

PAGE = ROOT / "runbooks" / "84-axolotl-and-ms-swift.md"


class Settings(dict):
    """axolotl's own kind of dictionary: what is missing is None."""

    def __getattr__(self, name):
        return self.get(name)


def settings(cache, **more) -> Settings:
    """What axolotl has read of a file, with the page's own table."""
    return Settings({"stillroom": {"cache": cache, "objectives": LINES, **more}, "batch_size": 6})


@pytest.fixture
def axolotl(monkeypatch):
    return other_trainers.axolotl(monkeypatch)


@pytest.fixture
def plugin(axolotl):
    return axolotl.load_plugin("stillroom.hf.AxolotlPlugin")


def test_axolotls_steps_are_those_of_stillroom_train(
    axolotl, plugin, ours, tiny_llama, cache, held, tmp_path
):
    losses, weights = ours
    cfg = settings(cache, eval_cache=held)
    plugin.register(cfg)
    found = plugin.load_datasets(cfg)
    with norms_in_float64():
        trainer = plugin.get_trainer_cls(cfg)(
            model=student(tiny_llama, torch.float64),
            train_dataset=order_of(cache),
            eval_dataset=found.eval_dataset,
            args=arguments(axolotl.arguments, tmp_path),
            data_collator=print,
            eval_data_collator=print,
            bench_data_collator=print,
            dataset_tags=[],
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        )
        trainer.train()
    np.testing.assert_allclose(logged(trainer), losses, rtol=1e-6)
    trainer.save_model()
    assert_same_weights(load_file(tmp_path / "model.safetensors"), weights)
    assert set(trainer.evaluate()) >= {"eval_loss", "eval_1.forward_kl"}


def test_axolotl_is_given_every_example_and_the_steps_of_its_epochs(plugin, cache, held):
    cfg = settings(cache, eval_cache=held)
    cfg["num_epochs"] = 2
    found = plugin.load_datasets(cfg)
    assert (len(found.train_dataset), len(found.eval_dataset)) == (40, 7)
    assert found.total_num_steps == 14  # 80 examples by six
    cfg["max_steps"] = 3
    assert plugin.load_datasets(cfg).total_num_steps == 3


def test_what_an_axolotl_file_must_not_say(plugin, cache):
    with pytest.raises(StillroomError, match="no cache is named"):
        plugin.register(Settings(stillroom={"objectives": ["forward_kl"]}))
    own = settings(cache) | {"datasets": [{"path": "mine"}]}
    with pytest.raises(StillroomError, match="datasets beside a cache"):
        plugin.register(Settings(own))
    misspelt = settings(cache, objective=["forward_kl"])
    with pytest.raises(ValueError, match="objective"):
        plugin.get_trainer_cls(misspelt)


def test_sample_packing_is_refused(axolotl, plugin, tiny_llama, cache, tmp_path):
    args = arguments(axolotl.arguments, tmp_path)
    args.sample_packing = True
    with pytest.raises(StillroomError, match=r"sample_packing = True.*Set it false"):
        plugin.get_trainer_cls(settings(cache))(model=student(tiny_llama), args=args)


def test_swifts_steps_are_those_of_stillroom_train(
    monkeypatch, ours, tiny_llama, cache, held, tmp_path
):
    losses, weights = ours
    swift = other_trainers.swift(monkeypatch)
    from stillroom.pipeline.doors import swift_plugin

    monkeypatch.setattr(swift_plugin.CachedSwiftTrainer, "table", {})
    swift_plugin.distil_in_swift(cache, LINES, eval_cache=held, train_dataset=order_of(cache))
    assert len(swift.datasets["stillroom"].loader().load()) == 1
    module, _, name = swift.mapping["causal_lm"].rpartition(".")
    with norms_in_float64():
        trainer = getattr(importlib.import_module(module), name)(
            model=student(tiny_llama, torch.float64),
            args=arguments(other_trainers.TrainingArguments, tmp_path),
            template=SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(tiny_llama)),
            train_dataset=["one row"],
            eval_dataset=["one row"],
        )
        trainer.train()
    np.testing.assert_allclose(logged(trainer), losses, rtol=1e-6)
    trainer.save_model()
    assert_same_weights(load_file(tmp_path / "model.safetensors"), weights)
    assert len(logged(trainer)) == STEPS
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.args.per_device_train_batch_size == BATCH


def test_the_pages_files_are_what_the_plugins_take(monkeypatch, plugin, cache, held):
    text = PAGE.read_text()
    (file,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    cfg = Settings(yaml.safe_load(file))
    assert cfg["plugins"] == ["stillroom.hf.AxolotlPlugin"]
    cfg["stillroom"] |= {"cache": cache, "eval_cache": held}
    cfg["batch_size"] = 6
    plugin.register(cfg)
    assert len(plugin.load_datasets(cfg).train_dataset) == 40
    swift = other_trainers.swift(monkeypatch)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    named = {"runs/mine/cache": cache, "runs/held-out/cache": held}
    exec(re.sub(r'"(runs/[^"]+)"', lambda m: repr(named[m[1]]), code), {})
    assert swift.mapping["causal_lm"].endswith("CachedSwiftTrainer")
