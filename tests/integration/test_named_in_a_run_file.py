"""Every name in a run file is checked before a model is loaded, and told together."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stillroom.cache_schemas.errors import (
    ConfigError,
    PlanMismatch,
    StillroomError,
    StudentError,
)
from stillroom.pipeline.config import Teacher, parse
from stillroom.pipeline.data.records import lengths_of
from stillroom.pipeline.plain_text import code_span
from stillroom.pipeline.training import setup
from stillroom.pipeline.training.said import check_teacher, teachers_of
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models
from tests.integration.test_training import losses, make_run

INITIAL, EMBEDDINGS = "student-initial", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "model", num_layers=2)


@pytest.fixture(scope="module")
def cache(teacher):
    return memory_cache.captured(teacher, memory_cache.examples(6))


def a_run(directory, teacher, student=None, **changes):
    run = make_run(directory, teacher, **{"steps": 1, "checkpoint_every": 1} | changes)
    return parse(run.model_dump(mode="json") | {"student": student or {"keep_every": 1}}, "test")


def refused(monkeypatch, run, cache, match, error=ConfigError):
    """Before anything is loaded or made."""
    with monkeypatch.context() as patch:
        for loader in ("load", "initial_student"):
            patch.setattr(setup, loader, lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(error, match=match) as caught:
            train(run, caches={"": cache})
    assert caught.value.exit_code == 2
    return caught.value


def works(run, cache):
    train(run, caches={"": cache})
    # The student may still be its teacher: then the value is 0, give or take k roundings of
    # p log p in float32.
    assert losses(run)[-1] > -1e-6


def test_a_pattern_that_fits_no_weight(monkeypatch, tmp_path, teacher, cache):
    run = a_run(tmp_path, teacher, freeze=["model.layer.0.*"])
    error = refused(monkeypatch, run, cache, r"'model.layer.0.\*' fits no weight")
    (near,) = [part for part in error.remedy.split("'") if part.startswith("model.layers.")]
    works(a_run(tmp_path / "b", teacher, freeze=[near]), cache)


@pytest.mark.parametrize("pattern", ["lm_head*", "*embed_tokens*"])
def test_a_tied_matrix_goes_by_both_of_its_names(tmp_path, cache, pattern):
    tied = tiny_models.save_llama(tmp_path / "tied", num_layers=2, tie_word_embeddings=True)
    run = a_run(tmp_path / "run", tied, freeze=[pattern])
    train(run, caches={"": memory_cache.captured(tied, memory_cache.examples(6))})
    before, after = (load_file(run.path(d, "model.safetensors")) for d in (INITIAL, "student"))
    assert sorted(name for name in before if before[name].equal(after[name])) == [EMBEDDINGS]


def test_an_attention_that_is_not_installed(tmp_path, teacher, cache):
    if find_spec("flash_attn") is not None:
        pytest.skip("it is installed")
    run = a_run(tmp_path / "a", teacher, attention="flash_attention_2")
    with pytest.raises(StudentError, match=r"Set \[train\] attention = 'auto', or install what"):
        train(run, caches={"": cache})
    works(a_run(tmp_path / "a", teacher), cache)


def test_a_config_file_that_is_not_there(monkeypatch, tmp_path, teacher, cache):
    student = {"init": "config", "model": str(tmp_path / "fersh.json")}
    refused(monkeypatch, a_run(tmp_path, teacher, student), cache, "fersh.json: no such file",
            StudentError)  # fmt: skip
    (tmp_path / "fersh.json").write_text((teacher / "config.json").read_text())
    works(a_run(tmp_path, teacher, student), cache)


@pytest.mark.parametrize("packing", ["auto", "never"])
def test_rows_that_no_microbatch_holds(monkeypatch, tmp_path, teacher, cache, packing):
    run = a_run(tmp_path, teacher, sequence_length=128, packing=packing)  # batch_tokens is 96
    refused(monkeypatch, run, cache, "Set batch_tokens to 128 or more, or sequence_length to 96")
    works(a_run(tmp_path / "b", teacher, sequence_length=128, batch_tokens=128), cache)
    works(a_run(tmp_path / "c", teacher, sequence_length=96, packing=packing), cache)


@pytest.mark.parametrize("packing", ["auto", "never"])
def test_an_example_that_no_row_holds(monkeypatch, tmp_path, teacher, cache, packing):
    longest = int(lengths_of(cache).max())
    run = a_run(tmp_path, teacher, batch_tokens=longest - 1, packing=packing)
    match = f"has {longest} tokens.*Set batch_tokens to {longest} or more"
    refused(monkeypatch, run, cache, match, StudentError)
    works(a_run(tmp_path / "b", teacher, batch_tokens=longest, packing=packing), cache)


def test_everything_frozen(monkeypatch, tmp_path, teacher, cache):
    run = a_run(tmp_path, teacher, freeze=["*"])
    error = refused(monkeypatch, run, cache, "every weight of the student is frozen")
    assert "[train.lora]" in error.remedy
    works(a_run(tmp_path / "b", teacher, freeze=["*"], lora={"rank": 2}), cache)


@pytest.mark.parametrize(
    "line", [{"mask": "image"}, {"source_weights": {"random": 0.0}}], ids=["mask", "sources"]
)
def test_an_objective_without_a_row(monkeypatch, tmp_path, teacher, cache, line):
    lines = [{"name": "forward_kl"}, {"name": "reverse_kl"} | line]
    run = a_run(tmp_path, teacher, objective=lines)
    error = refused(monkeypatch, run, cache, r"2\.reverse_kl gets no row at all", StudentError)
    assert "leave it out" in error.remedy
    works(a_run(tmp_path / "b", teacher, objective=lines[:1]), cache)


def test_a_source_that_is_not_there(monkeypatch, tmp_path, teacher, cache):
    line = {"name": "forward_kl", "source_weights": {"randum": 2.0}}
    run = a_run(tmp_path, teacher, objective=[line])
    message = "source_weights names 'randum'.*expected some of random.*Did you mean 'random'"
    refused(monkeypatch, run, cache, message)
    line["source_weights"] = {"random": 2.0}
    works(a_run(tmp_path / "b", teacher, objective=[line]), cache)


def test_a_config_that_does_not_exist(monkeypatch, tmp_path, teacher, cache):
    student = {"init": "config", "model": str(tmp_path / "nothing")}
    run = a_run(tmp_path / "a", teacher, student)
    error = refused(monkeypatch, run, cache, "no student can be made of it", StudentError)
    assert error.remedy == "Check [student] model."
    works(a_run(tmp_path / "b", teacher, {"init": "config", "model": str(teacher)}), cache)


def test_a_config_that_contradicts_itself(monkeypatch, tmp_path, teacher, cache):
    deep = tiny_models.save_qwen3(tmp_path / "deep", padded_vocab_size=768)
    facts = json.loads((deep / "config.json").read_text()) | {"num_hidden_layers": 1}
    config = tmp_path / "shallow.json"
    config.write_text(json.dumps(facts))
    student = {"init": "config", "model": str(config)}
    run = a_run(tmp_path / "a", teacher, student)
    message = r"shallow.json: .*num_hidden_layers` \(1\) must be equal to .*layer_types` \(2\)"
    error = refused(monkeypatch, run, cache, message, StudentError)
    assert error.remedy.startswith("Put that right in its config.json")
    with pytest.raises(StudentError, match=message):  # by `stillroom student`, too
        setup.initial_student(run.student, run.teacher, run.path(INITIAL))
    config.write_text(json.dumps(facts | {"layer_types": facts["layer_types"][:1]}))
    works(a_run(tmp_path / "b", teacher, student), cache)


def gpt2(directory, teacher, positions):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=768, n_positions=positions, n_embd=32, n_layer=1, n_head=2, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    for path in teacher.glob("*token*"):
        shutil.copyfile(path, directory / path.name)
    shutil.copyfile(teacher / "chat_template.jinja", directory / "chat_template.jinja")
    return {"init": "config", "model": str(directory)}


def test_a_table_of_positions_that_is_too_short(monkeypatch, tmp_path, teacher, cache):
    run = a_run(tmp_path / "a", teacher, gpt2(tmp_path / "short", teacher, 16))
    longest = max(len(record.example.token_ids) for record in cache.records)
    message = rf"examples of {longest} tokens for a student made for 16 positions"
    error = refused(monkeypatch, run, cache, message)
    assert "window = 16" in error.remedy
    works(a_run(tmp_path / "b", teacher, gpt2(tmp_path / "long", teacher, 32)), cache)


def test_rope_beyond_its_positions_is_told_and_trained(tmp_path, teacher, cache):
    small = tiny_models.save_llama(tmp_path / "small", num_layers=1, max_position_embeddings=16)
    run = a_run(tmp_path / "run", teacher, {"init": "config", "model": str(small)})
    notes = []
    train(run, caches={"": cache}, on_note=notes.append)
    assert any("made for 16 positions" in note for note in notes)


def test_all_mistakes_are_told_at_once(monkeypatch, tmp_path, teacher, cache):
    run = a_run(
        tmp_path,
        teacher,
        freeze=["nothing.*"],
        heldout_cache="nowhere",
        keep_best="1.forward_lk",
        kernel="triton",
        parallel="fsdp",
    )
    error = refused(monkeypatch, run, cache, r"\d things to put right")
    for part in ("'nothing.*' fits", "nowhere: there is no cache", "triton", "torchrun"):
        assert part in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "1.forward_kl"}, "expected a held-out set.*Name a heldout_cache"),
        ({"patience": 2}, "patience without keep_best"),
        ({"tracker": "wandb"}, "wandb is not installed.*pip install wandb"),
        ({"kernel": "triton"}, "kernel = 'triton' on cpu.*kernel = 'auto'"),
    ],
)
def test_settings_that_need_others(monkeypatch, tmp_path, teacher, cache, changes, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(monkeypatch, a_run(tmp_path, teacher, **changes), cache, message, StillroomError)


def test_keep_best_names_a_measure(monkeypatch, tmp_path, teacher, cache):
    texts = memory_cache.captured(teacher, memory_cache.examples(4, seed=3))
    changes = {"heldout_cache": str(texts.write(tmp_path / "held")), "evaluate_every": 1}
    run = a_run(tmp_path / "a", teacher, keep_best="1.forward_lk", **changes)
    message = "'1.forward_lk' is not measured; expected one of 1.forward_kl"
    refused(monkeypatch, run, cache, message)
    works(a_run(tmp_path / "b", teacher, keep_best="1.forward_kl", **changes), cache)


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A teacher of the same shape, and its cache."""
    made = tmp_path_factory.mktemp("another") / "model"
    model = tiny_models.save_llama(made, num_layers=2, seed=7)
    return model, memory_cache.captured(model, memory_cache.examples(6))


def card_of(run) -> str:
    return run.path("student", "README.md").read_text()


def test_a_teacher_that_did_not_teach(monkeypatch, tmp_path, teacher, cache, another):
    student = {"init": "model", "model": str(teacher)}
    run = a_run(tmp_path / "a", another[0], student)
    refused(monkeypatch, run, cache, r"\[teacher\]: is another teacher: weights_", PlanMismatch)
    copy = shutil.copytree(teacher, tmp_path / "copy-of-it")
    run = a_run(tmp_path / "b", copy, student)
    works(run, cache)
    weights = cache.plan.facts["teacher"]["weights_sha256"][:16]
    known = f"{code_span('LlamaForCausalLM')}, weights sha256 {weights}"
    assert f"| teacher | {code_span('copy-of-it')} ({known}) |" in card_of(run)


def test_a_teacher_whose_files_are_gone_is_not_named_on_the_card(tmp_path, teacher, cache):
    gone = shutil.copytree(teacher, tmp_path / "teacher2")
    run = a_run(tmp_path / "run", gone)
    setup.initial_student(run.student, run.teacher, run.path("student-initial"))
    shutil.rmtree(gone)
    works(run, cache)
    assert f"| teacher | {code_span('LlamaForCausalLM')}, weights sha256 " in card_of(run)


def test_any_cache_of_a_run_may_be_of_its_teacher(teacher, cache, another):
    taught = teachers_of({"": cache, "second": another[1]})
    assert check_teacher(Teacher(model=str(another[0])), taught) == [1]
    assert check_teacher(Teacher(model=str(teacher), dtype="bfloat16"), taught) == [0]
    assert check_teacher(None, taught) == []
    assert check_teacher(Teacher(model=str(another[0])), [{"architecture": "of an API"}]) == []


def test_a_capture_that_is_not_the_caches(tmp_path, teacher, cache):
    run = a_run(tmp_path, teacher)
    cache.write(run.path("cache"))

    def saying(**capture):
        return parse(run.model_dump(mode="json") | {"capture": capture}, "test")

    with pytest.raises(PlanMismatch, match=r"with k = 16, temperatures = \[1.0\]; expected k = 32"):
        train(saying(k=32, temperatures=[1.0, 3.0], entropy=True))
    elsewhere = saying(k=32).model_dump(mode="json")
    elsewhere["train"]["cache"] = str(shutil.copytree(run.path("cache"), tmp_path / "far"))
    train(parse(elsewhere | {"directory": str(tmp_path / "other")}, "test"))
    train(saying(k=16, examples_per_shard=2))
    assert Path(run.path("student", "README.md")).exists()
