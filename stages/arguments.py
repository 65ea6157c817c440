"""Arguments that several commands have in common, each written once.

One idea: an option means the same and is refused in the same words wherever it is asked for. What
the verbs of `stillroom cache` share beside these is in `stages.cache.arguments`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cache_schemas.errors import ConfigError

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]
Rank = Annotated[int, typer.Option(min=0, help="This worker, from 0.")]
WorldSize = Annotated[int, typer.Option(min=1, help="How many workers share the work.")]


class Engine(StrEnum):
    """What runs the teacher."""

    vllm = "vllm"
    reference = "reference"


EngineChoice = Annotated[Engine, typer.Option(help="What runs the teacher.")]


AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for a program instead of a table.")
]


def check_worker(rank: int, world_size: int) -> None:
    """Refuse a worker that is not among its peers."""
    if rank >= world_size:
        raise ConfigError(
            f"--rank {rank} of {world_size} workers", expected=f"0 to {world_size - 1}"
        )
