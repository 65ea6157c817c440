"""Trainers of transformers and TRL beside `stillroom train`: the same loss, and at what speed.

One idea: all hold the same student and read the same examples of the same cache in the same order,
at a learning rate of nothing, so that every step's losses may be compared; TRL's trainer and ours
take a step each in turn, so that whatever else the machine does hits both. The speeds are of the
same work only where examples are of one length, as windows are: ours pads to the longest of the
cache, a trainer to the longest of its batch.

    python -m benchmarks.doors --json
    python -m benchmarks.doors --cache CACHE --student DIRECTORY --steps 8
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from benchmarks import needs
from benchmarks.cache_trial import asking, publish
from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline import config

LINES = [{"name": "forward_kl", "options": {"ce_weight": 0.1}}]
NOTHING = 1e-30
"""Learning rate: weights stay, and every step is taken whole."""


def main() -> None:
    """Measure, write `benchmarks/results/`, print."""
    parser = asking(__doc__)
    parser.add_argument("--cache", default="runs/demo/cache")
    parser.add_argument("--student", default="runs/demo/student-initial")
    parser.add_argument("--teacher", default=needs.MODEL, help="the model that made the cache")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2, help="examples of a microbatch")
    parser.add_argument("--about", default="the text demo's", help="what both are, for the result")
    arguments = parser.parse_args()
    for place in (arguments.cache, arguments.student):
        if not Path(place).exists():
            remedy = "Run `make demo`, or name a cache and a student with --cache and --student."
            raise ConfigError("is not there", where=place, remedy=remedy)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(arguments, Path(directory))
    publish("doors", found, arguments.json)


def measure(arguments: Any, directory: Path) -> dict[str, Any]:
    """Losses of all three at the same weights, and seconds of a step of TRL's and ours in turn."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    from stillroom.hf import CachedSFTTrainer, CachedTrainer

    # Within one epoch: at its end a trainer takes what is left as a smaller step, and ours goes on.
    whole = len(_opened(arguments.cache)) // (2 * arguments.batch)
    arguments.steps = min(arguments.steps, whole)
    ours = Ours(arguments, directory / "ours")
    theirs = trainer(CachedSFTTrainer, SFTConfig, arguments, directory / "trl", ours)
    theirs.add_callback(in_turn(ours))
    theirs.train()
    again = trainer(CachedTrainer, TrainingArguments, arguments, directory / "trainer", ours)
    again.train()
    seconds = [statistics.median(one[1:]) for one in (ours.seconds, ours.others)]  # first: warm-up
    return {
        "trl_loss_difference": largest_difference(theirs, ours.losses),
        "trainer_loss_difference": largest_difference(again, ours.losses),
        "trl_relative_speed": round(seconds[0] / seconds[1], 3),
        "seconds_per_step": {"stillroom": seconds[0], "trl": seconds[1]},
        "steps": arguments.steps,
        "tokens_per_step": ours.tokens,
        "about": arguments.about,
    }


@dataclass
class Ours:
    """`stillroom train`, a step at a time."""

    arguments: Any
    directory: Path
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self):
        from stillroom.pipeline.data.packing import Position
        from stillroom.pipeline.data.records import lengths_of
        from stillroom.pipeline.training.parallel import Parallel
        from stillroom.pipeline.training.setup import Setup

        longest = int(lengths_of(_opened(self.arguments.cache)).max())
        settings = {
            "cache": self.arguments.cache,
            "steps": self.arguments.steps,
            "batch_tokens": self.arguments.batch * longest,
            "accumulate": 2,
            "packing": "never",
            "learning_rate": NOTHING,
            "schedule": "constant",
            "warmup": 0.0,
            "workers": 0,
            "precision": "float32",
        }
        told = {
            "name": "doors",
            "directory": str(self.directory),
            "teacher": {"model": self.arguments.teacher},
            "student": {"init": "model", "model": self.arguments.student},
            "objective": LINES,
            "train": settings,
        }
        run = config.parse(told, "benchmarks.doors")
        assert run.train is not None
        self.setup = Setup(run, run.train, Parallel.start())
        self.setup.build()
        self._steps = self.setup.loader.steps(Position(), self.arguments.steps)

    def order(self) -> list[int]:
        """Numbers of the examples as they are read."""
        return [number for (number,) in self.setup.loader.plan.epoch(0)]

    def step(self) -> None:
        """One step, timed with its data."""
        began = time.perf_counter()
        batches, _ = next(self._steps)
        done = self.setup.stepper.step(len(self.losses), batches, False)
        self.seconds.append(time.perf_counter() - began)
        assert done is not None
        self.losses.append(done.loss)
        self.tokens = done.tokens


def _opened(cache: str) -> Any:
    from stillroom import TeacherCache

    return TeacherCache.open(cache)


def in_turn(ours: Ours) -> Any:
    """A callback of transformers: after each of its steps, one of ours."""
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        began = 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ours.others.append(time.perf_counter() - self.began)
            ours.step()
            self.began = time.perf_counter()

    return Turn()


def trainer(kind: Any, arguments_of: Any, arguments: Any, directory: Path, ours: Ours) -> Any:
    """A trainer of the same steps."""
    from transformers import AutoModelForCausalLM

    from stillroom.hf import dataset_of
    from stillroom.pipeline.doors.cached import CachedDataset

    args = arguments_of(
        str(directory),
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=2,
        max_steps=arguments.steps,
        logging_steps=1,
        learning_rate=NOTHING,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    )
    if hasattr(args, "max_length"):
        args.max_length = None
    made = kind(
        AutoModelForCausalLM.from_pretrained(arguments.student, dtype="float32"),
        args,
        cache=arguments.cache,
        objectives=LINES,
        train_dataset=dataset_of(CachedDataset(arguments.cache)).select(ours.order()),
    )
    made.data.packed = made.distiller.packed = False  # an example to a row, on both sides
    return made


def largest_difference(found: Any, losses: list[float]) -> float:
    """Of a trainer's logged losses from ours, as a share of ours."""
    logged = [line["loss"] for line in found.state.log_history if "loss" in line]
    return max(abs(one - other) / abs(other) for one, other in zip(logged, losses, strict=True))


if __name__ == "__main__":
    needs.run(main)
