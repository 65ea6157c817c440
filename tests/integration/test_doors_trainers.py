"""Trainers of transformers and TRL on a cache: the steps, ranks and files of `stillroom train`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from stillroom.hf import CachedSFTTrainer, CachedTrainer, dataset_of
from stillroom.pipeline.config import parse
from stillroom.pipeline.data.packing import RowPlan
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests import memory_cache
from tests.in_float64 import ROUNDING, in_float64, norms_in_float64

LINES = [
    {"name": "forward_kl", "options": {"ce_weight": 0.1}},
    {"name": "reverse_kl", "weight": 0.5, "reduction": "sample", "final_weight": 1.0},
]
HIDDEN = [*LINES, {"name": "hidden", "options": {"pairs": [["final", "final"]]}}]
KINDS = [(CachedTrainer, TrainingArguments), (CachedSFTTrainer, SFTConfig)]
ROOT = Path(__file__).resolve().parents[2]
BATCH, ACCUMULATE, STEPS = 3, 2, 4


@pytest.fixture(scope="module")
def cache(deep_llama, tmp_path_factory):
    """Of 40 examples of up to 24 tokens, on disk."""
    return written(deep_llama, memory_cache.examples(40), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def held(deep_llama, tmp_path_factory):
    """Of 7 others."""
    texts = memory_cache.examples(7, seed=1)
    return written(deep_llama, texts, tmp_path_factory.mktemp("held"))


def written(teacher, texts, directory) -> str:
    made = memory_cache.captured(teacher, texts, temperatures=(1.0, 2.0), hidden_layers=("final",))
    return str(made.write(directory / "cache"))


def student(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


USUAL = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def arguments(kind, directory, **more):
    """Of few steps, in the order of the data set, with the optimiser of `stillroom train`."""
    own = {
        "output_dir": str(directory),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "bf16": False,
    }
    return kind(**(USUAL | own | more))


def logged(trainer, key="loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def order_of(cache) -> Dataset:
    """The examples in the order of `stillroom train`, one to a row."""
    found = memory_cache.examples(40)
    lengths = np.array([len(one.token_ids) for one in found])
    plan = RowPlan(lengths, np.arange(40) // 4, 24, packed=False)
    return dataset_of(CachedDataset(cache)).select([number for (number,) in plan.epoch(0)])


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=ROUNDING, err_msg=name)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_llama, deep_llama, cache):
    """Losses and weights of `stillroom train` with an example to a row, in float64."""
    document = {
        "name": "test",
        "directory": str(tmp_path_factory.mktemp("ours")),
        "teacher": {"model": str(deep_llama), "dtype": "float32"},
        "student": {"init": "model", "model": str(tiny_llama)},
        "objective": LINES,
        "train": {
            "cache": cache,
            "steps": STEPS,
            "batch_tokens": 24 * BATCH,
            "accumulate": ACCUMULATE,
            "packing": "never",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup": 0.0,
            "workers": 0,
        },
    }
    run = parse(document, "test")
    with in_float64():
        train(run)
    losses = [line["loss"] for line in read_metrics(run.path())]
    return losses, load_file(run.path("student", "model.safetensors"))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_steps_are_those_of_stillroom_train(kind, config, ours, tiny_llama, cache, tmp_path):
    losses, weights = ours
    with norms_in_float64():
        trainer = kind(
            student(tiny_llama, torch.float64),
            arguments(config, tmp_path),
            cache=cache,
            objectives=LINES,
            train_dataset=order_of(cache),
        )
        assert trainer.data.packed  # short examples share rows here, and had their own there
        trainer.train()
    np.testing.assert_allclose(logged(trainer), losses, rtol=1e-6)  # logged in float32
    trainer.save_model()
    assert_same_weights(load_file(tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_ten_lines(kind, config, tiny_llama, cache, tmp_path):
    args = arguments(config, tmp_path, num_train_epochs=2, max_steps=-1, save_strategy="epoch")
    trainer = kind(student(tiny_llama), args, cache=cache, objectives=["forward_kl"])
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 14
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


PAGE = ROOT / "runbooks" / "81-trainers.md"


def test_the_page_runs(tiny_llama, cache, held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"cache": cache, "held_out": held, "student": str(tiny_llama)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert len(blocks[0].splitlines()) <= 10
    assert (tmp_path / "runs" / "sft" / "model.safetensors").is_file()


RANK = """
import sys
import torch
from datasets import Dataset
from stillroom.hf import CachedTrainer
from tests import ranks
from tests.in_float64 import norms_in_float64
from tests.integration import test_doors_trainers as here

llama, cache, out, fsdp = sys.argv[1:]
sharded = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
more = {"fsdp": "full_shard", "fsdp_config": sharded} if fsdp == "fsdp" else {}
more |= {"save_strategy": "steps", "save_steps": 2} if more else {}
args = here.arguments(here.TrainingArguments, out, gradient_accumulation_steps=1, **more)
with norms_in_float64():
    trainer = CachedTrainer(
        here.student(llama, torch.float64), args, cache=cache, objectives=here.HIDDEN
        if fsdp == "hidden" else here.LINES, train_dataset=here.order_of(cache),
        eval_cache={"held": cache},
    )
    trainer.train()
    measured = trainer.evaluate()
    again = []
    if more:
        resumed = CachedTrainer(here.student(llama, torch.float64), args, cache=cache,
            objectives=here.LINES, train_dataset=here.order_of(cache))
        resumed.train(resume_from_checkpoint=f"{out}/checkpoint-2")
        again = here.logged(resumed)[-2:]
trainer.save_model()
if trainer.is_world_process_zero():
    import json, pathlib
    told = {"losses": here.logged(trainer), "held": measured["eval_held_loss"], "again": again}
    pathlib.Path(out, "told.json").write_text(json.dumps(told))
ranks.leave()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one(kind, ours, tiny_llama, cache, tmp_path):
    losses, weights = ours
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, str(script), str(tiny_llama), cache, str(tmp_path), kind],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    np.testing.assert_allclose(told["losses"], losses, rtol=1e-6)
    assert told["again"] == (told["losses"][-2:] if kind == "fsdp" else [])
    assert_same_weights(load_file(tmp_path / "model.safetensors"), weights)
    alone = evaluated(tiny_llama, cache, tmp_path / "model.safetensors", tmp_path / "alone")
    np.testing.assert_allclose(told["held"], alone, rtol=ROUNDING)


def evaluated(directory, cache, weights, out) -> float:
    """The loss on all of a cache, of given weights, by one rank."""
    with norms_in_float64():
        model = student(directory, torch.float64)
        model.load_state_dict(load_file(weights), strict=False)
        trainer = CachedTrainer(
            model,
            arguments(TrainingArguments, out, per_device_eval_batch_size=5),
            cache=cache,
            objectives=LINES,
            eval_cache=cache,
        )
        return trainer.evaluate()["eval_loss"]


def test_a_held_out_cache_is_measured_by_rows_and_not_by_batches(tiny_llama, cache, held, tmp_path):
    found = []
    with norms_in_float64():
        for size, packed in [(1, False), (2, True), (7, True)]:
            args = arguments(TrainingArguments, tmp_path, per_device_eval_batch_size=size)
            trainer = CachedTrainer(
                student(tiny_llama, torch.float64),
                args,
                cache=cache,
                objectives=HIDDEN,
                eval_cache=held,
            )
            trainer.data.packed = trainer.distiller.packed = packed
            torch.manual_seed(0)
            for one in trainer.distiller.projectors.double().parameters():
                torch.nn.init.normal_(one, std=0.1)
            found.append(trainer.evaluate())
    labels = ["eval_loss", "eval_1.forward_kl", "eval_2.reverse_kl", "eval_3.hidden"]
    for one in found[1:]:
        for label in labels:
            np.testing.assert_allclose(one[label], found[0][label], rtol=1e-10)
    whole = found[0]
    parts = whole["eval_1.forward_kl"] + whole["eval_2.reverse_kl"] + whole["eval_3.hidden"]
    np.testing.assert_allclose(whole["eval_loss"], parts, rtol=ROUNDING)


def test_a_text_that_is_trained_on_is_measured_with_a_warning(tiny_llama, cache, tmp_path):
    """Such as one that watches for over-fitting: a program may ask for it."""
    args = arguments(TrainingArguments, tmp_path)
    sets = {"eval_cache": {"seen": cache}, "cache": cache, "objectives": LINES}
    with pytest.warns(UserWarning, match="'seen': 40 of 40 examples are trained on too"):
        CachedTrainer(student(tiny_llama), args, **sets)


def test_the_best_checkpoint_by_a_held_out_cache_is_loaded(tiny_llama, cache, held, tmp_path):
    args = arguments(
        SFTConfig,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer = CachedSFTTrainer(
        student(tiny_llama), args, cache=cache, objectives=HIDDEN, eval_cache=held
    )
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_loss"))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_a_resumed_run_goes_on_to_the_same_bits(kind, config, tiny_llama, cache, tmp_path):
    def run(directory, steps, resume=None):
        args = arguments(config, tmp_path / directory, max_steps=STEPS, save_strategy="steps")
        args.save_steps = 2
        trainer = kind(student(tiny_llama), args, cache=cache, objectives=HIDDEN)
        trainer.train(resume_from_checkpoint=resume)
        return load_file(tmp_path / directory / "checkpoint-4" / "model.safetensors"), trainer

    whole, before = run("whole", STEPS)
    assert not [name for name in whole if "projector" in name]
    assert (tmp_path / "whole" / "checkpoint-2" / "projectors.safetensors").is_file()
    again, after = run("again", STEPS, str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())
    assert logged(after)[-2:] == logged(before)[-2:]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "checkpoint-4")
    assert plain.config.num_hidden_layers == 3


def test_adapters_are_what_is_trained(tiny_llama, cache, tmp_path):
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules="all-linear")
    args = arguments(SFTConfig, tmp_path, learning_rate=1e-2)
    trainer = CachedSFTTrainer(
        student(tiny_llama), args, cache=cache, objectives=HIDDEN, peft_config=adapters
    )
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "base_layer" in n}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    assert any(p.abs().sum() > 0 for n, p in now.items() if "lora_B" in n)
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)


def test_bf16_is_autocast(tiny_llama, cache, tmp_path):
    found = []
    for bf16 in (False, True):
        args = arguments(SFTConfig, tmp_path, max_steps=1, bf16=bf16)
        trainer = CachedSFTTrainer(student(tiny_llama), args, cache=cache, objectives=LINES)
        trainer.train()
        found += logged(trainer)
    assert found[0] != found[1]
    np.testing.assert_allclose(found[1], found[0], rtol=0.03)  # 8 bits of mantissa, some layers
