"""The tables of a sweep file: several students off one base run.

One idea: an arm says only what it changes of the base run. The runs are made and trained by
`stillroom.pipeline.training.arms`.
"""

from typing import Any

from pydantic import Field

from stillroom.pipeline.config.strict import PathText, Table


class Arm(Table):
    """One student. A key that its tables name takes the place of the base run's; all others stay
    as they are there."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """In the table and the picture; the arm's directory is `<base directory>/sweep/<name>`."""
    objective: tuple[dict[str, Any], ...] = ()
    """`[[arm.objective]]`, as `[[objective]]`: in place of all of the base run's; without any,
    those stay."""
    train: dict[str, Any] = Field(default_factory=dict)
    """`[arm.train]`, as `[train]`."""
    student: dict[str, Any] = Field(default_factory=dict)
    """`[arm.student]`, as `[student]`."""
    recommender: dict[str, Any] = Field(default_factory=dict)
    """`[arm.recommender]`, as `[recommender]`."""


class Sweep(Table):
    """A whole sweep file, for `stillroom train --sweep`."""

    base: PathText
    """The base run's TOML file, relative to this one."""
    side_by_side: int = Field(default=1, ge=1)
    """Arms that train at the same time, each in a process of its own; 1 under torchrun."""
    arm: tuple[Arm, ...] = Field(min_length=1)
