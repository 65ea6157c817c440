"""Several students off one cache: what differs between them, their training, their comparison.

One idea: an arm is the base run with some tables changed and a directory of its own under the
base run's; each is an ordinary run, so a sweep that was stopped goes on arm by arm. Under torchrun
every process goes through the arms, which all ranks train together; the main one writes and speaks.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import EXIT_INCOMPLETE, ConfigError, StillroomError
from stillroom.pipeline import config
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import OWN_CACHES
from stillroom.pipeline.config.run_file import read_toml
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.config.sweep import Arm, Sweep
from stillroom.pipeline.parent_process import end_with_pool
from stillroom.pipeline.peers import is_main_process, processes
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.opening import train
from stillroom.pipeline.training.parallel import ALONE, Parallel
from stillroom.pipeline.training.result import TrainResult
from stillroom.pipeline.training.run import corpus_of
from stillroom.pipeline.training.said import check_own_capture, is_own_cache
from stillroom.pipeline.training.stepping import Progress
from stillroom.pipeline.training.trainer import Interrupted

RESULT = "sweep.json"


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Arms done, arms in all, the arm that is meant, and its newest step where it is known."""

    done: int
    total: int
    arm: str
    step: Progress | None = None


@dataclass(frozen=True, slots=True)
class FailedArm:
    """An arm that could not be trained, and why."""

    failed: str


class SweepIncomplete(StillroomError):
    """Some arms could not be trained; the same call tries them again."""

    exit_code = EXIT_INCOMPLETE


def load(path: str | Path) -> tuple[Sweep, Run, dict[str, Run]]:
    """Read a sweep: its settings, the base run, and arm name -> run.

    Raises:
        ConfigError: a key that is not allowed, or two arms of one name.
    """
    path = Path(path)
    found = read_toml(path)
    if {"base", "arm"}.isdisjoint(found):
        raise ConfigError(
            "names no base run and no arm",
            expected='a sweep file: base = "run.toml", and an [[arm]] for each student',
            where=str(path),
            remedy="Train one run without --sweep.",
        )
    sweep = validate(Sweep, found, str(path))
    base = path.parent / sweep.base
    document, run = read_toml(base), config.load(base)
    arms = {arm.name: _arm_run(arm, document, run, str(path)) for arm in sweep.arm}
    if len(arms) < len(sweep.arm):
        raise ConfigError("two arms have one name", where=str(path))
    return sweep, run, arms


def run_sweep(
    path: str | Path,
    on_progress: Callable[[SweepProgress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, "TrainResult | FailedArm"]:
    """Train every arm that is not trained yet, and write `sweep.json`.

    An arm that cannot be trained is told in its place, and the others are trained.

    Args:
        path: of the sweep file.
        on_progress: called in the main process.
        stop: asked between steps.

    Raises:
        ConfigError: arms side by side, in one of several processes that train together.
        Interrupted: asked to stop; the same call goes on.
        PlanMismatch: the base run's own cache is not what its [capture] says.
    """
    sweep, base, arms = load(path)
    _check_alone(sweep, str(path))
    if any(run.train and is_own_cache(base, run.train.cache) for run in arms.values()):
        check_own_capture(base)
    trainings = {name: _training(base, run) for name, run in arms.items()}
    if sweep.side_by_side == 1:
        with _one_group():
            results = _one_by_one(trainings, _said_once(on_progress), stop)
    else:
        results = _side_by_side(sweep.side_by_side, trainings, on_progress)
    if is_main_process():
        facts = {name: asdict(result) for name, result in results.items()}
        base.path().mkdir(parents=True, exist_ok=True)
        write_durably(base.path(RESULT), json.dumps(facts, indent=2) + "\n")
    return results


def _check_alone(sweep: Sweep, where: str) -> None:
    """Refuse several arms at a time where torchrun has given this process one meeting place."""
    if sweep.side_by_side > 1 and processes() > 1:
        raise ConfigError(
            f"side_by_side = {sweep.side_by_side} in {processes()} processes of torchrun, which "
            "train one arm together",
            expected="side_by_side = 1",
            where=where,
            remedy="Set side_by_side = 1; or start without torchrun, where each arm has a process "
            "of its own.",
        )


@contextmanager
def _one_group() -> Iterator[None]:
    """Within it the ranks stay together from arm to arm: one that left with a refused arm would cut
    off those that have yet to hear of it."""
    parallel = Parallel.start() if processes() > 1 else ALONE
    try:
        yield
        parallel.barrier()
    finally:
        parallel.close()


def _said_once(on_progress: Callable[[SweepProgress], None]) -> Callable[[SweepProgress], None]:
    return on_progress if is_main_process() else lambda _: None


def _training(base: Run, run: Run) -> Callable[..., TrainResult]:
    """Training of an arm. One that measures which blocks to leave out of the same model on the same
    text keeps its passes with the base run's, so that they are measured once for all."""
    return partial(train, run, blocks_measured=base.path() if _measures_as(base, run) else None)


def _measures_as(base: Run, run: Run) -> bool:
    ours, theirs = run.student, base.student
    if ours is None or theirs is None or corpus_of(run) != corpus_of(base):
        return False
    return (ours.model, ours.leave_out_tokens) == (theirs.model, theirs.leave_out_tokens)


def attempt(train_arm: Callable[[], TrainResult]) -> TrainResult | FailedArm:
    """An arm's result, or why it has none; only a wish to stop is passed on, and among several
    processes what may be the trouble of one, in which the others would wait for it."""
    try:
        return train_arm()
    except Interrupted:
        raise
    except StillroomError as error:
        return FailedArm(str(error))
    except Exception as error:
        if processes() > 1:
            raise
        return FailedArm(f"{type(error).__name__}: {error}")


def _one_by_one(
    arms: dict[str, Callable[..., TrainResult]], on_progress, stop
) -> dict[str, TrainResult | FailedArm]:
    results = {}
    for number, (name, training) in enumerate(arms.items()):

        def show(step: Progress, number: int = number, name: str = name) -> None:
            on_progress(SweepProgress(number, len(arms), name, step))

        results[name] = attempt(partial(training, on_progress=show, stop=stop))
        on_progress(SweepProgress(number + 1, len(arms), name))
    return results


def _side_by_side(count: int, arms: dict[str, Callable[..., TrainResult]], on_progress):
    results = {}
    with ThreadPoolExecutor(count) as pool:
        running = {name: pool.submit(_in_a_process, one) for name, one in arms.items()}
        for name, future in running.items():
            results[name] = attempt(future.result)
            on_progress(SweepProgress(len(results), len(arms), name))
    return results


def _in_a_process(training: Callable[..., TrainResult]) -> TrainResult:
    """Train in a process of its own, so that one that is killed takes no other with it."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, initializer=end_with_pool) as own:
        return own.submit(training).result()


def _arm_run(arm: Arm, document: dict[str, Any], base: Run, where: str) -> Run:
    changed = dict(document)
    changed["name"] = arm.name
    changed["directory"] = str(base.path("sweep", arm.name))
    shared = document.get("train", {})
    cache = shared.get("cache") or str(base.path("cache"))
    read = {"cache": cache, "corpus": str(corpus_of(base))}
    changed["train"] = shared | read | arm.train
    changed["student"] = document.get("student", {}) | arm.student
    if base.recommender is not None:
        changed["recommender"] = document["recommender"] | arm.recommender
        own = {n: str(base.path(n)) for n in OWN_CACHES if base.path(n, "manifest.json").exists()}
        changed["train"]["caches"] = own | changed["train"].get("caches", {})
    if arm.objective:
        changed["objective"] = list(arm.objective)
    return config.parse(changed, f"{where} arm '{arm.name}'")
