"""Which loss, and which record of the teacher's tail, gives the best student: arms, budgets, seeds.

One idea: an experiment is a grid of (arm, steps, seed); every cell is a small file of its own in
the work directory, so the grid may be stopped at any time, is shared by any number of workers, and
goes on where it was. Nothing is reported that was not run: the table says how many seeds each mean
is over.

    tail     one question: bytes per token, as stored, against held-out KL. Each treatment at four
             budgets; `full` (rebuilt from cached final states) is the ceiling.
                 bucket       exact top-k, the rest of the mass as one outcome
                 truncate     exact top-k as it is
                 renormalise  exact top-k scaled to one
                 sampled      exact top-k and draws from the tail
                 random       draws from the whole distribution, no exact ids (RS-KD)
    losses   forward KL, reverse KL, JSD, LLaVADI's joint alignment and plain cross-entropy, on one
             cache with k = 64
    warm     forward KL, reverse KL and JSD from a student that can already speak: 80 steps of
             forward KL come before, one such start for each seed
    speaks   the question of `tail` once more with a student that can speak from the start: 24 of
             the teacher's 30 blocks

It does not time anything: see benchmarks.train.

    python -m benchmarks.students --grid tail --steps 36 --seeds 1 2 3 --worker 0/2
    python -m benchmarks.students --grid tail --report     # table and plot of what is there
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks import needs
from benchmarks._students_report import report
from benchmarks.cache_trial import asking, publish
from stillroom.pipeline import config
from stillroom.pipeline.training.checkpoint import write_durably

WINDOW, BATCH_TOKENS, HELDOUT = 512, 2048, 24
SEEDS = (1, 2, 3, 4, 5)
ORDERS_APART = 100
"""What a seed's start adds to it."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What is captured per row."""

    k: int
    draws: int = 0
    final: bool = False

    @property
    def name(self) -> str:
        """Directory name of its cache."""
        return f"k{self.k}-d{self.draws}" + ("-final" if self.final else "")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the arms of a grid have in common.

    Attributes:
        student: the [student] table.
        learning_rate: highest of the schedule.
        warm_steps: of forward KL on 64 ids, at the same learning rate, before the arm begins.
    """

    student: dict[str, Any]
    learning_rate: float
    warm_steps: int = 0


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: unique in its grid.
        storage: what its cache holds.
        objectives: rows of the [[objective]] table.
    """

    name: str
    storage: Storage
    objectives: tuple[dict[str, Any], ...]


def _kl(tail: str) -> tuple[dict[str, Any], ...]:
    return ({"name": "forward_kl", "options": {"tail": tail}},)


# Sizes that come nearest to 20, 40, 100 and 180 bytes a token on this text, from the sizes that
# `cache plan` measures; what is reported is what was stored.
_EXACT = {20: 9, 40: 26, 100: 78, 180: 146}
_SAMPLED = {20: (4, 16), 40: (12, 56), 100: (48, 240), 180: (110, 512)}
_RANDOM = {20: 28, 40: 100, 100: 480}
_NEAREST = Storage(64, final=True)

GRIDS: dict[str, tuple[Arm, ...]] = {
    "tail": (
        Arm("full", Storage(8, final=True), ({"name": "full_vocabulary"},)),
        *(
            arm
            for budget in _EXACT
            for arm in (
                Arm(f"sampled-{budget}", Storage(*_SAMPLED[budget]), _kl("sampled")),
                *(
                    Arm(f"{tail}-{budget}", Storage(_EXACT[budget]), _kl(tail))
                    for tail in ("bucket", "truncate", "renormalise")
                ),
            )
        ),
        *(Arm(f"random-{b}", Storage(0, draws), _kl("sampled")) for b, draws in _RANDOM.items()),
    ),
    "losses": (
        Arm("forward_kl", _NEAREST, ({"name": "forward_kl"},)),
        Arm("reverse_kl", _NEAREST, ({"name": "reverse_kl"},)),
        Arm("jsd", _NEAREST, ({"name": "jsd"},)),
        Arm("joint", _NEAREST, ({"name": "llavadi_joint"},)),
        Arm("full", _NEAREST, ({"name": "full_vocabulary"},)),
        Arm("cross_entropy", _NEAREST, ({"name": "cross_entropy"},)),
    ),
    "warm": tuple(
        Arm(name, _NEAREST, ({"name": name},)) for name in ("forward_kl", "reverse_kl", "jsd")
    ),
    "speaks": (
        Arm("full", Storage(8, final=True), ({"name": "full_vocabulary"},)),
        Arm("sampled-40", Storage(12, 56), _kl("sampled")),
        Arm("bucket-90", _NEAREST, _kl("bucket")),
        Arm("bucket-16", Storage(16), _kl("bucket")),
    ),
}

# Without the six blocks whose absence the teacher feels least.
_SPEAKS = {"keep_layers": [n for n in range(30) if n not in (13, 16, 19, 22, 24, 26)]}
RECIPES: dict[str, Recipe] = {
    "tail": Recipe({"keep_every": 3}, 6e-4),
    "losses": Recipe({"keep_every": 3}, 6e-4),
    "warm": Recipe({"keep_every": 3}, 1e-4, warm_steps=80),
    "speaks": Recipe(_SPEAKS, 3e-4),
}


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = asking(__doc__)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="tail")
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/results/students"))
    parser.add_argument("--model", default=needs.MODEL)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--report", action="store_true", help="only report what has been run")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH_TOKENS} tokens")
    parser.add_argument("--worker", default="0/1", help="this worker / number of workers")
    arguments = parser.parse_args()
    if arguments.report:
        publish(f"students-{arguments.grid}", report(arguments.cells, arguments.grid), True)
        return
    arms = [a for a in GRIDS[arguments.grid] if not arguments.arms or a.name in arguments.arms]
    model = needs.model(arguments.model)
    cells_of_grid = arguments.cells / arguments.grid
    work, precision = arguments.work / arguments.precision, arguments.precision
    recipe = RECIPES[arguments.grid]
    experiment = Experiment(work, cells_of_grid, model, recipe, precision)
    cells = [(arm, seed) for seed in arguments.seeds for arm in arms]
    worker, workers = map(int, arguments.worker.split("/"))
    for arm, seed in cells[worker::workers]:
        experiment.run(arm, arguments.steps, seed)


@dataclass
class Experiment:
    """The caches and runs of a grid.

    Attributes:
        work: corpus, caches and runs.
        cells: results, one file per cell.
        model: the teacher.
        recipe: of the grid.
        precision: of teacher, training and measurement. A CPU without bfloat16 of its own takes
            eight times as long over its matrix products.
    """

    work: Path
    cells: Path
    model: str
    recipe: Recipe
    precision: str

    def run(self, arm: Arm, steps: int, seed: int) -> None:
        """Train and measure one cell, unless its result is there."""
        from stillroom.pipeline.training.trainer import train

        path = self.cells / f"{arm.name}-{steps}-{seed}.json"
        if path.exists():
            return
        cache = self._cache(arm.storage)
        directory = self.work / "runs" / f"{self.cells.name}-{path.stem}"
        student, before = self._beginning(seed)
        result = train(self._training(arm, cache, directory, steps, seed, student))
        facts = {
            "arm": arm.name,
            "seed": seed,
            "steps": result.steps,
            "precision": self.precision,
            "tokens": result.tokens,
            **asdict(arm.storage),
            **_bytes_per_token(cache),
            **before,
            **self._measured(result.student),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(directory)

    def _measured(self, student: str) -> dict[str, float]:
        """Against the live teacher, on the held-out windows."""
        from stillroom.pipeline.corpus.preparing import Corpus
        from stillroom.pipeline.evaluation.held_out import measure

        heldout = list(Corpus.open(self.work / "corpus").split("heldout"))[:HELDOUT]
        scores = measure(self.model, {"student": student}, heldout, self.precision)["student"]
        return {
            "kl": scores.kl,
            "kl_standard_error_over_windows": scores.kl_standard_error,
            "reverse_kl": scores.reverse_kl,
            "top1": scores.top1,
            "perplexity": scores.perplexity,
        }

    def _beginning(self, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
        """The [student] table of a seed, and what that student scores before its arm begins."""
        from stillroom.pipeline.training.trainer import train

        if not self.recipe.warm_steps:
            return self.recipe.student, {}
        directory = self.work / "runs" / f"{self.cells.name}-start-{seed}"
        scores, steps = directory / "scores.json", self.recipe.warm_steps
        with _locked(self.work / f"start-{seed}.lock"):
            if not scores.exists():
                start = GRIDS["losses"][0]
                cache, own = self._cache(start.storage), self.recipe.student
                # Another order, so that the arm does not begin with the text it has just seen.
                order = seed + ORDERS_APART
                result = train(self._training(start, cache, directory, steps, order, own))
                found = self._measured(result.student)
                write_durably(scores, json.dumps(found))
        before = {f"before_{name}": value for name, value in json.loads(scores.read_text()).items()}
        return {"init": "model", "model": str(directory / "student")}, before

    def _cache(self, storage: Storage) -> Path:
        """The cache of a storage, captured by whichever worker comes first."""
        from stillroom.pipeline.capture.job import capture
        from stillroom.pipeline.corpus.preparing import prepare

        directory = self.work / "caches" / storage.name
        directory.mkdir(parents=True, exist_ok=True)
        run = self._capturing(storage, directory)
        with _locked(self.work / "capture.lock"):
            if not (self.work / "corpus").exists():
                assert run.prepare
                prepare(run.prepare, self.model, self.work / "corpus")
            if not (directory / "corpus").exists():
                (directory / "corpus").symlink_to((self.work / "corpus").resolve())
            if not (directory / "cache" / "manifest.json").exists():
                capture(run)
        return directory / "cache"

    def _capturing(self, storage: Storage, directory: Path) -> config.Run:
        document = {
            "name": storage.name,
            "directory": str(directory),
            "teacher": {"model": self.model, "dtype": self.precision},
            "prepare": {
                "window": WINDOW,
                "heldout": 0.1,
                "source": [{"name": "help", "kind": "pydoc_topics"}],
            },
            "capture": {
                "k": storage.k,
                "tail_draws": storage.draws,
                "hidden_layers": ["final"] if storage.final else [],
                "hidden_codec": "bf16",
                "entropy": False,
                # Tables are fitted on the first shard.
                "examples_per_shard": 64,
            },
        }
        return config.parse(document, "benchmarks.students")

    def _training(
        self, arm: Arm, cache: Path, directory: Path, steps: int, seed: int, student: dict
    ):
        document = {
            "name": arm.name,
            "directory": str(directory),
            "teacher": {"model": self.model, "dtype": self.precision},
            "student": student,
            "objective": list(arm.objectives),
            "train": {
                "cache": str(cache),
                "steps": steps,
                "batch_tokens": BATCH_TOKENS,
                "learning_rate": self.recipe.learning_rate,
                "precision": self.precision,
                "seed": seed,
                "checkpoint_every": 75,
                "keep_last": 1,
            },
        }
        return config.parse(document, "benchmarks.students")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bytes_per_token(cache: Path) -> dict[str, float]:
    """Bytes of the shards' top-k files over the tokens, and of all that lies under the cache.

    The first is what a corpus of any size pays; tables, index and manifest are shared by all of it
    and weigh more on a small one.
    """
    from stillroom.pipeline.cache.reader import TeacherCache

    tokens = TeacherCache.open(str(cache)).manifest.num_tokens
    files = [path for path in cache.rglob("*") if path.is_file()]
    rows = sum(path.stat().st_size for path in files if path.suffix == ".arrow")
    return {
        "bytes_per_token": rows / tokens,
        "bytes_per_token_with_everything": sum(path.stat().st_size for path in files) / tokens,
    }


if __name__ == "__main__":
    needs.run(main)
