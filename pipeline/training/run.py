"""What a training run is: its caches, the size of its steps, and its identity.

One idea: whatever changes what the student learns is in one flat dictionary, so that going on with
something else is refused by name; how fast or where it runs is not in it.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.images import Pictures, processor_of
from stillroom.pipeline.data.loader import Geometry, RecordSource, lengths_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.training.parallel import Parallel

HOW_NOT_WHAT = {
    "cache",
    "caches",
    "local_copy",
    "local_copy_gigabytes",
    "images",
    "corpus",
    "workers",
    "checkpoint_every",
    "async_checkpoint",
    "keep_last",
    "log_every",
    "evaluate_every",
    "heldout_cache",
    "tracker",
    "parallel",
}
"""Keys of `[train]` that may change between two halves of one run; caches count by their digest."""


def open_caches(run: Run, settings: Train) -> dict[str, Any]:
    """Every cache of a run by name; "" is the main one."""
    main = settings.cache or str(run.path("cache"))
    return {name: opened(at, settings) for name, at in ({"": main} | settings.caches).items()}


def opened(location: str, settings: Train) -> Any:
    """A sealed cache; one behind a URL through `[train] local_copy`."""
    from stillroom.pipeline.cache.reader import TeacherCache

    far = "://" in location and not location.startswith("file://")
    local = settings.local_copy if far else ""
    return TeacherCache.open(location, local, int(1e9 * settings.local_copy_gigabytes))  # bytes


def open_heldout(settings: Train, main: Any) -> dict[str, Any]:
    """The held-out cache for measurement during training.

    Raises:
        ConfigError: none is named.
        StudentError: it holds other signals than the training cache.
    """
    if not settings.heldout_cache:
        raise ConfigError(
            "evaluate_every without heldout_cache",
            where="[train]",
            remedy="Capture the held-out split (stillroom capture --split heldout) and name it.",
        )
    cache = opened(settings.heldout_cache, settings)
    if lacking := set(main.signals) - set(cache.signals):
        raise StudentError(
            f"lacks signals {', '.join(sorted(lacking))}",
            expected="those of train.cache",
            where=settings.heldout_cache,
        )
    return {"": cache}


def open_image_caches(settings: Train, taken: Collection[str]) -> dict[str, Any]:
    """Every cache of vision targets by name.

    Raises:
        ConfigError: a name that a cache of texts already has.
    """
    for name in settings.images:
        if name in taken:
            raise ConfigError(f"two caches are called '{name}'", where="[train.images]")
    return {name: opened(location, settings) for name, location in settings.images.items()}


def pictures_of(
    run: Run,
    settings: Train,
    student: Path,
    caches: Mapping[str, Any],
    signals: Mapping[str, Collection[str]],
) -> Pictures | None:
    """What looks up images for the student; None where neither pixels nor targets are wanted."""
    from stillroom.pipeline.corpus.files import Corpus

    sees = "vision_config" in json.loads((student / "config.json").read_text())
    if not sees and not caches:
        return None
    wanted = {name: sorted(signals[name]) for name in caches}
    if not sees:
        return Pictures(None, None, caches, wanted)
    corpus = Corpus.open(settings.corpus or run.path("corpus"))
    return Pictures(corpus.image_bytes, processor_of(student), caches, wanted)


def freeze(student: nn.Module, patterns: Sequence[str]) -> None:
    """Leave weights out of training.

    Raises:
        ConfigError: a pattern fits no weight.
    """
    for pattern in patterns:
        found = [p for name, p in student.named_parameters() if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f"'{pattern}' fits no weight", where="[train] freeze")
        for parameter in found:
            parameter.requires_grad_(False)


def facts_of(cache: Any) -> CacheFacts:
    """What objectives must know of a cache.

    Raises:
        StudentError: it holds items or lists of items.
    """
    facts = cache.plan.facts
    if "encoders" in facts["teacher"]:
        dense = facts["signals"]["dense"]
        widths, positions = (
            {name: shape[key] for name, shape in dense.items()} for key in ("width", "positions")
        )
        return CacheFacts(tuple(cache.signals), (), 0, widths, positions)
    if "catalogue" in facts["capture"]:
        raise StudentError(
            "is about items and holds no text",
            expected="a cache that [capture] made",
            where=cache.storage.location,
            remedy="A recommender needs a [recommender] table.",
        )
    width = facts["teacher"]["hidden_size"]
    return CacheFacts(
        signals=tuple(cache.signals),
        temperatures=tuple(cache.temperatures),
        vocab_size=facts["teacher"]["vocab_size"],
        widths={name: width for name in cache.signals if name.startswith("hidden.")},
        k=facts["capture"]["k"],
    )


def check_fit(student: Path, caches: Mapping[str, Any]) -> None:
    """Refuse a student whose tokenizer is not the one the caches were made with.

    Raises:
        StudentError: naming the fact that differs, and what would work.
    """
    from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

    own = tokenizer_facts(str(student))
    rows = json.loads((student / "config.json").read_text())
    head = rows.get("text_config", rows).get("vocab_size", own["vocab_size"])
    if head < own["vocab_size"]:
        raise StudentError(
            f"the head has {head} rows",
            expected=f"at least the tokenizer's {own['vocab_size']} ids",
            where=str(student),
        )
    for name, cache in caches.items():
        for key, wanted in cache.plan.facts["tokenizer"].items():
            if own.get(key) != wanted:
                raise StudentError(
                    f"tokenizer {key} is {own.get(key)}",
                    expected=f"{wanted} as in cache '{name or 'train.cache'}'",
                    where=str(student),
                    remedy="Take a student with the teacher's tokenizer (prune_layers, prune_width "
                    "or config), or capture the teacher again with the student's; projection "
                    "across tokenizers does not exist here.",
                )


def geometry_of(settings: Train, cache: RecordSource, parallel: Parallel) -> Geometry:
    """Rows and microbatches of a step, and this rank's share."""
    longest = int(lengths_of(cache).max(initial=2))  # tokens
    capacity = settings.sequence_length or min(longest, settings.batch_tokens)  # tokens of a row
    return Geometry(
        capacity,
        max(1, settings.batch_tokens // capacity),  # rows
        settings.accumulate,
        parallel.rank,
        parallel.world_size,
        padding_free=settings.attention == "flash_attention_2",
    )


def identity_of(run: Run, settings: Train, caches: Mapping[str, Any], initial: Path) -> dict:
    """Everything that makes a run what it is, flat, so that a difference has a name."""
    identity = {f"cache {name or 'train.cache'}": c.plan.digest for name, c in caches.items()}
    receipt = (initial / "student.json").read_bytes()
    identity["initial student"] = hashlib.sha256(receipt).hexdigest()
    for number, objective in enumerate(run.objective):
        for key, value in objective.model_dump(mode="json").items():
            identity[f"objective[{number}].{key}"] = value
    for key, value in settings.model_dump(mode="json").items():
        if key not in HOW_NOT_WHAT:
            identity[f"train.{key}"] = value
    return identity
