"""What a training run reads and how large its steps are: caches, images, rows, frozen weights.

One idea: each follows from the `[train]` table, the caches and the device alone, so that it can be
checked before a student is loaded. What makes two runs the same is in `identity`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import CacheMissing, ConfigError, StudentError
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.config.training import Train
from stillroom.pipeline.data.images import Pictures, processor_of
from stillroom.pipeline.data.joined import Joined
from stillroom.pipeline.data.loader import Geometry, rows_of
from stillroom.pipeline.data.packing import check_rows_hold
from stillroom.pipeline.data.records import RecordSource, lengths_of
from stillroom.pipeline.kernels.execution import triton_runs_on
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.student.llava import only_sees
from stillroom.pipeline.student.states import check_head_rows
from stillroom.pipeline.training.parallel import Parallel

CAPTURE_FIRST = (
    "Run `stillroom capture` with its run file first; where the cache lies elsewhere, correct its "
    "path (under [train], or the argument `cache`)."
)


def resolved(settings: Train, device: torch.device) -> Train:
    """Settings with `auto` decided for a device."""
    cuda = device.type == "cuda"
    decided = {}
    if settings.precision == "auto":
        decided["precision"] = "bfloat16" if cuda else "float32"
    if settings.kernel == "auto":
        decided["kernel"] = "triton" if cuda and triton_runs_on(device) else "chunked"
    return settings.model_copy(update=decided)


def check_attention(settings: Train, device: torch.device) -> None:
    """Refuse an attention that loads and answers on a device, and has no gradient there.

    Raises:
        StudentError: flex attention outside a GPU.
    """
    if settings.attention == "flex_attention" and device.type in ("cpu", "mps"):
        raise StudentError(
            f"flex_attention has no backward pass on {device.type}",
            expected="a GPU, or another attention",
            where="[train] attention",
            remedy="Set [train] attention = 'auto'.",
        )


def cache_locations(run: Run, settings: Train) -> dict[str, str]:
    """Where every cache of a run lies, by name; "" is the main one."""
    return {"": settings.cache or str(run.path("cache"))} | settings.caches


def open_caches(run: Run, settings: Train) -> dict[str, Any]:
    """Every cache of a run by name."""
    places = cache_locations(run, settings)
    found = {name: opened(location, settings) for name, location in places.items()}
    return found | {"": with_joined(found[""], settings)}


def corpus_of(run: Run) -> Path:
    """Directory of the prepared corpus that a run reads its text and its pictures from."""
    return Path((run.train.corpus if run.train else "") or run.path("corpus"))


def with_joined(main: Any, settings: Train) -> Any:
    """The main cache, with those of `[train] joined` behind it.

    Raises:
        PlanMismatch: they cannot be trained from together.
        StudentError: two of them are about the same text.
    """
    if not settings.joined:
        return main
    return Joined([main, *(opened(place, settings) for place in settings.joined)])


def opened(location: str, settings: Train) -> Any:
    """A sealed cache; one behind a URL through `[train] local_copy`.

    Raises:
        CacheMissing: nothing was captured there yet.
        CacheIncomplete: shards are missing.
    """
    from stillroom.pipeline.cache.reader import TeacherCache

    far = "://" in location and not location.startswith("file://")
    local = settings.local_copy if far else ""
    try:
        return TeacherCache.open(location, local, int(1e9 * settings.local_copy_gigabytes))  # bytes
    except CacheMissing as error:
        raise CacheMissing(error.found, where=error.where, remedy=CAPTURE_FIRST) from None


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
    corpus = Corpus.open(corpus_of(run))
    return Pictures(corpus.image_bytes, processor_of(student), caches, wanted)


def freeze(student: nn.Module, settings: Train) -> None:
    """Leave weights out of training.

    Raises:
        ConfigError: a pattern fits no weight, or nothing is left to train.
    """
    # A tied matrix goes by both of its names.
    named = dict(student.named_parameters(remove_duplicate=False))
    for pattern in settings.freeze:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(
                f"'{pattern}' fits no weight",
                expected="a pattern of the student's weights, which begin with "
                + ", ".join(sorted({".".join(name.split(".")[:2]) for name in named})),
                where="[train] freeze",
                remedy=nearest(pattern, named),
            )
        for name in found:
            named[name].requires_grad_(False)
    if settings.lora is None and not any(p.requires_grad for p in named.values()):
        raise ConfigError(
            "every weight of the student is frozen",
            where="[train] freeze",
            remedy="Leave out a pattern, or train adapters with [train.lora].",
        )


def check_pictured(distiller: nn.Module, cache: Any) -> None:
    """Refuse steps that change nothing.

    Raises:
        StudentError: only what sees is trained, and there is no picture.
    """
    if only_sees(distiller) and not cache.plan.facts.get("images"):
        raise StudentError(
            "only what sees is trained, and the cache is of texts without pictures",
            where="[train] freeze",
            remedy="Leave out a pattern, or train on a cache of a corpus with pictures.",
        )


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
    width = facts["teacher"].get("hidden_size", 0)  # a foreign cache has no hidden states
    return CacheFacts(
        signals=tuple(cache.signals),
        temperatures=tuple(cache.temperatures),
        vocab_size=facts["teacher"]["vocab_size"],
        widths={name: width for name in cache.signals if name.startswith("hidden.")},
        k=facts["capture"]["k"],
        nucleus=facts["capture"].get("nucleus") or 0.0,
        words=min(facts["tokenizer"].get("vocab_size", 0), facts["teacher"]["vocab_size"]),
    )


def check_fit(student: Path, caches: Mapping[str, Any]) -> None:
    """Refuse a student whose tokenizer is not the one the caches were made with.

    Args:
        student: HF directory.
        caches: what each is called in the run file -> cache.

    Raises:
        StudentError: naming the fact that differs, and what would work.
    """
    from stillroom.pipeline.corpus.tokenizer import tokenizer_facts

    own = tokenizer_facts(str(student))
    rows = json.loads((student / "config.json").read_text())
    head = rows.get("text_config", rows).get("vocab_size", own["vocab_size"])
    check_head_rows(head, own["vocab_size"], str(student))
    check_tokenizer(own, caches, str(student))


def check_tokenizer(
    own: Mapping[str, Any], caches: Mapping[str, Any], where: str, first: str = ""
) -> None:
    """Refuse a tokenizer that is not the one the caches were made with.

    Args:
        own: facts of the student's.
        caches: what each is called -> cache.
        where: the student, for messages.
        first: what to try first, of whoever asks.

    Raises:
        StudentError: naming the fact that differs, and what would work.
    """
    for name, cache in caches.items():
        for key, wanted in cache.plan.facts["tokenizer"].items():
            if own.get(key) != wanted:
                raise StudentError(
                    f"tokenizer {key} is {own.get(key)}",
                    expected=f"{wanted} as in {name}",
                    where=where,
                    remedy=f"{first}Take a student with the teacher's tokenizer (prune_layers, "
                    "prune_width or config), or capture the teacher again with the student's; "
                    "projection across tokenizers does not exist here.",
                )


def geometry_of(
    settings: Train, cache: RecordSource, parallel: Parallel, packed: bool = True
) -> Geometry:
    """Rows and microbatches of a step, and this rank's share.

    Args:
        settings: the [train] table.
        cache: the main one.
        parallel: the ranks.
        packed: several examples may share a row; otherwise a row is as long as the longest.

    Raises:
        ConfigError: a microbatch would not hold one row, or ranks do not divide a step.
        StudentError: an example does not fit into a row.
    """
    longest = longest_of(cache)
    capacity, rows = rows_of(longest, settings.batch_tokens, settings.sequence_length, packed)
    check_rows_hold(lengths_of(cache), capacity)
    return Geometry(
        capacity,
        rows,
        settings.accumulate,
        parallel.rank,
        parallel.world_size,
        padding_free=packed and settings.attention.startswith("flash_attention"),
        packed=packed,
    )


def heldout_geometry(trained: Geometry, settings: Train, cache: RecordSource) -> Geometry:
    """Rows that are long enough for held-out examples, whatever training's are."""
    capacity = max(longest_of(cache), trained.capacity if trained.packed else 2)
    rows = max(1, settings.batch_tokens // capacity)
    return replace(trained, capacity=capacity, rows=rows, accumulate=trained.world_size)


def longest_of(cache: RecordSource) -> int:
    """Tokens of a cache's longest example."""
    return int(lengths_of(cache).max(initial=2))
