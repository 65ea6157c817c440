"""Several students off one cache: what differs between them, their training, their comparison.

One idea: an arm is the base run with some tables changed and a directory of its own under the
base run's; each is an ordinary run, so a sweep that was stopped goes on arm by arm.
"""

import json
import multiprocessing
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline import config
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.strict import Table, validate
from stillroom.pipeline.training.checkpoint import write_durably
from stillroom.pipeline.training.interactions import OWN_CACHES
from stillroom.pipeline.training.opening import train
from stillroom.pipeline.training.trainer import Progress, TrainResult

RESULT = "sweep.json"


class Arm(Table):
    """One student of a sweep; each table is laid over the base run's."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    objective: tuple[dict[str, Any], ...] = ()
    """In place of all of the base run's objectives; empty keeps them."""
    train: dict[str, Any] = Field(default_factory=dict)
    student: dict[str, Any] = Field(default_factory=dict)
    recommender: dict[str, Any] = Field(default_factory=dict)


class Sweep(Table):
    """A sweep's TOML file."""

    base: str
    """The base run's TOML file, relative to this one."""
    side_by_side: int = Field(default=1, ge=1)
    """Arms that train at the same time, each in a process of its own."""
    arm: tuple[Arm, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Arms done, arms in all, the arm that is meant, and its newest step where it is known."""

    done: int
    total: int
    arm: str
    step: Progress | None = None


def load(path: str | Path) -> tuple[Sweep, Run, dict[str, Run]]:
    """Read a sweep: its settings, the base run, and arm name -> run.

    Raises:
        ConfigError: a key that is not allowed, or two arms of one name.
    """
    path = Path(path)
    sweep = validate(Sweep, _read(path), str(path))
    base = path.parent / sweep.base
    document, run = _read(base), config.load(base)
    arms = {arm.name: _arm_run(arm, document, run, str(path)) for arm in sweep.arm}
    if len(arms) < len(sweep.arm):
        raise ConfigError("two arms have one name", where=str(path))
    return sweep, run, arms


def run_sweep(
    path: str | Path,
    on_progress: Callable[[SweepProgress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, TrainResult]:
    """Train every arm that is not trained yet, and write `sweep.json`.

    Raises:
        Interrupted: asked to stop; the same call goes on.
    """
    sweep, base, arms = load(path)
    if sweep.side_by_side == 1:
        results = _one_by_one(arms, on_progress, stop)
    else:
        results = _side_by_side(sweep.side_by_side, arms, on_progress)
    facts = {name: asdict(result) for name, result in results.items()}
    base.path().mkdir(parents=True, exist_ok=True)
    write_durably(base.path(RESULT), json.dumps(facts, indent=2) + "\n")
    return results


def _one_by_one(arms: dict[str, Run], on_progress, stop) -> dict[str, TrainResult]:
    results = {}
    for number, (name, run) in enumerate(arms.items()):

        def show(step: Progress, number: int = number, name: str = name) -> None:
            on_progress(SweepProgress(number, len(arms), name, step))

        results[name] = train(run, on_progress=show, stop=stop)
        on_progress(SweepProgress(number + 1, len(arms), name))
    return results


def _side_by_side(count: int, arms: dict[str, Run], on_progress) -> dict[str, TrainResult]:
    fresh = multiprocessing.get_context("spawn")
    results = {}
    with ProcessPoolExecutor(count, mp_context=fresh) as pool:
        running = {name: pool.submit(train, run) for name, run in arms.items()}
        for name, future in running.items():
            results[name] = future.result()
            on_progress(SweepProgress(len(results), len(arms), name))
    return results


def _arm_run(arm: Arm, document: dict[str, Any], base: Run, where: str) -> Run:
    changed = dict(document)
    changed["name"] = arm.name
    changed["directory"] = str(base.path("sweep", arm.name))
    cache = document.get("train", {}).get("cache") or str(base.path("cache"))
    changed["train"] = document.get("train", {}) | {"cache": cache} | arm.train
    changed["student"] = document.get("student", {}) | arm.student
    if base.recommender is not None:
        changed["recommender"] = document["recommender"] | arm.recommender
        changed["train"] = {"corpus": str(base.path("corpus"))} | changed["train"]
        own = {n: str(base.path(n)) for n in OWN_CACHES if base.path(n, "manifest.json").exists()}
        changed["train"]["caches"] = own | changed["train"].get("caches", {})
    if arm.objective:
        changed["objective"] = list(arm.objective)
    return config.parse(changed, f"{where} arm '{arm.name}'")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy="Check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"is not TOML: {error}", where=str(path)) from None
