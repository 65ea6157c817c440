"""Which trainer a run needs: a language model's, or a recommender's.

One idea: this is the only place that knows both; a sweep and a person ask here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillroom.pipeline.config import Run
from stillroom.pipeline.objectives.names import check_names
from stillroom.pipeline.training.recommending import train_recommender
from stillroom.pipeline.training.result import TrainResult
from stillroom.pipeline.training.stepping import Progress
from stillroom.pipeline.training.trainer import train as train_language_model


def train(
    run: Run,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_note: Callable[[str], None] = lambda _: None,
    blocks_measured: Path | None = None,
) -> TrainResult:
    """Train the student of a run; see `trainer.train`."""
    check_names(run)
    told: dict[str, Any] = {"on_progress": on_progress, "stop": stop, "on_note": on_note}
    if run.recommender is not None:  # which has no blocks of a teacher
        return train_recommender(run, **told)
    return train_language_model(run, **told, blocks_measured=blocks_measured)
