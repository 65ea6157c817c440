"""`stillroom init`: a run file for data that somebody has."""

from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError
from stillroom.stages.arguments import AsJson
from stillroom.stages.console import document, put, say, table, warn

STUDENTS = "third, half (of the teacher's blocks), a model's directory or hub id, a JSON config"
UP_TO_A_DAY = 24 * 60
LONG = 10
"""Minutes in all from which on it is said what makes them fewer."""


def init(
    data: Annotated[str, typer.Argument(help="File, folder or glob of texts or chats.")],
    teacher: Annotated[str, typer.Option(help="HF directory or hub id.")],
    student: Annotated[str, typer.Option(help=f"What is trained: {STUDENTS}.")] = "third",
    to: Annotated[Path | None, typer.Option(help="Where to write; NAME.toml by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented run file for your data, and say what each stage will cost here."""
    from stillroom.pipeline.config import Source, Teacher
    from stillroom.pipeline.corpus.opening import check_there
    from stillroom.pipeline.teacher.facts import model_directory, model_shape

    _check(student)
    name = Path(data.rstrip("/")).name.split(".")[0].strip("*") or "first"
    target = to or Path(f"{name}.toml")
    if target.exists():
        raise ConfigError(
            "is there already", where=str(target), remedy="Name another file with --to."
        )
    model = Teacher(model=teacher).named_by("--teacher")
    check_there(Source(name="data", path=data))
    model_directory(model)
    from stillroom.pipeline.beginning.choices import choose
    from stillroom.pipeline.beginning.run_text import run_text, wish
    from stillroom.pipeline.beginning.sampling import sample
    from stillroom.pipeline.beginning.trial import speeds

    found, wished = sample(data, model), wish(student, model_shape(model).num_layers)
    say("trying how fast passes and steps are here ...")
    made = choose(found, model, wished.kept, speeds(model), wished.leave_out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(run_text(name, data, teacher, wished, found, made))
    if as_json:
        sizes = {"documents": found.documents, "tokens": found.tokens, "whole": found.whole}
        costs = {"minutes": made.minutes, "megabytes": made.megabytes, "fits": made.fits}
        chosen = {"steps": made.steps, "batch_tokens": made.batch_tokens, "epochs": made.epochs}
        rejected = {"rejected": found.rejected}
        document({"run": str(target)} | sizes | rejected | chosen | costs | {"tried": made.tried})
        return
    _tell(found, made, wished, target)


def _check(student: str) -> None:
    """Refuse a student that cannot be there, now and not after the capture."""
    path = Path(student)
    hub_id = student.count("/") == 1 and not student.startswith((".", "/", "~"))
    named = path.is_file() if path.suffix == ".json" else path.is_dir() or hub_id
    if student not in ("third", "half") and not named:
        raise ConfigError(f"'{student}' is not there", expected=STUDENTS, where="--student")


def _tell(found, made, wished, target: Path) -> None:
    for line in found.said:
        say(f"data: {line}")
    more = "" if found.whole else " (the first of them; for all, count on as many times more)"
    say(f"data: {found.documents:,} documents, {found.tokens:,} tokens{more}")
    middle, last = found.share(0.5), found.lengths[-1]
    say(f"lengths: half of the examples have up to {middle:,} tokens, the longest {last:,}")
    if made.cut:
        say(
            f"window: {made.window:,} tokens; {made.cut:.1%} of the examples are longer and are cut"
        )
    _warn(found, made, target)
    what = {
        "capture": f"{made.megabytes:,.1f} MB",
        "student": f"{wished.leave_out} blocks go, found by trying",
        "train": f"{made.steps:,} steps, {made.epochs:.1f} epochs",
    }
    rows = [
        [f"stillroom {stage} {target}", _about(minutes), what.get(stage, "")]
        for stage, minutes in made.minutes.items()
    ]
    how = "as passes and steps go that were tried" if made.tried else "reckoned, nothing was tried"
    table(f"what comes next, and about how long here ({how})", ["", "", ""], rows)
    if sum(made.minutes.values()) > LONG:
        say(f"shorter, in {target}: fewer steps; keep_layers in place of leave_out")
    say(f"all at once: stillroom run {target}")
    put(target)


def _warn(found, made, target: Path) -> None:
    """Of what `prepare` stops at, of few data and of scarce memory."""
    from stillroom.pipeline.beginning.choices import MANY_EPOCHS
    from stillroom.pipeline.corpus.rejects import NAMED

    for line in found.rejected[:NAMED]:
        warn(f"warning: {line}")
    if found.rejected:
        warn(
            f"warning: `stillroom prepare {target}` stops at rows that cannot be used "
            f'({len(found.rejected):,}): mend them, or set on_error = "skip" under [prepare]'
        )
    if found.whole and made.epochs > MANY_EPOCHS:
        warn(
            f"warning: few data: {made.steps:,} steps read them {made.epochs:.1f} times over, and "
            "a student learns them by heart; more text is worth more than more steps"
        )
    if not made.fits:
        warn("warning: training needs more memory than is free; see [train.lora], [train] parallel")


def _about(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    return f"{minutes:,.0f} min" if minutes < UP_TO_A_DAY else f"{minutes / 60 / 24:,.1f} days"
