"""vLLM against the model's definition, on a few texts, before anything it says is kept.

One idea: an engine with faults of its own is found by asking another: the shortest and the longest
text of the corpus, and some more (`checked_texts`), are also read by transformers, eagerly, in
float32. In half precision an engine cannot be as near as that, so it may be as far as transformers
itself in the same precision, and some (`rounding`). The reference runs in a process of its own, on
the processor, beside vLLM's accelerator; blocks that do not fit into memory stay on disk until they
are needed.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stillroom.cache_schemas.errors import StillroomError, TeacherError
from stillroom.cache_schemas.manifest import DefinitionCheck
from stillroom.pipeline.config import Capture, Teacher
from stillroom.pipeline.record import Example, TeacherRecord
from stillroom.pipeline.teacher.agreement import Gap, gap_between
from stillroom.pipeline.teacher.checked_texts import (
    choose,
    in_order_of_cost,
    is_further,
    without_further,
)
from stillroom.pipeline.teacher.facts import dtype_of, model_config, model_directory
from stillroom.pipeline.teacher.identity import stored_dtype, weight_files
from stillroom.pipeline.teacher.images import Pictures
from stillroom.pipeline.teacher.protocol import RejectedExample, TeacherEngine
from stillroom.pipeline.teacher.reference.apart import answers_apart
from stillroom.pipeline.teacher.rounding import faults

SECONDS, SHARE = 120.0, 0.01
"""What `auto` may take: so long, or this share of the capture, whichever is more."""
SMALL, LARGE = 1e-4, 1 << 12
"""Nats, or share of a state, that float32 may be off in a model of at most LARGE = depth * width;
rounding errors add up like the steps of a random walk beyond. SmolLM2-135M: 7e-5 of 2e-4 nats."""
BYTES_PER_SECOND = 200e6
SPARE = 0.8
"""Weights read from a slow disk; share of free memory to use."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the check is about.

    Attributes:
        teacher, capture: as the engine was opened with.
        examples: of the corpus.
        pictures: of the examples.
        tokens: of the whole capture.
        table: of the run file, whose `check` says whether it is done.
    """

    teacher: Teacher
    capture: Capture
    examples: Sequence[Example]
    pictures: Pictures | None
    tokens: int
    table: str = "capture"


def check_definition(engine: TeacherEngine, asked: Question) -> DefinitionCheck:
    """Compare a running engine with the definition of its model.

    Returns:
        How far apart they are, or why that was not found out.

    Raises:
        TeacherError: they differ, or (`check = "always"`) cannot be compared.
    """
    if asked.capture.check == "never":
        return DefinitionCheck(done=False, reason=f'[{asked.table}] check = "never"')
    start = time.monotonic()
    chosen = choose(asked.examples)
    try:
        said = _said(engine, chosen)
        chosen = {name: chosen[name] for name in said}
        seconds = time.monotonic() - start
        tokens = sum(len(example.token_ids) for example in chosen.values())
        limit = max(SECONDS, SHARE * asked.tokens * seconds / max(tokens, 1))
        found = _compare(asked, chosen, said, limit)
    except _NotDone as reason:
        found = DefinitionCheck(done=False, reason=str(reason))
    if not found.done and asked.capture.check == "always":
        raise TeacherError(
            f"vLLM cannot be compared with the model's definition ({found.reason})",
            where=f'[{asked.table}] check = "always"',
            remedy='Set check = "auto" to go on without.',
        )
    return found.model_copy(update={"seconds": round(time.monotonic() - start, 1)})


class Differs(TeacherError):
    """An engine does not say what the model's definition says."""


class _NotDone(Exception):
    """Why the check cannot be done."""


def _said(engine: TeacherEngine, chosen: dict[str, Example]) -> dict[str, list[TeacherRecord]]:
    """The engine's answers; a further text that it cannot answer is no reason to compare none."""
    said = {}
    for name, example in chosen.items():
        try:
            said[name] = _answer(engine, example)
        except _NotDone:
            if not is_further(name):
                raise
    return said


def _answer(engine: TeacherEngine, example: Example) -> list[TeacherRecord]:
    try:
        return list(engine.score([example]))
    except RejectedExample as error:  # for capture to stop at, or to set aside
        raise _NotDone(str(error)) from None


def _compare(
    asked: Question,
    chosen: dict[str, Example],
    said: dict[str, list[TeacherRecord]],
    limit: float,
) -> DefinitionCheck:
    dtype = dtype_of(asked.teacher)
    within, left_out = _within(asked, chosen, limit, runs=1 if dtype == "float32" else 2)
    seconds = None if asked.capture.check == "always" else limit
    truth = _answers(asked, within, "float32", seconds)
    gaps = {name: gap_between(said[name], truth[name]) for name in within}
    noise = Gap()
    if dtype != "float32":
        own = _answers(asked, within, dtype, seconds)
        for name in within:
            noise.add(gap_between(own[name], truth[name]))
    for name, gap in gaps.items():
        _judge(asked, f"the {name} text, {len(within[name].token_ids)} tokens", gap, noise)
    total = Gap()
    for gap in gaps.values():
        total.add(gap)
    _judge(asked, f"{len(gaps)} texts together", total, noise)
    return DefinitionCheck(
        done=True,
        reason=left_out,
        tokens=sum(len(example.token_ids) for example in within.values()),
        logprob=total.logprob,
        hidden=total.hidden,
        noise=noise.logprob,
    )


def _judge(asked: Question, where: str, gap: Gap, noise: Gap) -> None:
    """Refuse differences beyond what rounding explains.

    Raises:
        Differs: names all of them.
    """
    small = SMALL * max(1.0, (_size(asked) / LARGE) ** 0.5)
    if not (found := faults(gap, noise, small)):
        return
    dtype = dtype_of(asked.teacher)
    raise Differs(
        f"vLLM does not say what the model's definition says: {' and '.join(found)} on {where}",
        expected="what transformers says, eager, in float32"
        + (f", within the rounding of {dtype}" if noise.rows else ""),
        where=asked.teacher.model,
        remedy=f'{_remedy(asked, dtype)} Nothing was captured; check = "never" under '
        f"[{asked.table}] keeps vLLM's answers as they are.",
    )


def _remedy(asked: Question, dtype: str) -> str:
    if limit := _longrope_limit(asked):
        return (
            "vLLM takes one set of LongRoPE's factors for all lengths: prepare with "
            f"[prepare] window < {limit}, or use `--engine reference`."
        )
    if dtype == "float32":
        return "Use `--engine reference`."
    return (
        'Set dtype = "float32" under [teacher], where rounding is no question; what is refused '
        "there too is vLLM's own fault: use `--engine reference`."
    )


def _longrope_limit(asked: Question) -> int:
    """Length where LongRoPE changes its factors; 0 for other models."""
    config = _text_config(asked)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return 0
    said = rope.get("original_max_position_embeddings")
    return said or getattr(config, "original_max_position_embeddings", 0) or 0


def _text_config(asked: Question) -> Any:
    return model_config(asked.teacher).get_text_config()


def _size(asked: Question) -> int:
    config = _text_config(asked)
    return config.num_hidden_layers * config.hidden_size


def _within(
    asked: Question, chosen: dict[str, Example], limit: float, runs: int
) -> tuple[dict[str, Example], str]:
    """Those of the texts that the time allows, and which are left out.

    Raises:
        _NotDone: none.
    """
    if asked.capture.check == "always":
        return chosen, ""
    num_bytes = sum(path.stat().st_size for path in weight_files(model_directory(asked.teacher)))
    seconds = runs * num_bytes / BYTES_PER_SECOND
    per_token = runs * num_bytes / _products_per_second()  # 2 operations for each 2 bytes
    kept: dict[str, Example] = {}
    # Blocks that stay on disk are read for every text, so there it remains at the first ones.
    asked_for = chosen if _fits(asked.teacher) else without_further(chosen)
    for name, example in sorted(asked_for.items(), key=in_order_of_cost):
        seconds += per_token * len(example.token_ids)
        if seconds > limit:
            break
        kept[name] = example
    if not kept:
        raise _NotDone(f"it would take some {seconds:.0f} s of {limit:.0f} s")
    lacking = [name for name in without_further(chosen) if name not in kept]
    out = [f"{name} ({len(chosen[name].token_ids)} tokens)" for name in lacking]
    return kept, f"for want of time without the text that is {', '.join(out)}" if out else ""


def _products_per_second() -> float:
    """Multiply-adds in float32 on this processor."""
    square = torch.ones(512, 512)
    start = time.perf_counter()
    for _ in range(4):
        square = square @ square * 1e-3
    return 4 * 512**3 / (time.perf_counter() - start)


def _answers(
    asked: Question, chosen: dict[str, Example], dtype: str, seconds: float | None
) -> dict[str, list[TeacherRecord]]:
    teacher = asked.teacher.model_copy(update={"dtype": dtype})
    try:
        with _room(teacher) as placement:
            records = answers_apart(
                teacher,
                asked.capture,
                list(chosen.values()),
                asked.pictures,
                placement=placement,
                seconds=seconds,
            )
    except (StillroomError, TimeoutError) as error:
        raise _NotDone(f"transformers: {error}") from error
    return {name: [record] for name, record in zip(chosen, records, strict=True)}


@contextmanager
def _room(teacher: Teacher) -> Iterator[dict[str, Any]]:
    """Where the weights go: memory, or as many as fit there and the others on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        size, free = _bytes_of(teacher), SPARE * _free_bytes()
        if size <= free:
            yield {}
            return
        try:
            import accelerate  # noqa: F401
        except ImportError:
            raise _NotDone(
                f"the model's {size / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB of memory, "
                "and accelerate, which keeps blocks on disk, is not installed"
            ) from None
        yield {
            "device_map": "auto",
            "max_memory": {"cpu": int(free / 2)},
            "offload_folder": os.path.join(scratch, "blocks"),
        }


def _bytes_of(teacher: Teacher) -> float:
    """Of the weights, in the precision they are run in."""
    directory = model_directory(teacher)
    width = {"float32": 4}.get(teacher.dtype, 2)
    stored = {"float32": 4}.get(stored_dtype(directory), 2)
    return sum(path.stat().st_size for path in weight_files(directory)) * width / stored


def _fits(teacher: Teacher) -> bool:
    """Whether memory holds the model in float32."""
    return _bytes_of(teacher.model_copy(update={"dtype": "float32"})) <= SPARE * _free_bytes()


def _free_bytes() -> float:
    """Memory that a program may take."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
