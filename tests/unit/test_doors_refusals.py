"""What trainers of a cache refuse before the first step, and what they say to do."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig

from stillroom.cache_schemas.errors import StillroomError
from stillroom.hf import (
    CachedCollator,
    CachedDistillationMixin,
    CachedSFTTrainer,
    CachedTrainer,
    dataset_of,
)
from stillroom.pipeline.doors import settings
from stillroom.pipeline.doors.cached import CachedDataset
from stillroom.pipeline.doors.redirection import through
from tests import memory_cache, tiny_models

KINDS = {CachedTrainer: TrainingArguments, CachedSFTTrainer: SFTConfig}


@pytest.fixture(scope="module")
def cache(tiny_llama, tmp_path_factory):
    made = memory_cache.captured(tiny_llama, memory_cache.examples(12))
    return str(made.write(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def made(kind, model, cache, tmp_path, arguments=(), **more):
    usual = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    return kind(model, KINDS[kind](**usual | dict(arguments)), cache=cache, **more)


ARGUMENTS = [
    (CachedTrainer, {"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1"),
    (CachedTrainer, {"torch_compile": True}, "torch_compile = True.*Compile the blocks"),
    (CachedSFTTrainer, {"packing": True}, "packing = True.*the collator packs"),
    (CachedSFTTrainer, {"padding_free": True, "max_length": None}, "padding_free = True"),
    (CachedSFTTrainer, {"loss_type": "dft"}, "loss_type = 'dft'"),
    (CachedSFTTrainer, {"max_length": 8}, "max_length = 8.*an example of .* tokens.*None"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), ARGUMENTS)
def test_settings_that_would_not_be_followed(kind, arguments, message, model, cache, tmp_path):
    with pytest.raises(StillroomError, match=message):
        made(kind, model, cache, tmp_path, arguments)


@pytest.mark.parametrize("name", sorted(settings.OURS))
def test_arguments_that_a_cache_leaves_no_room_for(name, model, cache, tmp_path):
    with pytest.raises(StillroomError, match=f"{name} beside a cache"):
        made(CachedTrainer, model, cache, tmp_path, **{name: object()})


def test_another_tokenizer(cache, tmp_path):
    other = tiny_models.save_llama(tmp_path / "other", vocab_size=700)
    with pytest.raises(
        StillroomError, match=r"tokenizer .* is .*; expected .* as in cache 'cache'"
    ):
        made(CachedTrainer, AutoModelForCausalLM.from_pretrained(other), cache, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(other)
    student = AutoModelForCausalLM.from_pretrained(other)
    with pytest.raises(StillroomError, match=r"tokenizer .* is "):
        made(CachedSFTTrainer, student, cache, tmp_path, processing_class=tokenizer)


def test_a_tokenizer_that_is_read_as_another_class_is_given(cache, tiny_llama, tmp_path):
    """AutoTokenizer goes by the model's type: Qwen2's class reads the teacher's files otherwise."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 768}
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads)).save_pretrained(tmp_path / "s")
    teachers = AutoTokenizer.from_pretrained(tiny_llama)
    teachers.save_pretrained(tmp_path / "s")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    for kind in KINDS:
        with pytest.raises(StillroomError, match="Give processing_class = the teacher's tokenizer"):
            made(kind, student, cache, tmp_path)
        made(kind, student, cache, tmp_path, processing_class=teachers)


def rows(cache, order=None, tokens=True, **more) -> Dataset:
    data = CachedDataset(cache)
    numbers = range(len(data)) if order is None else order
    ids = [data[number][""].example.token_ids for number in numbers]
    return Dataset.from_dict(({"input_ids": ids} if tokens else {}) | more)


def test_a_data_set_that_names_no_records(model, cache, tmp_path):
    with pytest.raises(StillroomError, match=r"no column 'example'.*dataset_of"):
        made(CachedTrainer, model, cache, tmp_path, train_dataset=rows(cache))


def test_a_data_set_in_another_order(model, cache, tmp_path):
    shuffled = rows(cache, np.random.default_rng(0).permutation(12), example=list(range(12)))
    with pytest.raises(StillroomError, match="row 0: its input_ids are not those of record 0"):
        made(CachedTrainer, model, cache, tmp_path, train_dataset=shuffled)


@pytest.mark.parametrize("more", [{}, {"text": ["hello"] * 12}])
def test_numbers_that_stand_beside_nothing_of_the_cache(more, model, cache, tmp_path):
    """Whoever filters texts and numbers the rest would train on other rows."""
    bare = rows(cache, tokens=False, example=list(range(12)), **more)
    message = r"row 0: its number 0 stands beside nothing of the cache.*dataset_of"
    with pytest.raises(StillroomError, match=message):
        made(CachedTrainer, model, cache, tmp_path, train_dataset=bare)
    with pytest.raises(StillroomError, match="a row: its number 3 stands beside nothing"):
        CachedCollator(CachedDataset(cache))([{"example": 3}])
    right = dataset_of(CachedDataset(cache)).filter(lambda row: row["length"] > 8)  # as it says
    assert len(made(CachedTrainer, model, cache, tmp_path, train_dataset=right).train_dataset)


def test_numbers_beyond_the_cache(model, cache, tmp_path):
    beyond = rows(cache, [3, 3], example=[3, 12])
    with pytest.raises(StillroomError, match="example = 12; expected 0 to 11"):
        made(CachedTrainer, model, cache, tmp_path, train_dataset=beyond)


def test_rows_that_were_cut_or_lost_their_number_are_refused_when_read(cache):
    collate = CachedCollator(CachedDataset(cache))
    whole = CachedDataset(cache)[3][""].example.token_ids
    assert collate([{"example": 3, "input_ids": whole}])["distill"].batch.num_tokens == len(whole)
    with pytest.raises(StillroomError, match=r"not those of record 3 \(4 and \d+ tokens\)"):
        collate([{"example": 3, "input_ids": whole[:4]}])
    with pytest.raises(StillroomError, match=r"its column .example..*remove_unused_columns"):
        collate([{"input_ids": whole}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_drops_columns_keeps_ours(kind, model, cache, tmp_path):
    data = rows(cache, example=list(range(12)), text=["words"] * 12)
    trainer = made(kind, model, cache, tmp_path, train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["distill"].batch.num_tokens > 0


def test_data_sets_whose_rows_have_no_numbers(model, cache, tmp_path):
    for given in (rows(cache, example=list(range(12))).to_iterable_dataset(), CachedDataset(cache)):
        with pytest.raises(
            StillroomError, match=r"the data set is a .*expected a datasets.Dataset"
        ):
            made(CachedTrainer, model, cache, tmp_path, train_dataset=given)
    with pytest.raises(StillroomError, match="the data set is empty"):
        made(
            CachedTrainer, model, cache, tmp_path, train_dataset=Dataset.from_dict({"example": []})
        )


def refused(host, message, model, cache, tmp_path):
    """A trainer mixed with ours, which does something to the data set or the collator."""
    mixes = issubclass(host, CachedDistillationMixin)
    kind = host if mixes else type("Mine", (CachedDistillationMixin, host), {})
    with pytest.raises(StillroomError, match=message):
        kind(model, TrainingArguments(str(tmp_path), report_to="none"), cache=cache)


def test_a_trainer_that_drops_the_column(model, cache, tmp_path):
    class Drops(Trainer):
        def __init__(self, *given, train_dataset, **more):
            kept = train_dataset.remove_columns("example")
            super().__init__(*given, train_dataset=kept, **more)

    class Forgets(CachedTrainer):
        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["input_ids"]

    message = r"no column 'example'.*remove_unused_columns = False"
    refused(Drops, message, model, cache, tmp_path)
    refused(Forgets, r"would drop the column 'example'.*= False", model, cache, tmp_path)


def test_a_trainer_with_a_collator_of_its_own(model, cache, tmp_path):
    class Collates(Trainer):
        def __init__(self, *given, data_collator, **more):
            super().__init__(*given, data_collator=default_data_collator, **more)

    refused(Collates, "took a function for its collator", model, cache, tmp_path)


def test_versions_before_the_ones_that_were_tried(monkeypatch, model, cache, tmp_path):
    monkeypatch.setattr(settings, "version", lambda name: {"trl": "1.9.1"}.get(name, "5.19.0"))
    made(CachedTrainer, model, cache, tmp_path)
    with pytest.raises(StillroomError, match=r"trl 1.9.1; expected trl 1.16 or later"):
        made(CachedSFTTrainer, model, cache, tmp_path)


def test_a_head_that_is_sharded_apart():
    class Part:
        def full_tensor(self): ...

    with pytest.raises(StillroomError, match="TRANSFORMER_BASED_WRAP"):
        settings.check_whole(Part())


def test_a_teachers_head_that_nobody_gives(model, tiny_llama, tmp_path):
    made_of = memory_cache.captured(tiny_llama, memory_cache.examples(4), hidden_layers=("final",))
    held = str(made_of.write(tmp_path / "cache"))
    line = {"name": "full_vocabulary"}
    with pytest.raises(StillroomError, match=r"reads the teacher's head.*Give teacher ="):
        made(CachedTrainer, model, held, tmp_path, objectives=[line])


def test_a_version_that_hands_over_less(monkeypatch, model, cache, tmp_path):
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs: None)
    with pytest.raises(StillroomError, match=r"no compute_loss\(..., num_items_in_batch\)"):
        made(CachedTrainer, model, cache, tmp_path)


def test_a_trainer_that_knows_no_word_for_a_whole_loss(monkeypatch, model, cache, tmp_path):
    """transformers before 5.19 leaves alone only what a function for the loss has given."""
    assert made(CachedTrainer, model, cache, tmp_path).compute_loss_func is None
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    assert made(CachedTrainer, model, cache, tmp_path).compute_loss_func is not None


def test_a_trainer_that_divides_again(monkeypatch, model, cache, tmp_path):
    class Divides(CachedTrainer):
        loss_is_scaled_for_ga = False

    KINDS[Divides] = TrainingArguments
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = made(Divides, model, cache, tmp_path, arguments)
    del KINDS[Divides]
    with pytest.raises(StillroomError, match=r"the trainer made .* of a loss of"):
        trainer.train()


def test_objectives_of_another_checkpoint(model, cache, tmp_path):
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made(CachedTrainer, model, cache, tmp_path, arguments).train()
    other = made(CachedTrainer, model, cache, tmp_path, arguments, objectives=["reverse_kl"])
    with pytest.raises(StillroomError, match=r"objectives\[1\].name = 'forward_kl'; expected 'rev"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "stillroom.json").unlink()
    with pytest.raises(StillroomError, match="was not trained from a cache"):
        other.train(resume_from_checkpoint=True)


def test_a_loss_that_is_not_finite_names_its_examples(tiny_llama, cache, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trainer = made(CachedTrainer, student, cache, tmp_path, {"max_steps": 1})
    nn.init.constant_(student.model.norm.weight, float("nan"))
    with pytest.raises(StillroomError, match=r"examples [0-9a-f]{32}.*the loss is not finite"):
        trainer.train()


def test_predict_and_other_evaluation_sets(model, cache, tmp_path):
    trainer = made(CachedTrainer, model, cache, tmp_path)
    with pytest.raises(StillroomError, match=r"predict\(\) asks for logits"):
        trainer.predict(Dataset.from_dict({"example": [0]}))
    with pytest.raises(StillroomError, match=r"only held-out caches are measured.*eval_cache"):
        trainer.evaluate(Dataset.from_dict({"example": [0]}))


def test_work_is_done_inside_the_wrapper_and_leaves_nothing_behind():
    inner = nn.Linear(2, 2)
    wrapper = nn.Sequential(inner)
    seen = []
    inner.register_forward_pre_hook(lambda *_: seen.append("hook"))
    found = through(wrapper, inner, lambda x: inner(x) + 1, torch.zeros(1, 2))
    torch.testing.assert_close(found, inner.bias[None] + 1)
    assert seen == ["hook", "hook"]
    assert "forward" not in vars(inner)
    with pytest.raises(ZeroDivisionError):
        through(wrapper, inner, lambda x: 1 / 0, torch.zeros(1, 2))
    assert "forward" not in vars(inner)
