"""A trained recommender as a directory: safetensors, config, and the ids of its items.

One idea: what is written is what serves, with the distilled part folded into the item table; it is
loaded again and has to score some histories as the student in memory does before it is called done.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from stillroom.cache_schemas.errors import StillroomError, StudentError, first_line
from stillroom.pipeline.config.recommending import Recommender
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.student.recommenders.model import SequentialRecommender
from stillroom.pipeline.student.replacing import Replacing

CONFIG, WEIGHTS, ITEM_IDS = "config.json", "model.safetensors", "items.json"
BESIDE = "config_and_items_sha256"
"""The one key of the weights' metadata; two would be written in no fixed order."""
TOLERANCE = 1e-4
"""Of a score, relative to the largest: folding adds in another order, in fp32."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
UNREADABLE += (SafetensorError, StillroomError)
"""What files that were changed by hand, or belong to something else, raise."""


def export(
    model: SequentialRecommender,
    table: Recommender,
    directory: Path,
    item_ids: list[str],
    facts: dict[str, Any],
    probe: torch.Tensor,
) -> None:
    """Write a student in one move.

    Args:
        model: in its trained state.
        table: what it was made from.
        directory: where it goes, itself or as a link; what is there is replaced.
        item_ids: names of the items in the order of the scores.
        facts: kept in config.json; `catalogue` among them.
        probe: int64 [B, L] histories that the written student is tried on.

    Raises:
        StudentError: it scores them otherwise, or cannot be put there.
    """
    place = Replacing.of(directory)
    staging = place.staging
    staging.mkdir(parents=True, exist_ok=True)
    kept = table.model_dump(mode="json") | {"distilled": None}
    sizes = {"items": model.num_items, "history": model.length}
    config = {"model_type": "sequential_recommender", "recommender": kept, **sizes, **facts}
    written = {CONFIG: json.dumps(config, indent=2, sort_keys=True), ITEM_IDS: json.dumps(item_ids)}
    for name, text in written.items():
        (staging / name).write_text(text + "\n")
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("distilled.")}
    weights["items.weight"] = model.folded_table()
    tensors = {n: t.detach().cpu().contiguous() for n, t in weights.items()}
    save_file(tensors, staging / WEIGHTS, {BESIDE: _digest(staging)})
    _check(model, staging, probe)
    place.swap()


def load(directory: Path) -> tuple[SequentialRecommender, dict[str, Any]]:
    """A written student, ready to score, and its config.

    Raises:
        StudentError: the directory holds none, or its files do not belong together.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
        lacking = {"catalogue", "identity"} - config.keys()
        if lacking or config["items"] != config["catalogue"]["items"]:
            raise ValueError(f"{CONFIG} is not as it was written")
        table = validate(Recommender, config["recommender"], str(directory / CONFIG))
        weights = load_file(directory / WEIGHTS)
        _check_belongs(directory)
        if any(not tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError(f"{WEIGHTS} holds what is not a number")
        model = SequentialRecommender(table, config["items"], config["history"])
        model.load_state_dict(weights)
    except UNREADABLE as error:
        raise StudentError(
            f"cannot be loaded ({first_line(error)})",
            expected="a recommender that stillroom exported",
            where=str(directory),
            remedy="Run `stillroom train` for this run; it writes the student again from its last "
            "checkpoint once this directory is deleted.",
        ) from None
    return model.eval(), config


def _digest(directory: Path) -> str:
    """sha256 over what config and item ids say, however they are laid out."""
    said = [json.loads((directory / name).read_text()) for name in (CONFIG, ITEM_IDS)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_belongs(directory: Path) -> None:
    """Refuse a config or item ids that were changed beside the weights: the length of a history of
    a GRU, or a number of heads, is in no tensor's shape. Students of earlier releases name none."""
    with safe_open(directory / WEIGHTS, "pt") as file:
        told = (file.metadata() or {}).get(BESIDE)
    if told and told != _digest(directory):
        raise ValueError(f"{CONFIG} or {ITEM_IDS} is not as it was written beside {WEIGHTS}")


@torch.no_grad()
def _check(model: SequentialRecommender, written: Path, probe: torch.Tensor) -> None:
    was_training = model.training
    model.eval()
    own = model.all_scores(model.states(probe)).cpu()
    model.train(was_training)
    again, _ = load(written)
    found = again.all_scores(again.states(probe.cpu()))
    difference = float((found - own).abs().max() / own.abs().max().clamp_min(1e-30))
    if not difference <= TOLERANCE:
        raise StudentError(
            f"the written student's scores differ by {difference:.2g} of the largest",
            expected=f"at most {TOLERANCE:g}",
            where=str(written),
            remedy="Report this; the checkpoint is kept.",
        )
