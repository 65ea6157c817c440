"""What runs on a Ray node: one engine that stays, and the shards it is handed.

One idea: the worker of `capture` again, asked for some shards at a time; what a person can put
right travels back as a value. It knows nothing of Ray, so it is an ordinary class.
"""

from dataclasses import asdict, dataclass

from stillroom.cache_schemas.errors import StillroomError
from stillroom.pipeline.capture.job import Notes, ShardWork, Task
from stillroom.pipeline.capture.progress import CaptureProgress, Totals
from stillroom.pipeline.config import Run
from stillroom.pipeline.teacher.protocol import Engine


class Worker:
    """The Ray actor: an engine that stays, and the shards it is handed.

    Args:
        job: the run, and which cache of it.
        rank: names this worker's log.
    """

    def __init__(self, job: dict, rank: int):
        self._job, self._rank = job, rank
        self._engine: Engine | None = None
        self._scale = 0.0  # no engine yet; see `_kept`
        self._work: ShardWork | None = None
        self._totals = Totals(rank, 0, 0)

    def capture(self, shards: list[int]) -> "CaptureProgress | Problem":
        """Write these shards; errors that a person can put right come back as values."""
        try:
            work = self._work = self._work or self._open()
            self._totals.total_shards += len(shards)
            work.score(shards)
        except StillroomError as error:
            return Problem.of(error)
        return self._totals.progress()

    def _open(self) -> ShardWork:
        job, run = self._job, Run.model_validate(self._job["run"])
        task = open_task(run, job)
        where = run.path("images") if job["images"] else run.path()
        notes = Notes(where, self._rank, job["on_error"])
        self._start = task.start
        return ShardWork(
            task.writer, task.examples, notes, self._totals, lambda _: None, self._kept
        )

    def _kept(self, scale: float) -> Engine:
        """The engine of the shards before, unless a smaller batch is asked for."""
        if self._engine is None or scale < self._scale:
            if self._engine is not None:
                self._engine.close()
            self._engine, self._scale = self._start(scale), scale
        return _StaysOpen(self._engine)


def open_task(run: Run, job: dict) -> Task:
    """What a job is about: a language model's answers, or its images' targets."""
    if job["images"]:
        from stillroom.pipeline.capture.images import open_task

        return open_task(run, job["location"])
    return Task.open(run, job["engine"], job["split"], job["location"])


@dataclass(frozen=True, slots=True)
class Problem:
    """A `StillroomError` on its way to the driver; exceptions lose their fields on the way."""

    found: str
    expected: str
    where: str
    remedy: str
    exit_code: int

    @classmethod
    def of(cls, error: StillroomError) -> "Problem":
        """From an error."""
        return cls(error.found, error.expected, error.where, error.remedy, error.exit_code)

    def error(self) -> StillroomError:
        """The error again."""
        fields = asdict(self)
        code = fields.pop("exit_code")
        made = StillroomError(fields.pop("found"), **fields)
        made.exit_code = code
        return made


class _StaysOpen:
    """An engine whose borrower may not close it."""

    def __init__(self, engine: Engine):
        self.score = engine.score

    def close(self) -> None:
        """Nothing: the worker keeps it for the next shards."""
