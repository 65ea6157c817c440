"""`cache plan`: the frontier on made-up rows, the choice, the run file, the picture, and all of it
with a tiny teacher."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline import config
from stillroom.pipeline.planning import distortion
from stillroom.pipeline.planning import files as plan_files
from stillroom.pipeline.planning import frontier as planning
from stillroom.pipeline.planning.frontier import Sample, Setting
from tests.codec_samples import record

VOCAB = 600
SETTINGS = [
    Setting(4, 0, "small"),
    Setting(4, 8, "small"),
    Setting(16, 0, "small"),
    Setting(16, 0, "small", 1e-3),
    Setting(16, 0, "exact"),
    Setting(64, 0, "small"),
]
RUN = """name = "planned"  # a comment that stays
directory = "{directory}"

[teacher]
model = "{teacher}"

[prepare]
window = 48
[[prepare.source]]
name = "help"
kind = "pydoc_topics"
limit = 3

[capture]
k = 32
hidden_layers = ["final"]  # so does this
profile = "strict"
"""


@pytest.fixture(scope="module")
def rows() -> Sample:
    made = [record(seed, rows=150, k=128, vocab=VOCAB) for seed in range(6)]
    return Sample(made, VOCAB, rows_per_second=1000.0, corpus_rows=3_600_000)


@pytest.fixture(scope="module")
def points(rows):
    return planning.frontier(rows, SETTINGS)


def at(points, setting):
    return next(point for point in points if point.setting == setting)


def test_the_frontier_is_measured_on_real_records(points):
    assert [p.bytes_per_token for p in points] == sorted(p.bytes_per_token for p in points)
    assert {p.setting for p in points} == set(SETTINGS)
    for point in points:
        assert point.corpus_bytes == pytest.approx(point.bytes_per_token * 3_600_000)
        assert point.hours == pytest.approx(1.0)
        assert 0 < point.retained_mass < 1
        assert point.kl_added <= point.kl_max


def test_longer_lists_keep_more_mass_and_less_error(points):
    short, long = (at(points, Setting(k, 0, "small")) for k in (4, 64))
    assert short.bytes_per_token < long.bytes_per_token
    assert short.retained_mass < long.retained_mass
    assert short.gradient_error > long.gradient_error


def test_draws_trade_bias_for_noise(points):
    bucket, draws = (at(points, Setting(4, n, "small")) for n in (0, 8))
    assert draws.gradient_bias < bucket.gradient_bias / 5
    assert draws.gradient_noise > bucket.gradient_noise == 0


def test_coding_budgets_show_in_bytes_and_in_kl(points):
    coarse, usual, exact = (
        at(points, s)
        for s in (Setting(16, 0, "small", 1e-3), Setting(16, 0, "small"), Setting(16, 0, "exact"))
    )
    assert coarse.bytes_per_token < usual.bytes_per_token < exact.bytes_per_token
    assert coarse.kl_added > usual.kl_added > exact.kl_added == 0
    assert usual.kl_added <= 1.2e-4


def test_bucket_error_is_what_it_says_it_is():
    """Against the definition, on rows whose lists hold the whole vocabulary."""
    whole = record(3, rows=40, k=VOCAB, vocab=VOCAB)
    usual = distortion.mean_distribution([record(4, rows=40, k=VOCAB, vocab=VOCAB)], VOCAB)
    k = 8
    p = np.zeros((40, VOCAB))
    np.put_along_axis(p, whole["topk_ids"], np.exp(whole["topk_logprobs"], dtype=np.float64), 1)
    outside = np.ones(p.shape, dtype=bool)
    np.put_along_axis(outside, whole["topk_ids"][:, :k], False, 1)
    spread = np.where(outside, usual, 0)
    spread *= (p * outside).sum(axis=1, keepdims=True) / spread.sum(axis=1, keepdims=True)
    defined = np.sqrt((((p - spread) * outside) ** 2).sum(axis=1).mean())
    kept = {name: whole[name][:, :k] for name in ("topk_ids", "topk_logprobs")}
    bias, noise = distortion.gradient([whole], k, 0, usual, [kept])
    assert bias == pytest.approx(defined, rel=1e-4)
    assert noise == 0


def test_draw_noise_is_what_draws_show():
    """Against the spread of many simulated draws around the teacher's own tail."""
    whole = record(5, rows=1, k=VOCAB, vocab=VOCAB)
    p = np.zeros(VOCAB)
    p[whole["topk_ids"][0]] = np.exp(whole["topk_logprobs"][0], dtype=np.float64)
    tail, errors = p.copy(), []
    tail[whole["topk_ids"][0, :4]] = 0
    for seed in range(3000):
        drawn = distortion.cut(whole, 4, 64, VOCAB, seed)
        estimate = np.zeros(VOCAB)
        held = drawn["draw_ids"][0] >= 0
        counts = drawn["draw_counts"][0, held]
        estimate[drawn["draw_ids"][0, held]] = counts / counts.sum() * tail.sum()
        errors.append(((estimate - tail) ** 2).sum())
    kept = {name: whole[name][:, :4] for name in ("topk_ids", "topk_logprobs")}
    noise = distortion.gradient([whole], 4, 64, p, [kept])[1]
    assert np.sqrt(np.mean(errors)) == pytest.approx(noise, rel=0.03)


def test_the_efficient_settings_improve_from_left_to_right(points):
    errors = [point.gradient_error for point in points if point.efficient]
    assert errors == sorted(errors, reverse=True)
    assert points[0].efficient


def test_the_choice_keeps_to_its_limits(points):
    budget = at(points, Setting(16, 0, "small")).bytes_per_token
    chosen = planning.choose(points, budget=budget)
    assert chosen.bytes_per_token <= budget
    able = [p for p in points if p.bytes_per_token <= budget]
    assert chosen.gradient_error == min(p.gradient_error for p in able)
    precise = planning.choose(points, max_kl=1e-9)
    assert precise.setting.profile == "exact"


def test_limits_that_nothing_meets_are_an_error(points):
    with pytest.raises(ConfigError, match="bytes a token or more"):
        planning.choose(points, budget=0.5)


def test_one_example_is_not_enough_to_plan_with(rows):
    alone = Sample(rows.rows[:1], VOCAB, 1.0, 10)
    with pytest.raises(ConfigError, match="at least 2"):
        planning.frontier(alone, SETTINGS)


def test_settings_fit_the_vocabulary_and_are_different():
    made = planning.settings(longest=64, vocab_size=70)
    assert len(set(made)) == len(made)
    assert all(setting.k + setting.draws < 70 for setting in made)


@pytest.mark.parametrize("capture", ["kept", "absent", "inline"])
def test_the_run_file_changes_only_where_it_must(tmp_path, capture):
    source, target = tmp_path / "run.toml", tmp_path / "new" / "run.toml"
    text = RUN.format(directory=tmp_path, teacher="none")
    if capture != "kept":
        text = text[: text.index("[capture]")]
    if capture == "inline":
        text = "capture = {k = 8}\n" + text
    source.write_text(text)
    keys = Setting(8, 8, "small", 1e-5).table()
    if capture == "inline":
        with pytest.raises(ConfigError, match=r"not written key by key|is not TOML"):
            plan_files.write_run(source, target, keys)
        return
    plan_files.write_run(source, target, keys)
    written = config.load(target).capture
    assert written is not None
    assert {name: getattr(written, name) for name in keys} == keys
    assert ("hidden_layers" in target.read_text()) == (capture == "kept")
    assert "# a comment that stays" in target.read_text()


def test_the_picture_is_a_png(tmp_path, points):
    plan_files.plot(points, points[0], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plan_from_the_command_line(tmp_path, tiny_llama, monkeypatch):
    import typer

    from stillroom.pipeline.corpus.preparing import prepare
    from stillroom.stages.cache import plan as cache_plan

    monkeypatch.setattr(planning, "settings", lambda longest, vocab: SETTINGS[:3])
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(directory=tmp_path / "run", teacher=tiny_llama))
    run = config.load(file)
    assert run.prepare is not None
    prepare(run.prepare, str(tiny_llama), run.path("corpus"))
    app = typer.Typer()
    app.command()(cache_plan.plan)
    result = CliRunner().invoke(
        app, [str(file), "--engine", "reference", "--examples", "6", "--budget", "200"]
    )
    assert result.exit_code == 0, result.output
    assert "* chosen" in result.output
    assert "bytes/token" in result.output
    planned = tomllib.loads((tmp_path / "run.planned.toml").read_text())
    assert planned["capture"]["k"] in {setting.k for setting in SETTINGS[:3]}
    assert (tmp_path / "run" / "plan.png").exists()


def test_draws_alone_are_planned_too(rows):
    """Random sampling: no list, no bias, more noise than lists with draws."""
    alone, listed = planning.frontier(rows, [Setting(0, 8, "small"), Setting(4, 8, "small")])
    assert (alone.setting.k, listed.setting.k) == (0, 4)
    assert alone.retained_mass == alone.kl_added == alone.gradient_bias == 0
    assert alone.gradient_noise > listed.gradient_noise
    assert alone.bytes_per_token < listed.bytes_per_token
    assert planning.choose([alone, listed], budget=1e9) is listed
    assert planning.choose([alone]) is alone


def test_planning_costs_a_tenth_of_the_capture(rows, monkeypatch):
    """By a clock that counts coded rows: as many as the time allows, or the least that say
    something."""
    monkeypatch.setattr(planning, "LEAST_CODED", 100)
    now, coded = [0.0], []
    real = planning._measure

    def measured(sample, setting, usual):
        count = sum(len(one["topk_ids"]) for one in sample.rows)
        coded.append(count)
        now[0] += count * 0.01
        return real(sample, setting, usual)

    monkeypatch.setattr(planning, "_measure", measured)
    monkeypatch.setattr(planning.time, "monotonic", lambda: now[0])
    planning.frontier(rows, SETTINGS[:2], seconds=12.0)
    assert coded[2:] == [600, 600]
    coded.clear()
    planning.frontier(rows, SETTINGS[:2], seconds=0.0)
    assert coded[2:] == [300, 300]  # two examples, the least that can be coded


def test_a_sample_knows_what_planning_may_take():
    sample = Sample([], VOCAB, rows_per_second=100.0, corpus_rows=60_000, seconds=20.0)
    assert sample.capture_seconds == 600.0
    assert sample.left == 40.0
    assert Sample([], VOCAB, 100.0, 1000, seconds=5.0).left == 0.0


def test_the_star_says_why_it_is_where_it_is(rows):
    from stillroom.pipeline.planning.reasons import LISTLESS, why

    both = Setting(0, 64, "small"), Setting(4, 8, "small")
    found = planning.frontier(rows, both)
    alone, listed = (at(found, setting) for setting in both)
    assert alone.gradient_error < listed.gradient_error
    cheap = replace(alone, bytes_per_token=1.0)
    said = why([cheap, listed], listed, budget=1000.0)
    assert said.startswith("4 ids and 8 draws: the least error within 1000 bytes a token")
    assert (
        f"0 ids and 64 draws has less error for fewer bytes (error {cheap.gradient_error:.1e}"
        in said
    )
    assert said.endswith(LISTLESS)
    assert why([listed], listed).count(";") == 0
    coarse = replace(listed, bytes_per_token=1.0)
    assert "more than 1e-05 nats of KL" in why([coarse, listed], listed, max_kl=1e-5)
