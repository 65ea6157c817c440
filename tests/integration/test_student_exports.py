"""What was trained is what is saved: every way of training, loaded again by plain transformers."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config import parse
from stillroom.pipeline.config.training import Student
from stillroom.pipeline.evaluation.held_out import measure
from stillroom.pipeline.student.loading import load
from stillroom.pipeline.student.saving import export
from stillroom.pipeline.training.metrics import read_metrics
from stillroom.pipeline.training.trainer import train
from tests import memory_cache, student_architectures, tiny_models

STEPS = 8
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_models.save_llama(tmp_path_factory.mktemp("teacher") / "model", num_layers=4)


@pytest.fixture(scope="module")
def cache(teacher):
    return memory_cache.captured(teacher, memory_cache.examples(40))


@pytest.fixture(scope="module")
def heldout(teacher, tmp_path_factory):
    texts = memory_cache.examples(6, seed=1)
    return memory_cache.captured(teacher, texts).write(tmp_path_factory.mktemp("heldout") / "cache")


def make_run(directory, teacher, heldout, **train):
    """A run that measures a cross-entropy on held-out text after its last step."""
    settings = {
        "steps": STEPS,
        "batch_tokens": 24,
        "accumulate": 1,
        "learning_rate": 3e-3,
        "workers": 0,
        "heldout_cache": str(heldout),
        "evaluate_every": STEPS,
    }
    objectives = [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.1}]
    document = {
        "name": "test",
        "directory": str(directory),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"keep_layers": [0, 2]},
        "objective": objectives,
        "train": settings | train,
    }
    return parse(document, "test")


@torch.no_grad()
def own_loss(model) -> float:
    """Cross-entropy on the held-out text by transformers alone, one text at a time."""
    losses = []
    for text in memory_cache.examples(6, seed=1):
        ids = torch.as_tensor(text.token_ids, dtype=torch.long)
        logprobs = model.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-logprobs.gather(1, ids[1:, None])[:, 0][text.loss_mask[1:]])
    return float(torch.cat(losses).mean())


LORA = {
    "all-linear": {},
    "embeddings": {"targets": ["embed_tokens"]},
    "head": {"targets": ["lm_head"]},
    "both-ends": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "head-whole": {"modules_to_save": ["lm_head"]},
    "both-whole": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("targets", LORA)
def test_adapters_anywhere_are_exported_as_they_were_trained(
    tmp_path, teacher, cache, heldout, targets, form
):
    lora = {"rank": 4, "export": form} | LORA[targets]
    run = make_run(tmp_path, teacher, heldout, lora=lora)
    result = train(run, caches={"": cache})
    reported = read_metrics(run.path())[-1]["heldout/2.cross_entropy"]
    assert own_loss(AutoModelForCausalLM.from_pretrained(result.student)) == pytest.approx(
        reported, abs=1e-5
    )
    assert own_loss(load(result.student)) == pytest.approx(reported, abs=1e-5)
    assert abs(reported - own_loss(load(result.initial))) > 1e-3
    assert result.check["reloaded"] == pytest.approx(result.check["in_training"], abs=1e-5)
    written = {path.name for path in run.path("student").iterdir()}
    assert ("adapter_config.json" in written) == (form == "adapter")
    assert train(run, caches={"": cache}).seconds == 0


def test_an_adapter_is_measured_like_any_student(tmp_path, teacher, cache, heldout):
    lora = {"rank": 4, "targets": ["lm_head"], "export": "adapter"}
    result = train(make_run(tmp_path / "a", teacher, heldout, lora=lora), caches={"": cache})
    merged = train(
        make_run(tmp_path / "b", teacher, heldout, lora=lora | {"export": "merged"}),
        caches={"": cache},
    )
    students = {"adapter": result.student, "merged": merged.student}
    scores = measure(str(teacher), students, memory_cache.examples(4))
    assert scores["adapter"].kl == pytest.approx(scores["merged"].kl, abs=1e-6)


@pytest.mark.parametrize("key", ["targets", "modules_to_save"])
def test_a_target_that_is_not_there_is_refused_with_those_that_are(
    tmp_path, teacher, cache, heldout, key
):
    run = make_run(tmp_path / "a", teacher, heldout, lora={key: ["q_proj", "v_porj"]})
    with pytest.raises(ConfigError, match=rf"{key}: 'v_porj'.*q_proj.*mean 'v_proj'"):
        train(run, caches={"": cache})
    assert not run.path("checkpoints").exists()
    lora = {"rank": 2, "targets": ["k_proj"]} | {key: ["q_proj", "v_proj"]}
    train(make_run(tmp_path / "b", teacher, heldout, lora=lora, steps=1), caches={"": cache})


@pytest.mark.parametrize("whole", ["v_proj", "self_attn"])
def test_adapters_that_have_no_module_left_are_refused(tmp_path, teacher, cache, heldout, whole):
    lora = {"targets": ["v_proj"], "modules_to_save": [whole]}
    with pytest.raises(ConfigError, match="every target is inside modules_to_save") as caught:
        train(make_run(tmp_path / "a", teacher, heldout, lora=lora), caches={"": cache})
    assert "name further targets" in str(caught.value)
    lora |= {"targets": ["v_proj", "up_proj"], "rank": 2}
    train(make_run(tmp_path / "b", teacher, heldout, lora=lora, steps=1), caches={"": cache})


def test_an_export_that_would_not_be_what_is_trained_is_refused_before_the_first_step(
    tmp_path, teacher, cache, heldout, monkeypatch
):
    from stillroom.pipeline.student import lora

    monkeypatch.setattr(lora, "_untie", lambda _: None)
    settings = {"targets": ["embed_tokens"]}
    run = make_run(tmp_path, teacher, heldout, lora=settings)
    with pytest.raises(ConfigError, match=r"cannot be exported as 'merged'.*all-linear"):
        train(run, caches={"": cache})
    assert not run.path("checkpoints").exists()
    assert not run.path("student-rehearsal").exists()
    again = make_run(tmp_path, teacher, heldout, lora={"targets": "all-linear"}, steps=1)
    train(again, caches={"": cache})


def test_layers_that_take_no_adapter_are_refused_with_a_way_out(tmp_path, teacher, cache, heldout):
    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    own = student_architectures.save_model(
        "llama4_text", tmp_path / "model", tmp_path / "tokenizer", 768
    )

    def run(name, **lora):
        made = make_run(tmp_path / name, teacher, heldout, lora=lora, steps=1)
        student = Student(init="model", model=str(own))
        return made.model_copy(update={"student": student})

    with pytest.raises(ConfigError, match=r"Name the targets, such as targets = \['q_proj'"):
        train(run("a"), caches={"": cache})
    train(run("b", targets=("q_proj", "v_proj")), caches={"": cache})


def test_an_adapter_that_would_not_load_is_refused_and_goes_merged(
    tmp_path, teacher, cache, heldout, monkeypatch
):
    from stillroom.pipeline.student import loading, places

    def without(directory, attention, dtype):
        return load(json.loads((directory / places.ADAPTER).read_text())["base_model_name_or_path"])

    monkeypatch.setattr(loading, "_with_adapter", without)
    run = make_run(tmp_path, teacher, heldout, lora={"export": "adapter"})
    with pytest.raises(ConfigError, match=r"exported as 'adapter'.*Set export = 'merged'"):
        train(run, caches={"": cache})
    train(make_run(tmp_path, teacher, heldout, lora={"export": "merged"}), caches={"": cache})


def test_an_export_with_another_loss_is_not_put_in_place(
    tmp_path, teacher, cache, heldout, monkeypatch
):
    from stillroom.pipeline.training import exporting

    def spoiled(directory, attention=""):
        model = load(directory, attention)
        if "student.tmp" in str(directory):
            model.model.norm.weight.data *= 1.001
        return model

    monkeypatch.setattr(exporting, "load", spoiled)
    run = make_run(tmp_path, teacher, heldout)
    with pytest.raises(StudentError, match="loaded again by transformers, has a loss of"):
        train(run, caches={"": cache})
    assert not run.path("student").exists()
    monkeypatch.undo()
    assert train(run, caches={"": cache}).steps == STEPS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}, {"rank": 4, "export": "adapter"}])
def test_a_narrower_export_says_what_its_rounded_weights_say(
    tmp_path, teacher, cache, heldout, dtype, lora
):
    run = make_run(tmp_path, teacher, heldout, export_dtype=dtype, lora=lora)
    result = train(run, caches={"": cache})
    assert result.check["reloaded"] == pytest.approx(result.check["saved"], abs=1e-5)
    assert result.check["saved"] != result.check["in_training"]
    assert result.check["saved"] == pytest.approx(result.check["in_training"], abs=0.05)
    if not (lora or {}).get("export"):
        assert AutoModelForCausalLM.from_pretrained(result.student).dtype == getattr(torch, dtype)


def test_a_finished_run_is_exported_again_in_another_form(tmp_path, teacher, cache, heldout):
    before = train(make_run(tmp_path, teacher, heldout), caches={"": cache})
    run = make_run(tmp_path, teacher, heldout, export_dtype="bfloat16")
    after = train(run, caches={"": cache})
    assert (after.steps, after.final_loss) == (before.steps, before.final_loss)
    assert json.loads(run.path("train.json").read_text())["export"]["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(after.student).dtype == torch.bfloat16


def test_averages_are_what_is_exported_and_checked(tmp_path, teacher, cache, heldout):
    run = make_run(tmp_path / "averaged", teacher, heldout, ema=0.5)
    result = train(run, caches={"": cache})
    assert result.check["reloaded"] == pytest.approx(result.check["in_training"], abs=1e-5)
    reported = read_metrics(run.path())[-1]["heldout/2.cross_entropy"]
    averaged = own_loss(load(result.student))
    assert averaged == pytest.approx(reported, abs=1e-5)
    last = train(make_run(tmp_path / "last", teacher, heldout), caches={"": cache})
    assert abs(own_loss(load(last.student)) - averaged) > 1e-4


def test_frozen_weights_are_exported_as_they_were(tmp_path, cache, heldout, teacher):
    run = make_run(tmp_path, teacher, heldout, freeze=["*embed_tokens*"])
    result = train(run, caches={"": cache})
    assert result.check["reloaded"] == pytest.approx(result.check["in_training"], abs=1e-5)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path, teacher, umask):
    before = os.umask(umask)
    try:
        export(load(teacher), tmp_path / "made", teacher, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}
    assert "model.safetensors" in modes


def test_values_beyond_an_exports_type_are_refused_by_name(tmp_path, teacher):
    """One weight of a token that no text has: no loss would show it."""
    large = shutil.copytree(teacher, tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    weights[EMBEDDINGS][1, 0] = 1e5
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    cache = memory_cache.captured(large, memory_cache.examples(12))
    held = memory_cache.captured(large, memory_cache.examples(6, seed=1)).write(tmp_path / "held")
    half = make_run(tmp_path / "run", large, held, export_dtype="float16", steps=2)
    message = f"{EMBEDDINGS} has values that float16 cannot hold; expected at most 65504"
    with pytest.raises(StudentError, match=message) as caught:
        train(half, caches={"": cache})
    assert "export_dtype = 'bfloat16'" in caught.value.remedy
    assert not half.path("student").exists()
    brain = make_run(tmp_path / "run", large, held, export_dtype="bfloat16", steps=2)
    asked = train(brain, caches={"": cache}, stop=lambda: pytest.fail("trained again"))
    assert load_file(Path(asked.student) / "model.safetensors")[EMBEDDINGS].isfinite().all()


def test_a_student_behind_a_link_is_replaced_there(tmp_path, teacher, cache, heldout):
    train(make_run(tmp_path / "run", teacher, heldout), caches={"": cache})
    run = make_run(tmp_path / "run", teacher, heldout, steps=STEPS + 1)
    link, far = run.path("student"), tmp_path / "large disk" / "far"
    far.parent.mkdir()
    shutil.move(link, far)
    (far.parent / "far.old").mkdir()  # somebody's own
    (far / "README.md").write_text("what I think of it")
    link.symlink_to(far)
    result = train(run, caches={"": cache})
    assert link.is_symlink()
    assert json.loads((far / "student.json").read_text())["identity"]
    assert "what I think of it" in (far / "README.md").read_text()
    assert own_loss(AutoModelForCausalLM.from_pretrained(result.student)) == pytest.approx(
        read_metrics(run.path())[-1]["heldout/2.cross_entropy"], abs=1e-5
    )
    assert {path.name for path in far.parent.iterdir()} == {"far", "far.old"}


def exported(teacher, directory, **facts):
    export(load(teacher), directory, teacher, facts)
    return json.loads((directory / "student.json").read_text())


def test_a_link_left_aside_by_a_failed_replacement_goes(tmp_path, teacher):
    """As earlier releases left it: the link moved away, a directory in its place."""
    student, far = tmp_path / "student", tmp_path / "far"
    exported(teacher, far, of="before")
    exported(teacher, student, of="then")
    (tmp_path / "student.old").symlink_to(far)
    (tmp_path / "student.tmp").mkdir()
    assert exported(teacher, student, of="now") == {"of": "now"}
    assert {path.name for path in tmp_path.iterdir()} == {"student", "far"}
    assert json.loads((far / "student.json").read_text()) == {"of": "before"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_swap_that_was_cut_short_loses_no_readme(tmp_path, teacher, linked):
    student, real, moved = tmp_path / "student", tmp_path / "student", tmp_path / "student.old"
    if linked:
        real, moved = tmp_path / "far", tmp_path / "far.stillroom.old"
        student.symlink_to(real)
    exported(teacher, real, of="before")
    (real / "README.md").write_text("mine")
    real.rename(moved)
    assert exported(teacher, student, of="now") == {"of": "now"}
    assert (real / "README.md").read_text() == "mine"
    assert student.is_symlink() == linked
    assert not moved.exists()


def test_a_link_to_where_nothing_can_be_written(tmp_path, teacher):
    student = tmp_path / "student"
    student.symlink_to("/proc/student")
    with pytest.raises(StudentError, match=r"no student can be put into /proc/student") as caught:
        exported(teacher, student)
    assert "Let it be a link to such a directory" in caught.value.remedy
    student.unlink()
    student.symlink_to(tmp_path / "far")
    assert exported(teacher, student, of="now") == {"of": "now"}
    assert student.is_symlink()
