"""The curves of a training run: a JSON line per logged step, TensorBoard, and one more tracker.

One idea: what was logged after the checkpoint that a run goes on from is cut away, so that a
resumed run leaves the same curves as an uninterrupted one. The further tracker is spoken to through
accelerate's interface, and goes on with the run that it knows of this directory.
"""

import json
import secrets
from pathlib import Path
from typing import Any

from stillroom.pipeline.training.checkpoint import write_durably

FILE = "metrics.jsonl"
IDENTITY = "tracker-run"
"""File of a run's directory that holds the id by which a tracker knows it."""
PROJECT = "stillroom"


class MetricsLog:
    """Where the numbers of one run go.

    Args:
        directory: the run's directory.
        step: steps already done; later lines are cut away.
        tracker: `none`, `wandb` or `trackio`.
        name: of the run, for the tracker.
        config: the run file, for the tracker.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        tracker: str = "none",
        name: str = "",
        config: dict[str, Any] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / FILE
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self._tracker = _open_tracker(tracker, name, directory, config or {})

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


def _open_tracker(name: str, run: str, directory: Path, config: dict[str, Any]) -> Any:
    """A tracker that goes on with the run of this directory, if it has one."""
    if name == "none":
        return None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its trackers speak of themselves through a log that wants one
    identity = _identity(directory)
    # trackio knows a run by its name alone, and would begin another one if it were not told.
    own = {"name": run, "id": identity} if name == "wandb" else {"name": f"{run}-{identity}"}
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](PROJECT, **own, resume="allow", config=config)
    tracker.start()
    return tracker


def _identity(directory: Path) -> str:
    """The tracker's id of the run in a directory: made once, gone with the directory."""
    path = directory / IDENTITY
    if not path.exists():
        write_durably(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
