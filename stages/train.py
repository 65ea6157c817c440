"""`stillroom train`: a student from a cache; `stillroom student`: only its first weights."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.pipeline.peers import is_main_process
from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import document, progress, put, say, table, warn

if TYPE_CHECKING:
    from stillroom.pipeline.config import Run


def train(
    run_file: RunFile,
    sweep: Annotated[bool, typer.Option(help="The file is a sweep: several students.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the student of a run, or go on where it stopped.

    Under torchrun every process runs this command; the main one speaks.
    """
    if sweep:
        _sweep(run_file, as_json)
        return
    from stillroom.pipeline import config, provenance

    run = config.load(run_file)
    settings = config.require(run.train, "train", str(run_file))
    from stillroom.pipeline.training.curves import draw_curves
    from stillroom.pipeline.training.opening import train as train_student
    from stillroom.pipeline.training.stepping import Progress

    warned: set[str] = set()
    with progress("train", "steps") as report, stop_on_signals() as stop:

        def show(now: Progress) -> None:
            more = {f"{now.measured_on} {label}": value for label, value in now.heldout.items()}
            numbers = {"loss": now.loss, "tok_per_s": now.tokens_per_second}
            report(now.step, settings.steps, **numbers, **more)
            for warning in set(now.warnings) - warned:
                warned.add(warning)
                warn(f"warning: {warning}")

        result = train_student(run, on_progress=show, stop=stop, on_note=say)
    if not is_main_process():
        return
    config.dump(run, run.path("train.config.json"))
    provenance.record(run.path("run.json"), "train")
    draw_curves({run.name: run.path()}, run.path("curves.png"))
    if not result.seconds:
        say(f"already trained: {result.steps} steps")
    put(result.student)


def _sweep(sweep_file: Path, as_json: bool) -> None:
    """Train all arms, then compare them in one table and one picture, in the main process."""
    from stillroom.pipeline.config.run_file import read_toml

    read_toml(sweep_file)  # a file that is none is said before torch is imported
    from stillroom.pipeline.training import arms as trained_arms
    from stillroom.pipeline.training.curves import draw_curves

    _, base, arms = trained_arms.load(sweep_file)
    with progress("sweep", "arms") as report, stop_on_signals() as stop:

        def show(now: trained_arms.SweepProgress) -> None:
            part = now.step.step / now.step.steps if now.step else 0.0
            report(now.done + part, now.total, arm=now.arm)

        results = trained_arms.run_sweep(sweep_file, show, stop)
    if not is_main_process():
        return
    picture = draw_curves({name: run.path() for name, run in arms.items()}, base.path("sweep.png"))
    failed = {n: r.failed for n, r in results.items() if isinstance(r, trained_arms.FailedArm)}
    trained = {n: r for n, r in results.items() if not isinstance(r, trained_arms.FailedArm)}
    scores = _scores(base, {name: result.student for name, result in trained.items()})
    rows = [
        [name, f"{result.final_loss:.4f}", f"{result.tokens:,}", *scores.get(name, ["", "", ""])]
        for name, result in trained.items()
    ]
    rows += [[name, "failed", "", "", "", ""] for name in failed]
    columns = ["arm", "last loss", "tokens", "KL to teacher", "top-1 agreement", "perplexity"]
    if base.recommender is not None:
        columns = ["arm", "last loss", "histories", "validation", "weights", ""]
    if as_json:
        document([dict(zip(columns, row)) for row in rows])
    else:
        table(f"sweep of {base.name}", columns, rows)
        put(picture)
    if failed:
        reasons = "".join(f"\n- {name}: {reason}" for name, reason in failed.items())
        raise trained_arms.SweepIncomplete(
            f"{len(failed)} of {len(results)} arms failed{reasons}\n"
            "Put them right and run the same command again; the others are kept."
        )


def _scores(base: "Run", students: dict[str, str]) -> dict[str, list[str]]:
    """Held-out figures of every arm, as [evaluate] asks for them; empty where there is no teacher
    or no held-out text."""
    from stillroom.cache_schemas.errors import CorpusError
    from stillroom.pipeline.evaluation.held_out import measure_on, text_of

    if base.recommender is not None:
        return _ranking_scores(students)
    if base.teacher is None or not students:
        return {}
    try:
        corpus, examples = text_of(base)
    except CorpusError as error:
        if base.evaluate is not None:
            raise
        say(f"not measured against the teacher: {error}")
        return {}
    found = measure_on(base, corpus, examples, students)
    return {
        name: [f"{s.kl:.4f} ± {s.kl_standard_error:.4f}", f"{s.top1:.3f}", f"{s.perplexity:,.1f}"]
        for name, s in found.items()
    }


def _ranking_scores(students: dict[str, str]) -> dict[str, list[str]]:
    """The validation value each recommender was chosen by; test rows are `stillroom evaluate`'s."""
    from stillroom.pipeline.student.recommenders.export import load

    chosen = {name: load(Path(path))[1]["chosen"] for name, path in students.items()}
    return {
        name: [f"{key} {value:.4f}", f"at step {found['step']}", ""]
        for name, found in chosen.items()
        for key, value in found.items()
        if key != "step"
    }


def student(
    run_file: RunFile,
    leave_out: Annotated[
        int, typer.Option(min=0, help="Only measure which blocks the teacher misses least.")
    ] = 0,
    tokens: Annotated[
        int, typer.Option(min=2, help="Of the corpus, to measure on with --leave-out.")
    ] = 512,
    as_json: AsJson = False,
) -> None:
    """Make the untrained student, so that training never needs the teacher."""
    from stillroom.pipeline import config

    run = config.load(run_file)
    if leave_out:
        _measure_blocks(run, leave_out, tokens, as_json)
        return
    settings = config.require(run.student, "student", str(run_file))
    from stillroom.pipeline.student.choosing_blocks import FILE, with_blocks_chosen
    from stillroom.pipeline.student.model import initial_student
    from stillroom.pipeline.student.saving import RECEIPT
    from stillroom.pipeline.training.lock import exclusive
    from stillroom.pipeline.training.parallel import ALONE
    from stillroom.pipeline.training.run import corpus_of

    initial = run.path("student-initial")
    if settings.leave_out and not (initial / RECEIPT).exists():
        say(f"every pass is kept in {run.path(FILE)}; after an interruption run again to go on")
    with exclusive(run.path(), ALONE):
        with progress("measure blocks", "passes") as report:
            corpus, passes = corpus_of(run), run.path()
            chosen = with_blocks_chosen(settings, run.teacher, corpus, initial, passes, report)
        if chosen != settings:
            say(f"of the teacher's blocks: {', '.join(map(str, chosen.keep_layers))}")
        put(initial_student(chosen, run.teacher, initial))


def _measure_blocks(run: "Run", count: int, tokens: int, as_json: bool) -> None:
    """Which blocks to leave out, one at a time, and the line that says so in a run file."""
    from stillroom.pipeline import config
    from stillroom.pipeline.config.training import Student

    teacher = config.require(run.teacher, "teacher", run.name)
    from stillroom.pipeline.student.choosing_blocks import measured_blocks
    from stillroom.pipeline.training.run import corpus_of

    wished = Student(leave_out=count, leave_out_tokens=tokens)
    with progress("measure blocks", "passes") as report:
        kept, gone = measured_blocks(wished, teacher, corpus_of(run), run.path(), report)
    if as_json:
        document({"left_out": [asdict(left) for left in gone], "keep_layers": kept})
        return
    rows = [[str(left.block), f"{left.kl:.4f}"] for left in gone]
    table("left out, one after the other", ["block", "KL to the whole teacher, nats"], rows)
    put(f"keep_layers = {kept}")


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and the first Ctrl-C ask for a checkpoint; a second Ctrl-C interrupts."""
    asked: list[int] = []

    def ask(number: int, _frame) -> None:
        if asked and number == signal.SIGINT:  # the second Ctrl-C
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after this step; a checkpoint is kept")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
