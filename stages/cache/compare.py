"""`stillroom cache diff | audit`: how far apart two answers to the same examples are.

One idea: numbers on stdout, judgement in the exit code.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.cache_schemas.errors import CacheError
from stillroom.stages.arguments import AsJson, Engine, EngineChoice
from stillroom.stages.cache.arguments import Cache, location
from stillroom.stages.console import document, say, table

if TYPE_CHECKING:
    from stillroom.pipeline.config import Teacher

Sample = Annotated[int, typer.Option(min=1, help="Examples to compare, evenly spaced.")]


def diff(
    first: Cache,
    second: Annotated[str, typer.Argument(help="Another.", metavar="CACHE")],
    sample: Sample = 200,
    as_json: AsJson = False,
) -> None:
    """Compare two caches by plan, by examples and by value."""
    from stillroom.pipeline.cache.care.comparing import diff
    from stillroom.pipeline.cache.reader import TeacherCache

    caches = [TeacherCache.open(location(cache)) for cache in (first, second)]
    found = diff(caches[0], caches[1], sample)
    if as_json:
        document(asdict(found))
        return
    for line in found.plan:
        say(f"plan: {line}")
    rows = [
        ["examples in both", f"{found.shared:,}"],
        ["only in the first", f"{found.only_first:,}"],
        ["only in the second", f"{found.only_second:,}"],
    ]
    table("examples", ["", "number"], rows)
    if found.values:
        table("values", COLUMNS, [_row("first || second", found.values)])


def audit(
    cache: Cache,
    run_file: Annotated[Path, typer.Argument(help="Run with the [teacher].", metavar="RUN.toml")],
    engine: EngineChoice = Engine.vllm,
    sample: Sample = 32,
    as_json: AsJson = False,
) -> None:
    """Score examples of a cache again: cache against live teacher, live against live."""
    from stillroom.pipeline import config
    from stillroom.pipeline.cache.care.audit import audit
    from stillroom.pipeline.cache.reader import TeacherCache
    from stillroom.pipeline.capture.plan import check_processor, pictures_of
    from stillroom.pipeline.corpus.preparing import Corpus
    from stillroom.pipeline.teacher.facts import teacher_facts
    from stillroom.pipeline.teacher.opening import open_engine
    from stillroom.pipeline.teacher.reference.apart import answers_apart

    run = config.load(run_file)
    teacher = config.require(run.teacher, "teacher", str(run_file))
    opened = TeacherCache.open(location(cache))
    _check_teacher(opened.plan.facts, teacher_facts(teacher, engine.value), engine.value, run_file)
    capture = _capture_table(opened.plan.facts["capture"])
    images = opened.plan.facts["images"]
    pictures = None
    if images:
        corpus = Corpus.open(run.path("corpus"))
        check_processor(corpus, teacher)
        pictures = pictures_of(corpus)
    running = open_engine(engine.value, teacher, capture, pictures=pictures)
    precision = other_precision(opened.plan.facts, engine.value, teacher)

    def otherwise(examples):
        running.close()  # an accelerator has room for one of them
        table = teacher.model_copy(update={"dtype": precision})
        return answers_apart(table, capture, examples, pictures, accelerator=True)

    try:
        result = audit(opened, running.score, sample, otherwise if precision else None)
    finally:
        running.close()
    rows = [
        _row("live || cache", result.cached),
        _row("live || live again", result.live),
        _row("live || live, stored", result.stored),
    ]
    if result.other is not None:
        rows.append(_row(f"live || live in {precision}", result.other))
    if as_json:
        document(asdict(result) | {"passed": result.passed, "allowed": result.allowed})
    else:
        table(f"{result.cached.examples} examples", COLUMNS, rows)
    if not result.passed:
        raise CacheError(
            f"mean KL {result.cached.kl_mean:.3g} nats from the live teacher",
            expected=f"at most {result.allowed:.3g}: its own noise, and what storing it costs",
            where=opened.storage.location,
            remedy="Capture again: this is not the teacher that made it, or not run as it was.",
        )


def other_precision(plan: dict, engine: str, teacher: "Teacher") -> str:
    """In which precision noise is to be measured too; "" where engine and dtype are the cache's.

    A float32 cache under another engine in float32 needs none: both round alike.
    """
    from stillroom.pipeline.teacher.facts import teacher_facts

    made, live = plan["teacher"].get("dtype", "float32"), teacher_facts(teacher)["dtype"]
    if made != live:
        return made
    other_engine = plan.get("engine", {}).get("name") != engine
    return "float32" if other_engine and live != "float32" else ""


COLUMNS = ["", "mean KL", "max KL", "top-1", "max |dlogp|", "dense"]


def _row(name: str, values) -> list[str]:
    dense = ", ".join(f"{signal} {error:.2g}" for signal, error in values.hidden.items())
    return [
        name,
        f"{values.kl_mean:.3g}",
        f"{values.kl_max:.3g}",
        "-" if math.isnan(values.top1) else f"{values.top1:.4f}",
        f"{values.logprob:.3g}",
        dense or "-",
    ]


def _check_teacher(plan: dict, found: dict, engine: str, where: Path) -> None:
    """Refuse another teacher; how the same one is run is measured where engine or dtype differ."""
    from stillroom.pipeline.teacher.sameness import check_same_teacher

    unrecorded = check_same_teacher(
        found,
        plan["teacher"],
        f"[teacher] of {where}",
        "Name the teacher that made the cache under [teacher], as it was then.",
        as_run=plan.get("engine", {}).get("name") == engine,
        may_differ=frozenset({"dtype"}),
    )
    if unrecorded:
        say(f"the cache does not record its teacher's {', '.join(unrecorded)}: judged by values")


def _capture_table(facts: dict):
    """The [capture] table that a cache was made with."""
    from stillroom.pipeline.config import Capture

    return Capture.model_validate({k: v for k, v in facts.items() if k in Capture.model_fields})
