"""Mistakes of everyday training scripts: refused before the first step, or heard as they are."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Value, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig

from stillroom.cache_schemas.errors import StillroomError
from stillroom.hf import CachedDistillationMixin, CachedSFTTrainer, CachedTrainer, dataset_of
from stillroom.pipeline.doors import settings
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.foreign import Origin, import_answers
from stillroom.pipeline.doors.foreign_answer import ForeignAnswer
from stillroom.pipeline.doors.loss import distillation_loss
from tests import memory_cache, tiny_models

MIXED = [{"name": "forward_kl", "options": {"ce_weight": 0.5}}]


@pytest.fixture(scope="module")
def cache(deep_llama, tmp_path_factory):
    made = memory_cache.captured(deep_llama, memory_cache.examples(12))
    return str(made.write(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="module")
def other(deep_llama, tmp_path_factory):
    made = memory_cache.captured(deep_llama, memory_cache.examples(8, seed=3))
    return str(made.write(tmp_path_factory.mktemp("other") / "cache"))


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


USUAL = {
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def made(model, cache, tmp_path, arguments=(), kind=CachedTrainer, **more):
    config = SFTConfig if issubclass(kind, CachedSFTTrainer) else TrainingArguments
    return kind(model, config(str(tmp_path), **USUAL | dict(arguments)), cache=cache, **more)


def lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


# ---- adapters on the head ----


def test_an_adapter_on_the_head_is_trained_and_heard(model, cache, tiny_llama, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    trainer = made(adapted, cache, tmp_path, eval_cache=cache)
    trainer.train()
    named = dict(adapted.named_parameters())
    assert named["base_model.model.lm_head.lora_B.default.weight"].abs().sum() > 0
    trainer.save_model()
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    before = trainer.evaluate()["eval_loss"]
    after = made(again, cache, tmp_path / "again", eval_cache=cache).evaluate()["eval_loss"]
    assert before == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_heads_that_are_no_matrix(more, model, cache, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], **more))
    before = {name: one.clone() for name, one in adapted.named_parameters()}
    with pytest.raises(StillroomError, match=r"no matrix that a loss can read.*target_modules"):
        made(adapted, cache, tmp_path)
    batch = CachedDataset(cache).collate([CachedDataset(cache)[0]])
    hidden = model.model(**batch.inputs).last_hidden_state
    with pytest.raises(StillroomError, match="no matrix that a loss can read"):
        distillation_loss(hidden, adapted, batch)
    assert all(torch.equal(one, before[name]) for name, one in adapted.named_parameters())


def test_a_loop_of_ones_own_may_look_at_the_head_between_its_passes(model, cache):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    data = CachedDataset(cache)
    batch = data.collate([data[0], data[1]])
    hidden = adapted.get_base_model().model(**batch.inputs).last_hidden_state
    distillation_loss(hidden, adapted, batch).backward()  # the weights of the graph are untouched
    named = dict(adapted.named_parameters())
    assert named["base_model.model.lm_head.lora_B.default.weight"].grad.abs().sum() > 0


# ---- what is logged ----


def test_what_is_logged_of_objectives_is_of_the_steps_of_the_loss(model, cache, other, tmp_path):
    """Whatever was begun before: another train(), or a batch that memory had no room for."""

    class RunsOut(CachedTrainer):
        tried = 0

        def compute_loss(self, *given, **more):
            self.tried += 1
            if self.tried == 1:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(*given, **more)

    many = {"logging_steps": 2, "auto_find_batch_size": True, "per_device_train_batch_size": 4}
    smaller = made(model, cache, tmp_path, many, RunsOut)
    smaller.train()
    twice = made(model, cache, tmp_path, {"logging_steps": 500})
    twice.train()
    twice.args.logging_steps = 1
    twice.train()
    for line in [*lines(smaller), *lines(twice)]:
        assert line["objective/1.forward_kl"] == pytest.approx(line["loss"], rel=1e-6)


def test_a_measurement_leaves_the_reports_of_training_alone(tiny_llama, cache, other, tmp_path):
    found = []
    for strategy in ("no", "steps"):
        student = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        arguments = {"max_steps": 4, "logging_steps": 4, "eval_strategy": strategy, "eval_steps": 3}
        more = {"eval_cache": other, "objectives": MIXED}
        trainer = made(student, cache, tmp_path, arguments, **more)
        trainer.train()
        found.append({k: v for k, v in lines(trainer)[0].items() if k.startswith("report/")})
    assert found[0]
    assert found[0] == found[1]


# ---- losses of others ----


def test_a_loss_behind_ours_that_would_never_be_asked(model, cache, tmp_path):
    class Adds(Trainer):
        def compute_loss(self, *given, **more):
            return super().compute_loss(*given, **more) + 100

    class Mine(CachedDistillationMixin, Adds):
        pass

    class Known(CachedDistillationMixin, Adds):
        unasked = ("compute_loss",)

    with pytest.raises(StillroomError, match=r"Adds has a compute_loss of its own.*unasked = "):
        made(model, cache, tmp_path, kind=Mine)
    made(model, cache, tmp_path, kind=Known)


def test_a_loss_before_ours_that_adds_to_it(model, cache, tmp_path):
    class Adds(CachedTrainer):
        def compute_loss(self, *given, **more):
            return super().compute_loss(*given, **more) + 1

    before = {name: one.clone() for name, one in model.named_parameters()}
    with pytest.raises(StillroomError, match=r"the trainer made .*Have compute_loss return what"):
        made(model, cache, tmp_path, kind=Adds).train()
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


# ---- data sets ----


def test_numbers_of_another_cache(model, cache, other, tmp_path):
    parts = [dataset_of(CachedDataset(one)) for one in (cache, other)]
    both = concatenate_datasets(parts)
    with pytest.raises(StillroomError, match=r"row 0: its number is of the cache .*dataset_of"):
        made(model, [cache, other], tmp_path, train_dataset=both)
    with pytest.raises(StillroomError, match=r"row 12: its number is of the cache"):
        made(model, cache, tmp_path, train_dataset=both)
    joined = dataset_of(CachedDataset([cache, other])).shuffle(seed=1).select(range(5))
    made(model, [cache, other], tmp_path, train_dataset=joined).train()


def numbered(cache, numbers) -> Dataset:
    digest = CachedDataset(cache).digest
    return Dataset.from_dict({"example": numbers, "cache_digest": [digest] * len(numbers)})


@pytest.mark.parametrize("numbers", [[0.5, 1.7], [0.0, None], ["0", "x"]])
def test_numbers_that_are_none(numbers, model, cache, tmp_path):
    with pytest.raises(StillroomError, match=r"example = .*expected a whole number"):
        made(model, cache, tmp_path, train_dataset=numbered(cache, numbers))


@pytest.mark.parametrize("name", ["labels", "completion_mask"])
def test_columns_that_say_what_to_learn(name, model, cache, tmp_path):
    records = [one[""].example for one in map(CachedDataset(cache).__getitem__, range(12))]
    ids = [one.token_ids for one in records]
    nothing = -100 if name == "labels" else 0
    right = [np.where(one.loss_mask, max(1, nothing), nothing) for one in records]
    rows = {"example": list(range(12)), "input_ids": ids}
    made(model, cache, tmp_path, train_dataset=Dataset.from_dict(rows | {name: right}))
    wrong = Dataset.from_dict(rows | {name: [np.ones_like(one) for one in ids]})
    with pytest.raises(StillroomError, match=rf"row 0: its {name} do not mark.*remove_columns"):
        made(model, cache, tmp_path, train_dataset=wrong)


def test_batches_by_length(model, cache, tmp_path):
    arguments = {"train_sampling_strategy": "group_by_length"}
    made(model, cache, tmp_path, arguments).train()
    own = numbered(cache, [3, 1, 2]).cast_column("example", Value("int32"))
    with pytest.raises(StillroomError, match=r"no column 'length'.*add_column"):
        made(model, cache, tmp_path, arguments, train_dataset=own)
    lengths = CachedDataset(cache).lengths[own["example"]]  # as the message says
    own = own.add_column("length", lengths)
    made(model, cache, tmp_path, arguments, train_dataset=own).train()


def test_a_run_goes_on_with_the_rows_that_it_was_begun_with(tiny_llama, cache, tmp_path):
    def trainer(rows, **more):
        student = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | more
        return made(student, cache, tmp_path, arguments, train_dataset=rows)

    rows = dataset_of(CachedDataset(cache))
    whole = trainer(rows)
    whole.train()
    half = str(tmp_path / "checkpoint-2")
    again = trainer(rows)
    again.train(resume_from_checkpoint=half)
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(whole)]
    shuffled = rows.shuffle(seed=3)
    with pytest.raises(StillroomError, match=r"on other rows of the cache.*ignore_data_skip"):
        trainer(shuffled).train(resume_from_checkpoint=half)
    trainer(shuffled, ignore_data_skip=True).train(resume_from_checkpoint=half)


# ---- caches ----


def test_objectives_that_would_never_meet_a_row(model, cache, tmp_path):
    line = {"name": "forward_kl", "mask": "image"}
    with pytest.raises(StillroomError, match=r"whole cache.*: objective .* gets no row at all"):
        made(model, cache, tmp_path, objectives=[line])
    with pytest.raises(StillroomError, match=r"whole cache.*: objective .* gets no row at all"):
        CachedDataset(cache, [line])
    line = {"name": "forward_kl", "source_weights": {"randon": 2.0}}
    with pytest.raises(StillroomError, match=r"names 'randon', which is no source.*'random'"):
        made(model, cache, tmp_path, objectives=[line])


def test_held_out_caches_are_held_against_the_student_too(model, cache, tmp_path):
    """A foreign teacher is but a name: its tokenizer is all that can be compared."""
    found = []
    for name, vocabulary in (("one", 768), ("two", 700)):
        home = tiny_models.save_llama(tmp_path / name, vocab_size=vocabulary)
        answers = ForeignAnswer(name, *TEXT)
        origin = Origin("x", "a teacher", str(home), vocab_size=768)
        import_answers(lambda answers=answers: iter([answers]), origin, tmp_path / f"c-{name}")
        found.append(str(tmp_path / f"c-{name}"))
    made(model, found[0], tmp_path, eval_cache=found[0])
    with pytest.raises(StillroomError, match=r"tokenizer .* as in eval_cache cache 'cache'"):
        made(model, found[0], tmp_path, eval_cache=found[1])


def test_held_out_texts_need_every_cache_that_is_read(model, cache, tmp_path):
    objectives = ["forward_kl", {"name": "forward_kl", "cache": "second"}]
    both = {"caches": {"second": cache}, "objectives": objectives}
    with pytest.raises(StillroomError, match=r"also read second of every text.*CachedDataset\("):
        made(model, cache, tmp_path, eval_cache=cache, **both)
    held = CachedDataset(cache, objectives, caches={"second": cache})
    found = made(model, cache, tmp_path, eval_cache=held, **both).evaluate()
    halves = [found["eval_1.forward_kl"], found["eval_2.forward_kl@second"]]
    assert found["eval_loss"] == pytest.approx(sum(halves))
    assert halves[0] == pytest.approx(halves[1])


TEXT = (
    np.array([5, 6, 7]),
    np.ones(3, dtype=bool),
    0,
    np.array([[6, 2], [7, 4]]),
    np.array([[-1.0, -2.0]] * 2, dtype=np.float32),
)

# ---- arguments ----

BAD = [
    ({"kernel": "foo"}, r"kernel: .*'auto', 'chunked'"),
    ({"objectives": None}, r"objectives, line 1: a line is None"),
    ({"objectives": [3]}, r"objectives, line 1: a line is 3"),
    ({"caches": "somewhere"}, "a further cache without a name"),
]


@pytest.mark.parametrize(("more", "message"), BAD)
def test_arguments_of_other_kinds(more, message, model, cache, tmp_path):
    with pytest.raises(StillroomError, match=message):
        made(model, cache, tmp_path, **more)


@pytest.mark.parametrize("given", [None, [], 3])
def test_caches_of_other_kinds(given, model, tmp_path):
    with pytest.raises(StillroomError, match="a cache is given as"):
        made(model, given, tmp_path)


def test_models_that_are_none(model, cache, tmp_path):
    for given in (None, "a name"):
        with pytest.raises(StillroomError, match="expected a loaded model"):
            made(given, cache, tmp_path)
    fresh = LlamaForCausalLM(model.config)
    fresh.config._name_or_path = ""
    with pytest.raises(StillroomError, match=r"no tokenizer to compare.*Give processing_class"):
        made(fresh, cache, tmp_path)


def test_an_evaluation_of_nothing(model, cache, tmp_path):
    with pytest.raises(StillroomError, match=r"eval_strategy = 'steps' without.*Give eval_cache"):
        made(model, cache, tmp_path, {"eval_strategy": "steps", "eval_steps": 1})


@pytest.mark.parametrize("name", ["completion_only_loss", "assistant_only_loss", "eval_packing"])
def test_settings_of_sft_that_a_cache_would_not_follow(name, model, cache, tmp_path):
    with pytest.raises(StillroomError, match=rf"{name} = True. Leave it out"):
        made(model, cache, tmp_path, {name: True}, CachedSFTTrainer)


def test_batches_that_one_rank_would_send_to_all(model, cache, tmp_path, monkeypatch):
    arguments = {"accelerator_config": {"dispatch_batches": True}}
    trainer = made(model, cache, tmp_path, arguments)  # alone it changes nothing
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(StillroomError, match="dispatch_batches with several ranks"):
        settings.check_arguments(trainer.args, {}, trainer)
