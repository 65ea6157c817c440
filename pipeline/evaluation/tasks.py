"""Benchmarks that people know, through lm-evaluation-harness: teacher and students in one table.

One idea: the harness is given the very models that everything else here measures, one at a time,
and its figures are kept with their standard errors as it gives them. A task is a name that it
knows, or a YAML file of the harness's own form; such a file may run code and is read first.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from stillroom.cache_schemas.errors import ConfigError, StillroomError, first_line
from stillroom.cache_schemas.extras import extra_package
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.tokenizer import load_tokenizer
from stillroom.pipeline.evaluation.compared import STUDENT, compared, loaded
from stillroom.pipeline.training.card import add_results, hub_id
from stillroom.pipeline.training.checkpoint import write_durably

RESULT = "tasks.json"
ENTRIES = ".eval_results/stillroom.yaml"
"""In the student's directory: the hub's own form of results on data sets of the hub."""
BATCH = 8


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of one task.

    Attributes:
        task: as the harness calls it.
        measure: such as `acc_norm`.
        value: as the harness gives it.
        standard_error: over the task's questions; None where the harness has none.
        dataset: the hub id of its questions; empty for files.
        shots: solved examples in front of a question.
    """

    task: str
    measure: str
    value: float
    standard_error: float | None
    dataset: str
    shots: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Which tasks, and how.

    Attributes:
        tasks: names, or YAML files.
        shots: solved examples in front; None takes the task's own.
        limit: questions of a task, at most; 0 takes all.
        chat: ask in the chat template.
    """

    tasks: tuple[str, ...]
    shots: int | None = None
    limit: int = 0
    chat: bool = False


def measure_tasks(
    run: Run, asked: Asked, on_model: Callable[[str], None] = lambda _: None
) -> dict[str, list[Figure]]:
    """Ask the teacher and every student, keep `tasks.json`, and tell the student's card.

    Args:
        run: whose teacher, student and `[evaluate] students` are asked.
        asked: what.
        on_model: called with the label of each before it is asked.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        StudentError: a student is not there.
    """
    if not asked.tasks:
        raise ConfigError("no task is named", where="--tasks", remedy="Name one or more.")
    manager = _manager(asked.tasks)
    _check_names(asked.tasks, manager)
    if files := [name for name in asked.tasks if _is_file(name)]:
        with _told(asked):
            manager.load(files)  # before a model is
    found, models = {}, compared(run)
    for label, model in loaded(models):
        on_model(label)
        tokenizer = load_tokenizer(models[label].adapter or models[label].model)
        found[label] = _ask(model, tokenizer, asked, manager)
    told = {label: [asdict(one) for one in figures] for label, figures in found.items()}
    facts = {"models": told, "asked": asdict(asked), "lm_eval": version("lm_eval")}
    write_durably(run.path(RESULT), json.dumps(facts, indent=2) + "\n")
    if STUDENT in found:
        _tell_card(run, found[STUDENT], asked)
    return found


def _manager(tasks: Sequence[str]) -> Any:
    """What knows the harness's tasks; thousands of files are not looked at where none is asked."""
    harness = extra_package("lm_eval.tasks", "eval", "--tasks")
    return harness.TaskManager(include_defaults=not all(map(_is_file, tasks)))


def _is_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    for name in tasks:
        is_file = _is_file(name)
        if Path(name).is_file() if is_file else manager.match_tasks([name]):
            continue
        raise ConfigError(
            f"no task '{name}'",
            expected="the name of a task of lm-evaluation-harness, or a YAML file of one",
            where="--tasks",
            remedy="" if is_file else nearest(name, manager.all_tasks),
        )


def _ask(model: Any, tokenizer: Any, asked: Asked, manager: Any) -> list[Figure]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Both are wrapped by decorators that hide what they take.
    read_by, ask = cast(Any, HFLM), cast(Any, simple_evaluate)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = read_by(pretrained=model.to(device), tokenizer=tokenizer, batch_size=BATCH)
    with _told(asked), _unnamed_commit():
        found = ask(
            reader,
            tasks=list(asked.tasks),
            num_fewshot=asked.shots,
            limit=asked.limit or None,
            apply_chat_template=asked.chat,
            task_manager=manager,
            log_samples=False,
        )
    assert found is not None
    return list(_figures(found))


@contextmanager
def _unnamed_commit() -> Iterator[None]:
    """The harness asks git which commit the working directory is at, which nothing here is, and git
    says on stderr where there is none."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


@contextmanager
def _told(asked: Asked) -> Iterator[None]:
    """Whatever a task's file, data, code or template makes the harness raise, as one message."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        ours = all(map(_is_file, asked.tasks)) and not isinstance(error, ConnectionError)
        raise ConfigError(
            f"the harness stopped ({type(error).__name__}: {first_line(error)})",
            where=f"--tasks {','.join(asked.tasks)}",
            remedy="Mend the task's file or its questions; --shots wants as many of them."
            if ours
            else "Questions of the hub must be here already, or HF_HUB_OFFLINE be unset.",
        ) from None


def _figures(found: Mapping[str, Any]):
    for task, told in found["results"].items():
        config = found.get("configs", {}).get(task, {})
        for key, value in told.items():
            measure, _, kind = key.partition(",")
            if not kind or measure.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = told.get(f"{measure}_stderr,{kind}")
            named = measure if kind == "none" else f"{measure} ({kind})"
            spread = float(error) if isinstance(error, int | float) else None
            shots = int(found.get("n-shot", {}).get(task) or 0)
            dataset = hub_id(str(config.get("dataset_path") or ""))
            yield Figure(task, named, float(value), spread, dataset, shots)


def _tell_card(run: Run, figures: Sequence[Figure], asked: Asked) -> None:
    """Into the student's README, and what is about data sets of the hub into `.eval_results`."""
    import yaml
    from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

    results, entries = [], []
    how = f"lm-evaluation-harness {version('lm_eval')}"
    some = f", first {asked.limit} questions" if asked.limit else ""
    how += some
    for one in figures:
        spread = "" if one.standard_error is None else f" ± {one.standard_error:.4f}"
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=one.dataset or "local",
                dataset_name=one.task,
                dataset_config=one.task,  # the hub tells results apart by type and config
                metric_type=one.measure,
                metric_name=f"{one.measure}{spread}, {one.shots}-shot{some}",
                metric_value=round(one.value, 6),
            )
        )
        if one.dataset:
            notes = f"{one.measure}{spread}, {one.shots}-shot, {how}"
            when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            entries.append(
                EvalResultEntry(one.dataset, one.task, round(one.value, 6), date=when, notes=notes)
            )
    add_results(run, results)
    if entries:
        path = run.path("student", ENTRIES)
        path.parent.mkdir(exist_ok=True)
        told = _with_others(path, eval_result_entries_to_yaml(entries))
        write_durably(path, yaml.safe_dump(told, sort_keys=False))


def _with_others(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries, behind those of other tasks that were measured before."""
    import yaml

    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    anew = [one["dataset"] for one in entries]
    return [one for one in before if one["dataset"] not in anew] + entries
