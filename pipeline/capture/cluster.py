"""Capture over a Ray cluster: one engine per accelerator group, shards as work items.

One idea: Ray only says which machines are alive and carries shard numbers. Whether a shard is done
is known from the cache alone, so a worker or a node that dies costs the shards it had at hand,
which are handed out again, and a new node is put to work when it is seen. Workers share the run's
directory (or the bucket of the cache) and nothing else; the seal is the one that a single worker
would have made.
"""

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import CacheIncomplete, ConfigError, first_line
from stillroom.cache_schemas.extras import extra_package
from stillroom.cache_schemas.manifest import Manifest
from stillroom.pipeline.capture.job import OnError, Task, manifest_of
from stillroom.pipeline.capture.node import About, Problem, Worker, open_task
from stillroom.pipeline.capture.progress import CaptureProgress, Totals
from stillroom.pipeline.config import Run, Teacher, require
from stillroom.pipeline.teacher.protocol import EngineName

MOST_SHARDS_AT_HAND = 16
DEATHS_BEFORE_GIVING_UP = 3
SECONDS_BETWEEN_LOOKS = 2.0
"""At the cluster's nodes, while no worker answers."""


def capture_on_ray(
    run: Run,
    *,
    engine: EngineName = "vllm",
    address: str = "",
    on_error: OnError = "stop",
    split: str = "train",
    location: str = "",
    about: About = "texts",
    on_progress: Callable[[CaptureProgress], None] | None = None,
) -> Manifest:
    """Score what is missing of a run's cache on every node of a Ray cluster, and seal it.

    Args:
        run: as for `job.capture`; its directory and a local teacher must be reachable under
            the same path from every node.
        address: of the cluster; empty takes RAY_ADDRESS, a cluster on this machine, or starts one.
        about: what is captured: the teacher's answers to texts, targets of images, embeddings of
            items, or candidates after histories.
        on_progress: called with the sum over workers whenever one has finished its shards.
        engine, on_error, split, location: as for `job.capture`.

    Raises:
        ConfigError: Ray is not installed, or no node has the accelerators that one engine needs.
        CacheIncomplete: workers died again and again; what they finished is kept.
        StillroomError: what a worker met, as a worker of `job.capture` would.
    """
    ray = extra_package("ray", "ray", "--ray")
    run, location = _everywhere(run, location)
    job = {"run": run.model_dump(), "engine": engine, "split": split}
    job |= {"location": location, "on_error": on_error, "about": about}
    task = open_task(run, job)
    if (sealed := manifest_of(task.writer)) is not None:
        return sealed
    if not ray.is_initialized():
        # A dying node of a cluster begun here writes its state, 25 lines, to this terminal, below
        # the level of an error; a death is one sentence of ours.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    need = 1 if about == "images" else gpus_per_engine(require(run.teacher, "teacher", ""), engine)
    missing = task.writer.missing()
    tell = on_progress or (lambda _: None)
    crew = _Crew(ray, job, need, deque(missing), Totals.of(task.writer.plan, missing, 0), tell)
    try:
        crew.work(lambda shards: _still_missing(task, shards))
    finally:
        crew.dismiss()
    return task.writer.seal()


def gpus_per_engine(teacher: Teacher, engine: EngineName) -> int:
    """Accelerators that one engine occupies: tensor times pipeline parallelism."""
    if engine == "reference":
        return 1
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    return math.prod(int(teacher.engine_args.get(name, 1)) for name in sizes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one engine runs: a node, and which of the engines that fit there."""

    node: str
    slot: int


def places(nodes: list[dict[str, Any]], need: int) -> dict[Place, dict[str, float]]:
    """Every place of a cluster, and the resources that an engine there takes.

    Args:
        nodes: as `ray.nodes()` lists them.
        need: accelerators per engine. Where no node has any, one engine takes a node's processors.

    Raises:
        ConfigError: there are accelerators, but on no node enough of them.
    """
    alive = {n["NodeID"]: n["Resources"] for n in nodes if n["Alive"]}
    found = {node: int(has.get("GPU", 0)) for node, has in alive.items()}
    if any(found.values()):
        return _gpu_places(found, need)
    processors = {node: has["CPU"] for node, has in alive.items() if has.get("CPU")}
    return {Place(node, 0): {"num_cpus": count} for node, count in processors.items()}


class _Crew:
    """The workers of a cluster and what each has at hand."""

    def __init__(self, ray: Any, job: dict, need: int, waiting: deque[int], totals: Totals, tell):
        self._ray, self._job, self._need = ray, job, need
        self._waiting, self._totals, self._tell = waiting, totals, tell
        self._workers: dict[Place, Any] = {}
        self._at_hand: dict[Any, tuple[Place, list[int]]] = {}
        self._deaths: Counter[str] = Counter()
        self._ranks = 0
        self._seen: dict[int, CaptureProgress] = {}
        self._last_death = ""

    def work(self, still_missing: Callable[[list[int]], list[int]]) -> None:
        """Until no shard waits and none is at hand.

        Args:
            still_missing: which of these shards have no receipt.
        """
        while self._waiting or self._at_hand:
            self._hire()
            self._hand_out()
            answers, _ = self._ray.wait(list(self._at_hand), timeout=SECONDS_BETWEEN_LOOKS)
            for answer in answers:
                place, shards = self._at_hand.pop(answer)
                self._hear(answer, place, shards, still_missing)

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            self._ray.kill(worker)

    def _hire(self) -> None:
        """A worker for every place that has none, as long as there is work."""
        free = places(self._ray.nodes(), self._need)
        usable = {p: r for p, r in free.items() if self._deaths[p.node] < DEATHS_BEFORE_GIVING_UP}
        if not usable and not self._at_hand:
            raise CacheIncomplete(
                "no node of the cluster is left that can run the teacher"
                + (f" (last death: {self._last_death})" if self._last_death else ""),
            )
        for place, resources in usable.items():
            if place not in self._workers and self._waiting:
                self._workers[place] = self._start(place, resources)

    def _start(self, place: Place, resources: dict[str, float]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(place.node, soft=False)
        remote = self._ray.remote(scheduling_strategy=here, max_restarts=0, **resources)(Worker)
        self._ranks += 1
        return remote.remote(self._job, self._ranks - 1)

    def _hand_out(self) -> None:
        """Shards to every idle worker: fewer the nearer the end, so that all end together."""
        busy = {place for place, _ in self._at_hand.values()}
        for place, worker in self._workers.items():
            if place not in busy and self._waiting:
                # Half of what is left, dealt out evenly.
                share = len(self._waiting) // (2 * len(self._workers))
                count = min(max(share, 1), MOST_SHARDS_AT_HAND)
                shards = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                self._at_hand[worker.capture.remote(shards)] = (place, shards)

    def _hear(self, answer: Any, place: Place, shards: list[int], still_missing) -> None:
        try:
            said = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError:
            raise  # a mistake in the program, not a death
        except self._ray.exceptions.RayError as error:
            self._bury(place, error)
            left = still_missing(shards)
            # To the front of the queue, in their own order.
            self._waiting.extendleft(reversed(left))
            self._tell(replace(self._sum(), doing=_lost(place, len(left))))
            return
        if isinstance(said, Problem):
            raise said.error()
        self._deaths[place.node] = 0
        self._seen[said.rank] = said
        self._tell(self._sum())

    def _bury(self, place: Place, error: Exception) -> None:
        self._ray.kill(self._workers.pop(place))
        self._deaths[place.node] += 1
        self._last_death = first_line(error)

    def _sum(self) -> CaptureProgress:
        """All workers' progress as one; means are weighted by rows."""
        seen = list(self._seen.values())
        rows = max(sum(one.rows for one in seen), 1)
        counts = ("shards", "examples", "tokens", "rows", "bytes", "committed_tokens")
        counts += ("committed_examples",)
        means = ("retained_mass", "entropy")
        total = {name: sum(getattr(one, name) for one in seen) for name in counts}
        total |= {name: sum(getattr(o, name) * o.rows for o in seen) / rows for name in means}
        return replace(self._totals.progress(), **total)


def _lost(place: Place, shards: int) -> str:
    """What a person is told of a death; Ray's own account is in its log directory."""
    return f"the worker on node {place.node[:8]} was lost; its {shards} shards go elsewhere"


def _gpu_places(found: dict[str, int], need: int) -> dict[Place, dict[str, float]]:
    made = {
        Place(node, slot): {"num_gpus": float(need), "num_cpus": 1.0}
        for node, gpus in found.items()
        for slot in range(gpus // need)
    }
    if not made:
        raise ConfigError(
            f"one engine needs {need} accelerators and no node has more than {max(found.values())}",
            where="[teacher.engine_args] tensor_parallel_size, pipeline_parallel_size",
            remedy="Make their product no larger than a node, or use larger nodes.",
        )
    return made


def _everywhere(run: Run, location: str) -> tuple[Run, str]:
    """The same run with paths that mean the same in every working directory."""
    changed: dict[str, Any] = {"directory": str(Path(run.directory).resolve())}
    if run.teacher is not None:
        changed["teacher"] = _resolved(run.teacher)
    if run.vision is not None:
        encoders = tuple(_resolved(encoder) for encoder in run.vision.encoder)
        changed["vision"] = run.vision.model_copy(update={"encoder": encoders})
    if location and "://" not in location:
        location = str(Path(location).resolve())
    return run.model_copy(update=changed), location


def _resolved(table: Any) -> Any:
    """A table whose `model` and `adapter`, where they are directories, are absolute paths."""
    named = {key: getattr(table, key, "") for key in ("model", "adapter")}
    found = {key: Path(path) for key, path in named.items() if path and Path(path).is_dir()}
    return table.model_copy(update={key: str(path.resolve()) for key, path in found.items()})


def _still_missing(task: Task, shards: list[int]) -> list[int]:
    missing = set(task.writer.missing())
    return [shard for shard in shards if shard in missing]
