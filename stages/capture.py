"""`stillroom capture`: run the teacher once and keep what it says."""

import time
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom.stages.arguments import (
    AsJson,
    Engine,
    EngineChoice,
    Rank,
    RunFile,
    WorldSize,
    check_worker,
)
from stillroom.stages.console import document, progress, put, say, table, warn

if TYPE_CHECKING:
    from stillroom.pipeline.capture.progress import CaptureProgress

Numbers = Callable[["CaptureProgress"], dict[str, float]]


class OnError(StrEnum):
    """What happens to an example that the teacher cannot answer."""

    stop = "stop"
    quarantine = "quarantine"


class Split(StrEnum):
    """Which part of the corpus; a recommender's is `test`, which `heldout` means too."""

    train = "train"
    heldout = "heldout"
    test = "test"


def capture(
    run_file: RunFile,
    engine: EngineChoice = Engine.vllm,
    rank: Rank = 0,
    world_size: WorldSize = 1,
    on_error: Annotated[OnError, typer.Option(help="A bad example: stop, or set it aside.")] = (
        OnError.stop
    ),
    split: Annotated[
        Split, typer.Option(help="Which part of the corpus; test: of a recommender's.")
    ] = Split.train,
    cache: Annotated[
        str, typer.Option(help="Directory or URL of the cache; by default inside the run.")
    ] = "",
    ray: Annotated[bool, typer.Option(help="Use every node of a Ray cluster.")] = False,
    ray_address: Annotated[
        str, typer.Option(help="Of the cluster; by default RAY_ADDRESS, or one on this machine.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Score a sample and print the cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score the prepared corpus and seal the cache; run again to go on after any interruption."""
    from stillroom.cache_schemas.errors import ConfigError
    from stillroom.pipeline import config

    run = config.load(run_file)
    check_worker(rank, world_size)
    _check_estimate(run, dry_run)
    part = _part(run, split)
    from stillroom.pipeline.objectives.names import check_names

    check_names(run)
    if dry_run:
        _dry_run(run, engine.value, part, as_json)
        return
    worker: dict[str, Any] = {"rank": rank, "world_size": world_size, "on_error": on_error.value}
    if ray or ray_address:
        worker["address"] = ray_address
    wanted = {"images": run.vision, "items": run.items, "candidates": run.candidates}
    if cache and run.capture is None and any(wanted.values()):
        raise ConfigError(
            f"--cache {cache} of a run without [capture]",
            expected="the option left out: only answers to texts can be put elsewhere",
            remedy="Copy the caches with `stillroom cache push`.",
        )
    if run.capture is not None or not any(wanted.values()):  # another table alone means it alone
        where = {"engine": engine.value, "split": part, "location": cache}
        _capture(run, **where, **worker)
    for about, asked in wanted.items():
        if asked is not None:
            _capture_more(run, about, engine.value, part, **worker)


def _part(run, split: Split) -> str:
    """The corpus's own name of a split."""
    from stillroom.cache_schemas.errors import ConfigError

    if split is not Split.test:
        return split.value
    if run.items is None and run.candidates is None:
        raise ConfigError(
            "--split test of a run without [items] and [candidates]",
            expected="train or heldout",
            where=run.name,
            remedy="Text that no step trains on is --split heldout.",
        )
    return "heldout"


def _check_estimate(run, dry_run: bool) -> None:
    """Refuse an estimate of what is not estimated.

    Raises:
        ConfigError: there is an option too many.
    """
    from stillroom.cache_schemas.errors import ConfigError

    named = [f"[{name}]" for name in ("items", "candidates") if getattr(run, name) is not None]
    if named and dry_run:
        raise ConfigError(
            f"--dry-run of {' and '.join(named)}",
            expected="[capture]: only answers to texts are estimated",
            where=run.name,
            remedy="Leave --dry-run out; runbooks/32-demo-recsys.md says what items and histories "
            "cost, and a capture that is stopped goes on where it was.",
        )


def _capture(run, **options) -> None:
    from stillroom.pipeline import config, provenance
    from stillroom.pipeline.capture.cluster import capture_on_ray
    from stillroom.pipeline.capture.job import capture as score

    title = f"capture {options['rank']}" if options["world_size"] > 1 else "capture"
    if "address" in options:  # with --ray only
        score, title = capture_on_ray, "capture on Ray"
        _alone(options.pop("rank"), options.pop("world_size"))
    manifest = _watched(score, run, title, "examples", _token_numbers, **options)
    config.dump(run, run.path("capture.config.json"))
    provenance.record(run.path("run.json"), "capture")
    if manifest is None:
        say("this worker's shards are done; the last worker to finish seals the cache")
        return
    put(options["location"] or str(run.path("cache")))


def _watched(score, run, title: str, unit: str, numbers: Numbers, **options):
    """The manifest of a capture, or None while shards are missing; its progress is shown."""
    steps = Steps(title)
    with progress(title, unit) as report:

        def show(now: "CaptureProgress") -> None:
            steps(now.doing)
            report(now.examples, now.total_examples, **numbers(now))

        return score(run, on_progress=show, **options)


def _token_numbers(now: "CaptureProgress") -> dict[str, float]:
    return {
        "tok_per_s": now.tokens_per_second,
        "bytes_per_token": now.bytes_per_token,
        "mass": now.retained_mass,
        "entropy": now.entropy,
    }


def _numbers_each(now: "CaptureProgress") -> dict[str, float]:
    """What one image, item or history weighs in the shards committed, as `cache ls` counts it."""
    return {"bytes_each": now.bytes / max(now.committed_examples, 1)}


class Steps:
    """Says what a worker is at whenever that changes, and how long the step before took."""

    def __init__(self, title: str):
        self._title, self._doing, self._began = title, "", time.monotonic()

    def __call__(self, doing: str) -> None:
        if not doing or doing == self._doing:
            return
        before, passed = self._doing, time.monotonic() - self._began
        after = f" ({before}: {passed:.0f} s)" if before else ""
        say(f"{self._title}: {doing}{after}")
        self._doing, self._began = doing, time.monotonic()


def _alone(rank: int, world_size: int) -> None:
    """Ray hands out the shards itself."""
    from stillroom.cache_schemas.errors import ConfigError

    if (rank, world_size) != (0, 1):
        raise ConfigError("--rank and --world-size mean nothing with --ray", remedy="Drop them.")


UNITS = {"images": "images", "items": "items", "candidates": "histories"}
TITLES = {"images": "vision targets", "items": "item embeddings", "candidates": "candidates"}


def _capture_more(run, about: str, engine: str, split: str, **worker) -> None:
    """What has a cache of its own beside the texts': images, items, candidates."""
    from stillroom.pipeline import provenance
    from stillroom.pipeline.capture.candidates import capture_candidates, default_location
    from stillroom.pipeline.capture.cluster import capture_on_ray
    from stillroom.pipeline.capture.images import capture_images
    from stillroom.pipeline.capture.items import capture_items

    scores: Any = {
        "images": (capture_images, {}),
        "items": (capture_items, {"engine": engine}),
        "candidates": (capture_candidates, {"engine": engine, "split": split}),
    }
    (score, options), title = scores[about], TITLES[about]
    options = options | worker
    if "address" in worker:
        score, options = capture_on_ray, options | {"about": about}
        _alone(options.pop("rank"), options.pop("world_size"))
    manifest = _watched(score, run, title, UNITS[about], _numbers_each, **options)
    provenance.record(run.path("run.json"), "vision" if about == "images" else about)
    if manifest is None:
        say(f"this worker's shards are done; the last worker to finish seals the {title}")
        return
    kept = {"images": run.path("vision"), "items": run.path("items")}
    where = str(kept.get(about) or default_location(run, split))
    if about == "candidates":
        _tell_empty(where)
    put(where)


def _tell_empty(where: str) -> None:
    """A list without an item counts as a history that was asked about, and teaches nothing."""
    from stillroom.pipeline.cache.care.empty_lists import empty_lists
    from stillroom.pipeline.cache.reader import TeacherCache

    found = empty_lists(TeacherCache.open(where))
    if found is not None and found.words:
        warn(f"warning: {found.words}")


def _dry_run(run, engine: str, split: str, as_json: bool) -> None:
    from stillroom.pipeline.capture.cost import estimate

    cost = estimate(run, engine=engine, split=split)  # type: ignore[arg-type]
    if as_json:
        document(asdict(cost) | {"hours": cost.hours, "gigabytes": cost.gigabytes})
        return
    rows = [
        ["examples", f"{cost.examples:,}"],
        ["tokens", f"{cost.tokens:,}"],
        ["requests", f"{cost.examples:,}"],
        ["tokens/s", f"{cost.tokens_per_second:,.0f}"],
        ["hours on one engine", f"{cost.hours:.2f}"],
        ["bytes/token", f"{cost.bytes_per_token:.1f}"],
        ["disk, GB", f"{cost.gigabytes:.3f}"],
    ]
    table(f"estimate from {cost.sampled} examples", ["", "value"], rows)
