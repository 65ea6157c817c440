"""The reference of run files is current and complete, and the schema says what the code does."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

import stillroom.pipeline.objectives  # noqa: F401  (it registers them)
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.reference import page, tables
from stillroom.pipeline.objectives.registry import OBJECTIVES
from stillroom.stages.__main__ import run as command
from stillroom.stages.run_file import reference

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted(p for p in (ROOT / "runbooks").glob("*.toml") if "[[arm]]" not in p.read_text())


def test_the_page_is_current():
    """`stillroom schema --page > runbooks/reference.md` makes it so."""
    assert (ROOT / "runbooks" / "reference.md").read_text() == reference() + "\n"


def test_every_key_says_what_it_means():
    silent = [
        f"{title} {name}"
        for title, schema in tables(Run.model_json_schema())
        for name, key in schema.get("properties", {}).items()
        if not key.get("description") and "$ref" not in json.dumps(key)
    ]
    assert silent == []


def test_options_of_every_objective_say_what_they_mean():
    silent = [
        f"{name} {key}"
        for name, spec in OBJECTIVES.items()
        for key, said in spec.options.model_json_schema().get("properties", {}).items()
        if not said.get("description")
    ]
    assert silent == []


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_schema_takes_our_own_runs(path, capsys):
    assert command(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    run = tomllib.loads(path.read_text())
    jsonschema.validate(run, schema)
    with pytest.raises(jsonschema.ValidationError, match="stepz"):
        jsonschema.validate(run | {"stepz": 1}, schema)


def test_a_run_is_shown_as_it_is_read(capsys):
    assert command(["config", str(ROOT / "runbooks" / "demo.toml")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert Run.model_validate(shown).train == Run.model_validate(shown).train
    assert shown["train"]["warmup"] == 0.1


def test_a_page_of_one_table():
    from pydantic import Field

    from stillroom.pipeline.config.strict import Table

    class Inner(Table):
        """What is inside."""

        size: int = Field(default=3, ge=1)
        """Of | it."""

    class Outer(Table):
        inner: tuple[Inner, ...] = ()
        named: dict[str, Inner] = Field(default_factory=dict)

    assert page(Outer, {}).splitlines()[2:8] == [
        "## `[[inner]]`",
        "",
        "What is inside.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    assert "| `size` | integer ≥ 1 | `3` | Of \\| it. |" in page(Outer, {})
    assert "## `[named.NAME]`" in page(Outer, {})
