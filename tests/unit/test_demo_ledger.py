"""The demo's ledger: which stages are done, and what a change of settings does to them."""

import json
import sys
from pathlib import Path

import pytest

from stillroom.pipeline import config
from stillroom.stages.demos import text as demo
from stillroom.stages.demos.text import Ledger, Stage, perform, plan_stages
from stillroom.stages.demos.text_findings import in_words
from stillroom.stages.stage_process import StageFailed

ROOT = Path(__file__).resolve().parents[2]
RUN, CONTROL = ROOT / "runbooks" / "demo.toml", ROOT / "runbooks" / "demo-control.toml"


MEASURED = {"evaluate", "answers"}


def stages(run=None, other=None) -> dict[str, Stage]:
    run, other = run or config.load(RUN), other or config.load(CONTROL)
    return {stage.name: stage for stage in plan_stages(run, other, RUN, CONTROL, "vllm")}


def changed(run, table: str, **values):
    return run.model_copy(update={table: getattr(run, table).model_copy(update=values)})


def stale(run=None, other=None) -> set[str]:
    before, after = stages(), stages(run, other)
    return {name for name in before if before[name].inputs != after[name].inputs}


@pytest.mark.parametrize(
    ("table", "values", "redone"),
    [
        ("evaluate", {"examples": 3}, MEASURED),
        ("train", {"steps": 7}, {"train"} | MEASURED),
        ("student", {"keep_every": 5}, {"train"} | MEASURED),
        ("capture", {"k": 8}, {"capture", "train", "control"} | MEASURED),
        ("prepare", {"window": 64}, {"prepare", "capture", "train", "control"} | MEASURED),
    ],
)
def test_a_change_makes_stale_what_depends_on_it(table, values, redone):
    assert stale(changed(config.load(RUN), table, **values)) == redone


def test_the_control_stands_on_its_own():
    assert stale(None, changed(config.load(CONTROL), "train", steps=7)) == {"control"} | MEASURED


def test_the_control_differs_from_the_run_in_its_loss_alone():
    run, control = config.load(RUN), config.load(CONTROL)
    assert run.student == control.student
    assert run.teacher
    assert control.teacher
    assert run.teacher.model == control.teacher.model
    assert run.train
    assert control.train
    assert control.train.model_copy(update={"cache": ""}) == run.train
    assert control.train.cache == str(run.path("cache"))


def test_a_stage_is_done_when_its_settings_match_and_its_result_is_there(tmp_path):
    result = tmp_path / "result"
    stage = Stage("train", ["train"], result, "a")
    ledger = Ledger.open(tmp_path / "demo.json")
    assert not ledger.is_done(stage)
    ledger.note(stage, 2.0, done=True)
    assert not ledger.is_done(stage)
    result.write_text("x")
    assert Ledger.open(tmp_path / "demo.json").is_done(stage)
    assert not ledger.is_done(Stage("train", ["train"], result, "b"))


def test_the_time_of_interrupted_attempts_counts(tmp_path):
    stage = Stage("train", ["train"], tmp_path, "a")
    ledger = Ledger(tmp_path / "demo.json")
    ledger.note(stage, 2.0, done=False)
    ledger.note(stage, 3.04, done=True)
    assert ledger.seconds("train") == 5.0
    ledger.note(Stage("train", ["train"], tmp_path, "b"), 1.0, done=True)
    assert ledger.seconds("train", "never") == 1.0


def test_a_damaged_ledger_only_costs_time(tmp_path):
    (tmp_path / "demo.json").write_text("{")
    assert Ledger.open(tmp_path / "demo.json").entries == {}


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ledger = Ledger(tmp_path / "demo.json")
    with pytest.raises(StageFailed) as failed:
        perform(Stage("prepare", ["prepare", "nowhere.toml"], tmp_path / "x", "a"), ledger)
    assert failed.value.exit_code == 2
    assert json.loads((tmp_path / "demo.json").read_text())["prepare"]["done"] is False
    assert "$ stillroom prepare nowhere.toml" in capsys.readouterr().err


def test_install_time_is_unknown_where_make_did_not_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "INSTALL_SECONDS", tmp_path / "none")
    assert demo.install_seconds() is None
    monkeypatch.setattr(demo, "INSTALL_SECONDS", tmp_path / "some")
    (tmp_path / "some").write_text("158\n")
    assert demo.install_seconds() == 158.0


def test_the_environments_own_record_is_used():
    assert Path(sys.prefix) in demo.INSTALL_SECONDS.parents


def test_text_of_another_kind_depends_on_the_students_and_on_itself():
    elsewhere = config.load(ROOT / "runbooks" / "demo-elsewhere.toml")
    prepared, measured = demo.elsewhere_stages(elsewhere, "x.toml", "students")
    other = demo.elsewhere_stages(elsewhere, "x.toml", "other students")
    assert prepared.inputs == other[0].inputs
    assert measured.inputs != other[1].inputs
    fewer = changed(elsewhere, "evaluate", examples=3)
    assert demo.elsewhere_stages(fewer, "x.toml", "students")[1].inputs != measured.inputs


@pytest.mark.parametrize(
    ("mean", "error", "ahead"),
    [(-0.2, 0.01, "student ahead"), (0.01, 0.01, "level"), (0.2, 0.05, "control ahead")],
)
def test_who_is_ahead_is_said_beyond_two_errors(mean, error, ahead):
    said = in_words({"kl": {"mean": mean, "error": error}})
    assert said == f"student less control: kl {mean:+.3f} ± {error:.3f} ({ahead})"
    other = in_words({"top1": {"mean": -mean, "error": error}})
    assert other.endswith(f"({ahead})")
