"""`stillroom ask`: what the teacher and its students answer to a prompt."""

from typing import Annotated

import typer

from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import document, progress, put


def ask(
    run_file: RunFile,
    prompts: Annotated[list[str], typer.Argument(help="What a user says.", metavar="PROMPT...")],
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 48,
    plain: Annotated[
        bool, typer.Option(help="Continue the prompt as a text, without the chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answers of the teacher and of every student that `evaluate` measures, the most probable token
    each time; also kept in `answers.json`."""
    import json

    from stillroom.pipeline import config
    from stillroom.pipeline.evaluation.students import students_of

    run = config.load(run_file)
    teacher = config.require(run.teacher, "teacher", str(run_file))
    students = students_of(run)
    from stillroom.pipeline.evaluation.asking import ask as answers
    from stillroom.pipeline.whole_text import write_whole

    with progress("ask", "models") as report:
        said = answers(teacher, students, prompts, tokens, plain, report)
    found = {"prompts": prompts, "answers": said}
    write_whole(run.path("answers.json"), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        document(found)
        return
    for line in in_lines(found):
        put(line)


def in_lines(found: dict) -> list[str]:
    """Answers by prompt, as a person reads them."""
    lines = []
    for number, prompt in enumerate(found["prompts"]):
        lines.append(f"> {prompt}")
        for label, said in found["answers"].items():
            lines.append(f"  {label}: {' '.join(said[number].split())}")
    return lines
