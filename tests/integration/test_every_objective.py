"""Each objective trains a student from a cache alone; wrong records do not help; options work."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch, StudentError
from stillroom.pipeline.config import parse
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.objectives.registry import OBJECTIVES
from stillroom.pipeline.record import Example, content_id
from stillroom.pipeline.student.model import load
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models
from tests.in_float64 import assert_same_losses, in_float64
from tests.integration.test_training import losses, make_run, weights_digest

LENGTH = 24


@pytest.fixture(scope="module")
def teacher(deep_llama):
    return deep_llama


def written_by(model_directory, count, seed) -> list[Example]:
    """Texts sampled from the teacher itself, so that cross-entropy on them teaches something."""
    model = load(model_directory)
    torch.manual_seed(seed)
    start = torch.randint(4, 768, (count, 1))
    tokens = model.generate(
        start, max_new_tokens=LENGTH - 1, do_sample=True, top_k=0, eos_token_id=-1
    )
    found = []
    for number, row in enumerate(tokens.numpy().astype(np.int32)):
        mask = np.arange(LENGTH) > 0
        found.append(Example(content_id(row, mask), f"document {number}", "rollout", row, mask))
    return found


@pytest.fixture(scope="module")
def texts(teacher):
    return written_by(teacher, 48, seed=0)


@pytest.fixture(scope="module")
def cache(teacher, texts):
    return memory_cache.captured(
        teacher,
        texts[:40],
        k=16,
        tail_draws=8,
        temperatures=(1.0, 2.0),
        moments=True,
        hidden_layers=(3, "final"),
    )


LINES = {
    **{name: {"name": name} for name in OBJECTIVES if OBJECTIVES[name].unit == "row"},
    "sampled": {"name": "forward_kl", "options": {"tail": "sampled"}},
    "truncated": {"name": "forward_kl", "options": {"tail": "truncate"}},
    "renormalised": {"name": "forward_kl", "options": {"tail": "renormalise"}},
    "warm": {"name": "jsd", "options": {"temperature": 2.0, "beta": 0.3}},
    "z-scored": {"name": "forward_kl", "options": {"normalise_logits": True}},
    "unshifted": {"name": "forward_kl", "options": {"legacy_unshifted": True}},
    "every row": {"name": "reverse_kl", "mask": "all", "reduction": "sample"},
    "hidden": {"name": "hidden", "mask": "all", "options": {"distance": "cosine"}},
    "layer map": {
        "name": "hidden",
        "options": {"pairs": [[3, 1], ["final", "final"]], "projector": "linear"},
    },
    "affinity": {"name": "affinity", "options": {"rows": "all", "columns": "answer"}},
    "joint": {"name": "llavadi_joint", "weight": 0.2},
    "minillm": {"name": "minillm"},
    "by entropy": {"name": "forward_kl", "curriculum": "low_entropy_first"},
    "by gap": {"name": "forward_kl", "curriculum": "large_gap_first"},
    "falling": {"name": "forward_kl", "weight": 1.0, "final_weight": 0.0},
    "by source": {"name": "forward_kl", "source_weights": {"rollout": 0.5}},
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_it_trains_with_the_teachers_files_deleted(tmp_path, teacher, cache, line):
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    run = make_run(tmp_path / "run", moved, objective=[line], steps=2, checkpoint_every=2)
    if line["name"] != "full_vocabulary":
        from stillroom.pipeline.student.model import initial_student

        initial_student(run.student, run.teacher, run.path("student-initial"))
        shutil.rmtree(moved)
    result = train(run, caches={"": cache})
    assert np.isfinite(losses(run)).all()
    before = AutoModelForCausalLM.from_pretrained(result.initial).state_dict()
    after = AutoModelForCausalLM.from_pretrained(result.student).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_teachers_head_is_kept_for_later(tmp_path, teacher, cache):
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    line = [{"name": "full_vocabulary", "options": {"temperature": 3.0}}]
    train(make_run(tmp_path / "run", moved, objective=line, steps=1), caches={"": cache})
    shutil.rmtree(moved)
    (tmp_path / "run" / "train.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(make_run(tmp_path / "run", moved, objective=line, steps=2), caches={"": cache})


def test_the_effective_sample_size_is_logged(tmp_path, teacher, cache):
    run = make_run(tmp_path, teacher, objective=[{"name": "minillm"}], steps=1)
    seen = []
    train(run, caches={"": cache}, on_progress=seen.append)
    (line,) = read_metrics(run.path())
    assert 0 < line["report/2.policy_gradient/effective_sample_share"] <= 1
    assert seen[0].reports["2.policy_gradient/effective_sample_share"] <= 1


def permuted(cache):
    """Every example keeps its text and gets the next one's answers."""
    records = cache.records
    moved = [
        replace(own, signals=other.signals)
        for own, other in zip(records, records[1:] + records[:1])
    ]
    return replace(cache, records=tuple(moved))


MIXED = [{"name": "forward_kl", "options": {"ce_weight": 1.0}}]
ALONE = [{"name": "cross_entropy"}]


def scores_of_arms(directory, teacher, cache, texts, distilled=MIXED, **student):
    """Held-out scores of a student trained with right answers, with permuted ones and with none."""
    arms = {
        "right": (cache, distilled),
        "permuted": (permuted(cache), distilled),
        "none": (cache, ALONE),
    }
    students = {}
    for label, (own, objective) in arms.items():
        changes = {"steps": 30, "checkpoint_every": 30, "batch_tokens": 240}
        run = make_run(directory / label, teacher, objective=objective, **changes)
        run = parse(run.model_dump(mode="json") | {"student": student}, "test")
        students[label] = train(run, caches={"": own}).student
    return measure(str(teacher), students | {"before": run.path("student-initial")}, texts)


@pytest.fixture(scope="module")
def more(teacher):
    texts = written_by(teacher, 220, seed=1)
    return memory_cache.captured(teacher, texts[:200]), texts[200:]


def test_right_answers_beat_permuted_ones_and_none(tmp_path, teacher, more):
    scores = scores_of_arms(tmp_path, teacher, *more, keep_every=3)
    assert scores["right"].kl < min(scores["permuted"].kl, scores["none"].kl)
    assert scores["right"].kl < scores["before"].kl
    assert scores["teacher"].kl == pytest.approx(0, abs=1e-6)
    assert scores["teacher"].top1 == 1


def test_permuted_answers_do_not_beat_none(tmp_path, teacher, more):
    """The student starts as the teacher itself, so all that answers can do is to keep it there.

    From a cut student permuted answers may beat none: they still tell it how common each token is.
    """
    scores = scores_of_arms(tmp_path, teacher, *more, [{"name": "forward_kl"}], keep_every=1)
    assert scores["right"].kl < scores["none"].kl < scores["permuted"].kl


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 4}},
        {"ema": 0.9},
        {"activation_checkpointing": True},
        {"schedule": "wsd", "decay": 0.5},
        {"precision": "bfloat16"},
        {"workers": 2, "shuffle_shards": 2},
        {"sequence_length": LENGTH * 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_of_training_resumes_to_the_same_bits(tmp_path, teacher, cache, changes):
    from stillroom.pipeline.training.trainer import Interrupted

    whole = make_run(tmp_path / "whole", teacher, steps=4, checkpoint_every=2, **changes)
    train(whole, caches={"": cache})
    parts = make_run(tmp_path / "parts", teacher, steps=4, checkpoint_every=2, **changes)
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        train(parts, caches={"": cache}, stop=lambda: next(asked) >= 3)
    train(parts, caches={"": cache})
    assert losses(parts) == losses(whole)
    assert weights_digest(parts) == weights_digest(whole)


def test_checkpointed_activations_change_nothing(tmp_path, teacher, cache):
    runs = [
        make_run(tmp_path / str(flag), teacher, steps=2, activation_checkpointing=flag)
        for flag in (False, True)
    ]
    with in_float64():
        for run in runs:
            train(run, caches={"": cache})
    assert_same_losses(losses(runs[0]), losses(runs[1]))


def test_measured_on_a_heldout_cache_while_training(tmp_path, teacher, cache, texts):
    heldout = memory_cache.captured(
        teacher,
        texts[40:],
        tail_draws=8,
        temperatures=(1.0, 2.0),
        moments=True,
        hidden_layers=(3, "final"),
    ).write(tmp_path / "heldout")
    run = make_run(tmp_path / "run", teacher, heldout_cache=str(heldout), evaluate_every=4)
    train(run, caches={"": cache})
    lines = [line for line in read_metrics(run.path()) if "heldout/1.forward_kl" in line]
    assert [line["step"] for line in lines] == [4, 8]
    assert lines[1]["heldout/1.forward_kl"] < lines[0]["heldout/1.forward_kl"]


def test_two_teachers_at_once(tmp_path, teacher, cache, texts):
    other = tiny_models.save_llama(tmp_path / "other", num_layers=2, seed=5)
    second = memory_cache.captured(other, list(reversed(texts[:40])))
    lines = [{"name": "forward_kl", "weight": 0.5}, {"name": "forward_kl", "cache": "second"}]
    run = make_run(tmp_path / "run", teacher, objective=lines, caches={"second": "unused"})
    train(run, caches={"": cache, "second": second})
    logged = read_metrics(run.path())[-1]
    assert logged["objective/1.forward_kl"] > 0
    assert logged["objective/2.forward_kl@second"] > 0


def test_a_vocabulary_is_rebuilt_with_the_head_of_its_own_caches_teacher(
    tmp_path, teacher, cache, texts
):
    other = tiny_models.save_llama(tmp_path / "other", num_layers=3, seed=5)
    second = memory_cache.captured(other, list(reversed(texts[:40])), hidden_layers=("final",))
    caches = {"": cache, "second": second}
    lines = [{"name": "forward_kl"}, {"name": "full_vocabulary", "cache": "second"}]
    named = {"objective": lines, "caches": {"second": "unused"}}
    with pytest.raises(PlanMismatch, match="is another teacher"):  # [teacher] is the first's
        train(make_run(tmp_path / "run", teacher, **named), caches=caches)
    run = make_run(tmp_path / "again", other, steps=1, **named)
    train(run, caches=caches)
    kept = load_file(run.path("teacher-head.safetensors"))["head"]
    assert torch.equal(kept, load(other).get_output_embeddings().weight)
    named["objective"] = [*lines, {"name": "full_vocabulary"}]
    with pytest.raises(StudentError, match="read the heads of different caches"):
        train(make_run(tmp_path / "both", teacher, **named), caches=caches)


def test_compiled_blocks_train_to_the_same_losses(tmp_path, teacher, cache):
    plain = make_run(tmp_path / "plain", teacher, steps=2)
    compiled = make_run(tmp_path / "compiled", teacher, steps=2, compile=True)
    with in_float64():
        for run in (plain, compiled):
            train(run, caches={"": cache})
    assert_same_losses(losses(compiled), losses(plain))


def test_a_second_cache_must_hold_the_same_examples(tmp_path, teacher, cache, texts):
    second = memory_cache.captured(teacher, texts[:39])
    run = make_run(tmp_path / "run", teacher, caches={"second": "unused"})
    with pytest.raises(StudentError, match="cache 'second' lacks 1 of 40 examples"):
        train(run, caches={"": cache, "second": second})


def student_run(directory, teacher, **student):
    document = make_run(directory, teacher, steps=2, checkpoint_every=2).model_dump(mode="json")
    return parse(document | {"student": student}, "test")


def test_a_student_pruned_in_width_is_a_plain_smaller_model(tmp_path, teacher, cache):
    run = student_run(tmp_path, teacher, init="prune_width", keep_intermediate=0.5, keep_heads=0.5)
    result = train(run, caches={"": cache})
    model = AutoModelForCausalLM.from_pretrained(result.student)
    assert model.config.intermediate_size == 64
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert model.config.num_hidden_layers == 6


def test_width_pruning_that_keeps_everything_changes_nothing(tmp_path, teacher):
    from stillroom.pipeline.student.model import initial_student

    run = student_run(tmp_path, teacher, init="prune_width", keep_intermediate=1, keep_heads=1)
    made = initial_student(run.student, run.teacher, tmp_path / "same")
    ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(load(made)(ids).logits, load(teacher)(ids).logits)


def test_a_fresh_student_from_a_config(tmp_path, teacher, cache):
    small = tiny_models.save_llama(tmp_path / "small", num_layers=1, hidden_size=32)
    run = student_run(tmp_path / "run", teacher, init="config", model=str(small))
    model = AutoModelForCausalLM.from_pretrained(train(run, caches={"": cache}).student)
    assert model.config.hidden_size == 32


def test_any_model_of_the_same_tokenizer_with_a_padded_head(tmp_path, teacher, cache):
    other = tiny_models.save_qwen3(tmp_path / "qwen")
    run = student_run(tmp_path / "run", teacher, init="model", model=str(other))
    model = AutoModelForCausalLM.from_pretrained(train(run, caches={"": cache}).student)
    assert model.config.vocab_size == 800


def test_a_model_of_another_tokenizer_is_refused(tmp_path, teacher):
    from stillroom.pipeline.student.model import initial_student

    other = tiny_models.save_llama(tmp_path / "other", vocab_size=700)
    run = student_run(tmp_path / "run", teacher, init="model", model=str(other))
    with pytest.raises(StudentError, match=r"tokenizer .*prune_layers"):
        initial_student(run.student, run.teacher, tmp_path / "made")


def test_blocks_that_are_not_there_are_refused(tmp_path, teacher, cache):
    run = student_run(tmp_path, teacher, keep_layers=[0, 9])
    with pytest.raises(StudentError, match="block 9 cannot be kept; expected blocks 0 to 5"):
        train(run, caches={"": cache})
    lines = [{"name": "hidden", "options": {"pairs": [[3, 7]]}}]
    with pytest.raises(StudentError, match="the student has no block 7; expected 1 to 2"):
        train(make_run(tmp_path / "b", teacher, objective=lines), caches={"": cache})
    lines = [{"name": "hidden", "options": {"pairs": [[2, 1]]}}]
    with pytest.raises(StudentError, match=r"needs signal 'hidden.2'.*hidden.3, hidden.final"):
        train(make_run(tmp_path / "c", teacher, objective=lines), caches={"": cache})


def test_fsdp_in_one_process_is_refused(tmp_path, teacher, cache):
    run = make_run(tmp_path, teacher, parallel="fsdp")
    with pytest.raises(ConfigError, match="torchrun"):
        train(run, caches={"": cache})


def test_draws_alone_train_a_student_and_serve_nothing_else(tmp_path, teacher, texts):
    drawn = memory_cache.captured(teacher, texts[:8], k=0, tail_draws=16)
    line = {"name": "forward_kl"}
    run = make_run(tmp_path / "run", teacher, objective=[line], steps=2, checkpoint_every=2)
    train(run, caches={"": drawn})
    assert np.isfinite(losses(run)).all()
    exact = {"name": "forward_kl", "options": {"tail": "bucket"}}
    for line in (exact, {"name": "teacher_argmax"}):
        refused = make_run(tmp_path / line["name"], teacher, objective=[line])
        with pytest.raises(StudentError, match=r"draws alone \(k = 0\).*tail = 'sampled'"):
            train(refused, caches={"": drawn})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reverse_kl", {}, "'reverse_kl' with tail = 'sampled'; expected 'forward_kl'"),
        ("forward_kl", {"temperature": 2.0}, "draws are of p at temperature 1"),
        ("forward_kl", {"normalise_logits": True}, "draws are of p at temperature 1"),
    ],
)
def test_draws_serve_one_divergence_at_one_temperature(
    tmp_path, teacher, cache, name, options, message
):
    line = {"name": name, "options": options | {"tail": "sampled"}}
    with pytest.raises(ConfigError, match=message):
        train(make_run(tmp_path, teacher, objective=[line]), caches={"": cache})
