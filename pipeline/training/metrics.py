"""The curves of a training run: a JSON line per logged step, TensorBoard, and one more tracker.

One idea: what was logged after the checkpoint that a run goes on from is cut away, so that a
resumed run leaves the same curves as an uninterrupted one.
"""

import json
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.training.checkpoint import write_durably

FILE = "metrics.jsonl"


class MetricsLog:
    """Where the numbers of one run go.

    Args:
        directory: the run's directory.
        step: steps already done; later lines are cut away.
        tracker: `none`, `wandb` or `trackio`.
        name: of the run, for the tracker.
    """

    def __init__(self, directory: Path, step: int, tracker: str = "none", name: str = ""):
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / FILE
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self._tracker = _open_tracker(tracker, name)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step (1-based)."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The logged lines of a run, oldest first; a torn last line is left out."""
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # after the last newline: nothing, or a torn line
    return [json.loads(line) for line in lines if line]


def _open_tracker(name: str, run: str) -> Any:
    if name == "none":
        return None
    try:
        module = __import__(name)
    except ImportError:
        raise ConfigError(
            f"tracker = '{name}' but {name} is not installed",
            where="[train]",
            remedy=f"pip install {name}, or set tracker = 'none'.",
        ) from None
    module.init(project="stillroom", name=run)
    return module
