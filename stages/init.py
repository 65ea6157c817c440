"""`stillroom init`: a run file for data that somebody has."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.arguments import AsJson
from stillroom.stages.console import document, put, say, table, warn

STUDENTS = "third, half (of the teacher's blocks), a model's directory or hub id, a JSON config"
UP_TO_A_DAY = 24 * 60


def init(
    data: Annotated[str, typer.Argument(help="File, folder or glob of texts or chats.")],
    teacher: Annotated[str, typer.Option(help="HF directory or hub id.")],
    student: Annotated[str, typer.Option(help=f"What is trained: {STUDENTS}.")] = "third",
    to: Annotated[Path | None, typer.Option(help="Where to write; NAME.toml by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented run file for your data, and say what each stage will cost here."""
    from stillroom.pipeline.beginning.choices import choose
    from stillroom.pipeline.beginning.run_text import run_text, wish
    from stillroom.pipeline.beginning.sampling import sample
    from stillroom.pipeline.config import Teacher
    from stillroom.pipeline.teacher.facts import model_shape

    _check(student)
    name = Path(data.rstrip("/")).name.split(".")[0].strip("*") or "first"
    target = to or Path(f"{name}.toml")
    if target.exists():
        raise ConfigError(
            "is there already", where=str(target), remedy="Name another file with --to."
        )
    model = Teacher(model=teacher)
    found, wished = sample(data, model), wish(student, model_shape(model).num_layers)
    made = choose(found, model, wished.kept, wished.leave_out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(run_text(name, data, teacher, wished, found, made))
    if as_json:
        sizes = {"documents": found.documents, "tokens": found.tokens, "whole": found.whole}
        costs = {"minutes": made.minutes, "megabytes": made.megabytes, "fits": made.fits}
        document({"run": str(target)} | sizes | costs)
        return
    _tell(found, made, target)


def _check(student: str) -> None:
    """Refuse a student that cannot be there, now and not after the capture."""
    path = Path(student)
    hub_id = student.count("/") == 1 and not student.startswith((".", "/", "~"))
    named = path.is_file() if path.suffix == ".json" else path.is_dir() or hub_id
    if student not in ("third", "half") and not named:
        raise ConfigError(f"'{student}' is not there", expected=STUDENTS, where="--student")


def _tell(found, made, target: Path) -> None:
    for line in found.said:
        say(f"data: {line}")
    more = "" if found.whole else " (the first of them; for all, count on as many times more)"
    say(f"data: {found.documents:,} documents, {found.tokens:,} tokens{more}")
    middle, last = found.share(0.5), found.lengths[-1]
    say(f"lengths: half of the examples have up to {middle:,} tokens, the longest {last:,}")
    if not made.fits:
        warn("warning: training needs more memory than is free; see [train.lora], [train] parallel")
    rows = [[f"stillroom {stage} {target}", _about(made.minutes[stage])] for stage in made.minutes]
    table("what comes next, and about how long here (reckoned, not measured)", ["", ""], rows)
    say(f"the cache: about {made.megabytes:,.0f} MB. All at once: stillroom run {target}")
    put(target)


def _about(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    return f"{minutes:,.0f} min" if minutes < UP_TO_A_DAY else f"{minutes / 60 / 24:,.1f} days"
