"""What makes two runs the same run.

One idea: whatever changes what the student learns is in one flat dictionary, so that going on with
something else is refused by name; how fast or where it runs is not in it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, PlanMismatch
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.corpus.splits import canonical_json
from stillroom.pipeline.teacher.identity import SILENT_KEYS, canonical_config, weights_sha256

HOW_NOT_WHAT = {
    "attention",
    "cache",
    "caches",
    "local_copy",
    "local_copy_gigabytes",
    "images",
    "joined",
    "corpus",
    "workers",
    "checkpoint_every",
    "async_checkpoint",
    "keep_last",
    "log_every",
    "evaluate_every",
    "heldout",
    "heldout_cache",
    "keep_best",
    "kernel",
    "load_balancing",
    "packing",
    "parallel",
    "export_dtype",
    "patience",
    "steps",
    "tracker",
}
"""Keys of `[train]` that may change between two halves of one run; caches count by their digest,
packing and the load-balancing loss by what came of them."""

WEIGHTS = "initial student's weights"
LATER = {"initial student's config", WEIGHTS}
"""Parts of the identity that older runs do not tell."""

MEASURED = {"packing": "packed", "load_balancing": 0.0}
"""Parts of the identity that the loaded student decides, and what they were in older runs."""


def identity_of(run: Run, settings: Train, caches: Mapping[str, Any], initial: Path) -> dict:
    """Everything that makes a run what it is, flat, so that a difference has a name."""
    identity = {f"cache {name or 'train.cache'}": c.plan.digest for name, c in caches.items()}
    identity |= _initial_student(initial, whole=not (settings.lora or settings.freeze))
    for number, objective in enumerate(run.objective):
        for key, value in objective.model_dump(mode="json").items():
            identity[f"objective[{number}].{key}"] = value
    for key, value in settings.model_dump(mode="json").items():
        if key not in HOW_NOT_WHAT:
            identity[f"train.{key}"] = _what(value) if key == "lora" else value
    return identity


def _initial_student(directory: Path, whole: bool) -> dict:
    """How the initial student was made, and what of its files the trained one will hold.

    Args:
        directory: `student-initial`.
        whole: all of its weights are trained, and so are in every checkpoint.
    """
    receipt = (directory / "student.json").read_bytes()
    config = canonical_config(directory / "config.json", SILENT_KEYS)
    identity = {
        "initial student": hashlib.sha256(receipt).hexdigest(),
        "initial student's config": hashlib.sha256(canonical_json(config)).hexdigest(),
    }
    return identity if whole else identity | {WEIGHTS: weights_sha256(directory)}


def _what(lora: dict | None) -> dict | None:
    """Adapters without what does not change what is learned; runs of before named no modules."""
    if lora is None:
        return None
    left_out = {"export"} | ({"modules_to_save"} if not lora["modules_to_save"] else set())
    return {key: value for key, value in lora.items() if key not in left_out}


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse to continue a run that is not the one that was started.

    Args:
        found: of the run so far; keys that no longer count, and those that are newer, are allowed.
        wanted: of the run as it is asked for.
        where: the file that `found` is from.

    Raises:
        PlanMismatch: naming the first key that differs, what was found and what was expected.
    """
    for key in sorted(found.keys() | wanted.keys()):
        if key.startswith("train.") and key.removeprefix("train.") in HOW_NOT_WHAT:
            continue
        if key in LATER and key not in found:
            continue
        before, now = found.get(key, MEASURED.get(key)), wanted.get(key, MEASURED.get(key))
        if before != now:
            raise PlanMismatch(
                f"was trained with {key} = {before!r}",
                expected=f"{now!r}",
                where=where,
                remedy="Set it back, use another run directory, or delete this one to start anew.",
            )


def check_not_fewer(done: int, steps: int, where: str) -> None:
    """Steps that were taken cannot be taken back.

    Raises:
        ConfigError: fewer are asked for.
    """
    if steps < done:
        raise ConfigError(
            f"[train] steps = {steps} of a run that has taken {done}",
            expected=f"at least {done}",
            where=where,
            remedy=f"Set steps = {done} or more, or use another run directory.",
        )
