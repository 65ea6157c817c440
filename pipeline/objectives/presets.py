"""Named recipes: one line of the `[[objective]]` table that stands for several.

One idea: a published method is data, not code; `expand` writes out what a person could have.
"""

from typing import Any

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.objectives.registry import OBJECTIVES

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    # LLaVADI's best: last hidden state of all tokens through a 2-layer MLP, and forward KL on the
    # answer, each five times the weight of the next-token loss; averaged per sample.
    "llavadi_joint": (
        {"name": "hidden", "weight": 5.0, "mask": "all", "reduction": "sample"},
        {"name": "forward_kl", "weight": 5.0, "reduction": "sample", "options": {"ce_weight": 0.2}},
    ),
    # MiniLLM from teacher-written roll-outs: closed-form single step, long-horizon part.
    "minillm": (
        {"name": "reverse_kl"},
        {"name": "policy_gradient"},
    ),
}


def expand(table: Objective) -> list[Objective]:
    """The lines that a line stands for: itself, unless it names a preset.

    The preset's weights are multiplied by the line's; cache and sources are taken over, a
    curriculum by the lines that are about rows.

    Raises:
        ConfigError: a preset is given options, a mask or a reduction, which are its own.
    """
    if table.name not in PRESETS:
        return [table]
    plain = Objective(name=table.name)
    for key in ("options", "mask", "reduction"):
        if getattr(table, key) != getattr(plain, key):
            raise ConfigError(
                f"preset '{table.name}' takes no {key}",
                where="[[objective]]",
                remedy="Write its lines out to change them (see pipeline/objectives/presets.py).",
            )
    return [_line(table, line) for line in PRESETS[table.name]]


def _line(table: Objective, written: dict[str, Any]) -> Objective:
    ranked = {"curriculum"} if OBJECTIVES[written["name"]].unit == "row" else set()
    shared = table.model_dump(include={"cache", "source_weights"} | ranked)
    line = Objective(**(shared | written))
    last = None if table.final_weight is None else line.weight * table.final_weight
    return line.model_copy(update={"weight": line.weight * table.weight, "final_weight": last})
