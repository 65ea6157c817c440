"""axolotl and ms-swift by what our plugins take of them, where the packages themselves are not.

One idea: both pin other versions of transformers and TRL than the environment of these tests has,
so their public interface is written here again, from axolotl 0.19.0 and ms-swift 4.6.0: constructor
arguments, the collator that each makes of its own, the registry each reads. Neither's models,
files or command line. Where axolotl is installed, `axolotl` gives the real one.
"""

import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers import Trainer, TrainingArguments, default_data_collator


def axolotl(monkeypatch) -> SimpleNamespace:
    """`load_plugin` and the class of training arguments."""
    if find_spec("axolotl") is not None:
        arguments = importlib.import_module("axolotl.core.training_args").AxolotlTrainingArguments
    else:
        arguments = TrainingArguments
        _put(monkeypatch, "axolotl.common.datasets", TrainDatasetMeta=TrainDatasetMeta)
        _put(monkeypatch, "axolotl.core.trainers", AxolotlTrainer=AxolotlTrainer)
        _put(monkeypatch, "axolotl.integrations.base", BasePlugin=object, load_plugin=load_plugin)
        monkeypatch.delitem(sys.modules, "stillroom.pipeline.doors.axolotl_plugin", raising=False)
    base = importlib.import_module("axolotl.integrations.base")
    return SimpleNamespace(load_plugin=base.load_plugin, arguments=arguments)


def swift(monkeypatch) -> SimpleNamespace:
    """The factory of trainers and the registered data sets."""
    found: dict[str, Any] = {}
    _put(
        monkeypatch,
        "swift.dataset",
        DatasetLoader=object,
        DatasetMeta=SimpleNamespace,
        register_dataset=lambda meta, exist_ok: found.__setitem__(meta.dataset_name, meta),
    )
    factory = type("TrainerFactory", (), {"TRAINER_MAPPING": {}})
    _put(monkeypatch, "swift.trainers", Seq2SeqTrainer=SwiftTrainer, TrainerFactory=factory)
    monkeypatch.delitem(sys.modules, "stillroom.pipeline.doors.swift_plugin", raising=False)
    return SimpleNamespace(mapping=factory.TRAINER_MAPPING, datasets=found)


def _put(monkeypatch, name: str, **what: Any) -> None:
    """A module of that name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    vars(sys.modules[name]).update(what)


@dataclass
class TrainDatasetMeta:
    """`axolotl.common.datasets.TrainDatasetMeta`."""

    train_dataset: Any
    eval_dataset: Any = None
    total_num_steps: int | None = None


class AxolotlTrainer(Trainer):
    """`axolotl.core.trainers.AxolotlTrainer` as far as its constructor."""

    def __init__(
        self,
        *given,
        bench_data_collator=None,
        eval_data_collator=None,
        dataset_tags=None,
        **more,
    ):
        self.eval_data_collator = eval_data_collator
        super().__init__(*given, **more)

    def compute_loss(self, *given, **more):
        raise AssertionError("it reads logits")

    def prediction_step(self, *given, **more):
        raise AssertionError("it reads logits")


def load_plugin(name: str) -> Any:
    """`axolotl.integrations.base.load_plugin`."""
    module, kind = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), kind)()


class SwiftTrainer(Trainer):
    """`swift.trainers.Seq2SeqTrainer` as far as its constructor: it makes its own collator."""

    def __init__(self, model, args, template, train_dataset, eval_dataset=None, **more):
        super().__init__(
            model=model,
            args=args,
            data_collator=self._get_data_collator(args, template),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=template.tokenizer,
            **more,
        )

    compute_loss = prediction_step = AxolotlTrainer.compute_loss

    def get_eval_dataloader(self, *given, **more):
        raise AssertionError("it reads rows of its own")

    def _get_data_collator(self, args, template):
        return default_data_collator
