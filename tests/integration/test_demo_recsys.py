"""The recommender demo from end to end on a tiny teacher: its results, and going on."""

import json

import pytest
from typer.testing import CliRunner

from stillroom.stages.__main__ import app
from stillroom.stages.demos.recsys_arms import ARMS
from tests import small_interactions


def toml_of(directory, teacher, films) -> str:
    return f"""name = "films"
directory = "{directory}"
[teacher]
model = "{teacher}"
dtype = "float32"
[prepare]
window = 128
[[prepare.source]]
name = "films"
kind = "interactions"
path = "{films}"
[prepare.source.interactions]
k_core = 1
history = 4
[items]
[candidates]
k = 10
written_tokens = 5
histories_per_user = 1
[recommender]
width = 8
batch = 16
[train]
evaluate_every = 2
"""


@pytest.mark.slow
def test_the_demo_leaves_its_results_and_goes_on_where_it_stopped(tmp_path, tiny_llama):
    films = small_interactions.save(tmp_path / "films", users=12)
    run_file = tmp_path / "run.toml"
    run_file.write_text(toml_of(tmp_path / "run", tiny_llama, films))
    words = ["demo-recsys", str(run_file), "--engine", "reference", "--seeds", "2"]
    words += ["--steps", "4", "--made-up-steps", "0"]
    first = CliRunner().invoke(app, [*words, "--arms", "none,shuffled"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["arms"]) == {"none", "shuffled"}
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(found["arms"]) == set(ARMS)
    for name, arm in found["arms"].items():
        assert {key: len(values) for key, values in arm.items()} == {"hr10": 2, "ndcg10": 2}, name
    for name in ("none", "shuffled"):
        assert found["arms"][name] == results["arms"][name]
    assert set(found["teacher"]) == {"hr10", "ndcg10"}
    pairs = zip(found["arms"]["shuffled"]["ndcg10"], found["arms"]["none"]["ndcg10"])
    gain = sum(a - b for a, b in pairs) / 2
    assert found["shuffled_teacher_gain"] == pytest.approx(gain)
    assert found["seconds"] > results["seconds"]
    for name in ("findings.md", "arms.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
