"""Every name in a run file is checked before a model is loaded, and told together."""

import shutil

import pytest

from stillroom.cache_schemas.errors import ConfigError, StillroomError, StudentError
from stillroom.pipeline.config import parse
from stillroom.pipeline.training import setup
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, tiny_models
from tests.integration.test_training import losses, make_run


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
    held = str(cache.write(tmp_path / "held"))
    changes = {"heldout_cache": held, "evaluate_every": 1}
    run = a_run(tmp_path / "a", teacher, keep_best="1.forward_lk", **changes)
    message = "'1.forward_lk' is not measured; expected one of 1.forward_kl"
    refused(monkeypatch, run, cache, message)
    works(a_run(tmp_path / "b", teacher, keep_best="1.forward_kl", **changes), cache)
