"""Which trainer a run needs: a language model's, or a recommender's.

One idea: this is the only place that knows both; a sweep and a person ask here.
"""

from collections.abc import Callable

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
) -> TrainResult:
    """Train the student of a run; see `trainer.train`."""
    check_names(run)
    chosen = train_language_model if run.recommender is None else train_recommender
    return chosen(run, on_progress=on_progress, stop=stop, on_note=on_note)
