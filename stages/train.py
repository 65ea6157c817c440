"""`stillroom train`: a student from a cache; `stillroom student`: only its first weights."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from stages.console import out, progress, say

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]


def train(run_file: RunFile) -> None:
    """Train the student of a run, or go on where it stopped.

    Under torchrun every process runs this command; the main one speaks.
    """
    from pipeline import config, provenance
    from pipeline.curves import draw_curves
    from pipeline.trainer import Progress
    from pipeline.trainer import train as train_student

    run = config.load(run_file)
    settings = config.require(run.train, "train", str(run_file))
    warned: set[str] = set()
    with progress("train", "steps") as report, stop_on_signals() as stop:

        def show(now: Progress) -> None:
            more = {f"held-out {label}": value for label, value in now.heldout.items()}
            numbers = {"loss": now.loss, "tok_per_s": now.tokens_per_second}
            report(now.step, settings.steps, **numbers, **more)
            for warning in set(now.warnings) - warned:
                warned.add(warning)
                say(f"warning: {warning}")

        result = train_student(run, on_progress=show, stop=stop)
    if not is_main_process():
        return
    config.dump(run, run.path("train.config.json"))
    provenance.record(run.path("run.json"), "train")
    draw_curves({run.name: run.path()}, run.path("curves.png"))
    if not result.seconds:
        say(f"already trained: {result.steps} steps")
    out.print(result.student)


def student(run_file: RunFile) -> None:
    """Make the untrained student, so that training never needs the teacher."""
    from pipeline import config
    from pipeline.student import initial_student

    run = config.load(run_file)
    settings = config.require(run.student, "student", str(run_file))
    made = initial_student(settings, run.teacher, run.path("student-initial"))
    out.print(str(made))


def is_main_process() -> bool:
    """True unless torchrun started this process as another than the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and the first Ctrl-C ask for a checkpoint; a second Ctrl-C interrupts."""
    asked: list[int] = []

    def ask(number: int, _frame) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after this step; a checkpoint is kept")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
