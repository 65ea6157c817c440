"""`stillroom run`: every stage that a run file names, in order, going on where it stopped.

One idea: a table in the file asks for its stage, and a stage that was finished sees that by itself
and does nothing; so the whole is only the list of commands that a person would type.
"""

from typing import TYPE_CHECKING

from stillroom.stages.arguments import Engine, EngineChoice, RunFile
from stillroom.stages.stage_process import perform

if TYPE_CHECKING:
    from stillroom.pipeline.config import Run


def whole_run(run_file: RunFile, engine: EngineChoice = Engine.vllm) -> None:
    """Do all stages that the tables of a run ask for; run again to go on after any interruption."""
    from stillroom.pipeline import config

    for command in commands(config.load(run_file), str(run_file), engine.value):
        perform(command)


def commands(run: "Run", name: str, engine: str = Engine.vllm.value) -> list[list[str]]:
    """What a person would type after `stillroom`, stage by stage."""
    found = up_to_the_cache(run, name, engine)
    if run.train is not None:
        if run.student is not None and run.student.leave_out:
            found.append(["student", name])  # measures for minutes, under its own progress
        found.append(["train", name])
        # A recommender's test rows are the last of every user, whatever [prepare] heldout says.
        if run.recommender or run.prepare is None or run.prepare.heldout > 0:
            found.append(["evaluate", name])
    return found


def up_to_the_cache(run: "Run", name: str, engine: str) -> list[list[str]]:
    """The commands of the corpus and of all that is captured of it."""
    found = []
    if run.prepare is not None:
        found.append(["generate" if run.generate else "prepare", name])
    if any((run.capture, run.vision, run.items, run.candidates)):
        found.append(["capture", name, "--engine", engine])
        found += [[*found[-1], "--split", *more] for more in _second(run)]
    return found


def _second(run: "Run") -> list[list[str]]:
    """Arguments of a second capture, of text that no step trains on, where something reads it."""
    if run.candidates is not None:
        return [["test"]]
    if run.capture is not None and run.train is not None and run.train.heldout_cache:
        return [["heldout", "--cache", run.train.heldout_cache]]
    return []
