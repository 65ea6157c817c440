"""A cache in the formats of other programs.

One idea: a file says what the cache says, in nested lists that anything opens or in the very layout
that a program reads; what a layout has no place for is refused rather than bent. A folder appears
whole, under its own name, when all of it is written.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache_schemas.errors import CacheError, ConfigError
from stillroom.cache_schemas.extras import extra_package
from stillroom.cache_schemas.signals import is_hidden
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.doors.distillkit_files import pack, write_settings
from stillroom.pipeline.record import TeacherRecord

GROUPS_PER_FILE = 64
ROWS_PER_GROUP = 64
"""Of Parquet: a hub's viewer reads whole row groups."""
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""How a URL begins, also one that was taken for a path and lost a slash."""


def export(
    cache: Any,
    target: str | Path,
    form: str,
    on_example: Callable[[int, int], None] = lambda *_: None,
) -> list[Path]:
    """Write a cache's examples in another format.

    Args:
        cache: an opened one.
        target: directory, which must not exist.
        form: a key of `FORMS`.
        on_example: called with examples done and examples of all.

    Returns:
        The files, relative to the target.

    Raises:
        ConfigError: no such format, or the target is there or is no directory of this machine.
        CacheError: the cache holds what the format has no place for, or lacks what it needs.
    """
    if form not in FORMS:
        known = ", ".join(FORMS)
        raise ConfigError(
            f"no format '{form}'", expected=f"one of {known}", remedy=nearest(form, FORMS)
        )
    if SCHEME.match(str(target)):
        raise ConfigError(
            "is a URL",
            expected="a directory of this machine",
            where=str(target),
            remedy="Export to a directory and copy that; `stillroom cache push` takes caches.",
        )
    target = Path(target)
    if target.exists():
        raise ConfigError("is already there", where=str(target), remedy="Name another directory.")
    with _appearing(target) as staging:
        FORMS[form](cache, _told(cache, on_example), staging)
    return sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory that gets its name when all of it is there, and is gone when it fails."""
    staging = target.with_name(f".{target.name}.stillroom-export")  # nobody else's
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _told(cache: Any, on_example: Callable[[int, int], None]) -> Iterator[TeacherRecord]:
    for number, record in enumerate(cache):
        yield record
        on_example(number + 1, len(cache))


def _tokens(record: TeacherRecord) -> dict[str, Any]:
    example = record.example
    return {
        "example_id": example.example_id,
        "source": example.source,
        "input_ids": example.token_ids,
        "loss_mask": example.loss_mask,
        "first_row": record.first_row,
    }


def _rows(record: TeacherRecord) -> dict[str, np.ndarray]:
    return {name: array for name, array in record.signals.items() if not is_hidden(name)}


def _to_parquet(_cache: Any, records: Iterator[TeacherRecord], target: Path) -> None:
    """Every row signal as nested lists; row t of `first_row + t` predicts the token after it."""
    _write_parquet(({**_tokens(one), **_rows(one)} for one in records), target)


def _write_parquet(rows: Iterable[dict[str, Any]], target: Path) -> None:
    """Files of rows, each column a list of numbers or a list of such lists; a row group at a time
    is in memory."""
    groups = map(_group, iter(partial(_few, iter(rows)), []))
    for file, first in enumerate(groups):
        path = target / f"data_{file}.parquet"
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            for group in chain([first], islice(groups, GROUPS_PER_FILE - 1)):
                writer.write_table(group)


def _few(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(islice(rows, ROWS_PER_GROUP))


def _group(held: list[dict[str, Any]]) -> pa.Table:
    columns = {name: [_listed(row[name]) for row in held] for name in held[0]}
    types = {name: _type(held[0][name]) for name in held[0]}
    return pa.table({n: pa.array(c, type=types[n]) for n, c in columns.items()})


def _listed(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return list(value)  # Arrow takes rows as arrays


def _type(value: Any) -> pa.DataType:
    if not isinstance(value, np.ndarray):
        return pa.int32() if isinstance(value, int) else pa.string()
    found: pa.DataType = pa.from_numpy_dtype(value.dtype)
    for _ in value.shape:
        found = pa.list_(found)
    return found


def _to_jsonl(cache: Any, records: Iterator[TeacherRecord], target: Path) -> None:
    """vLLM's `prompt_logprobs`: id -> log-probability and rank, null where there is no row."""
    if not cache.plan.facts["capture"].get("k", 0):
        raise _lacks("exact ids", "jsonl")
    with (target / "data.jsonl").open("w") as file:
        for record in records:
            file.write(json.dumps(_line(record)) + "\n")


def _line(record: TeacherRecord) -> dict[str, Any]:
    wanted = ("topk_ids", "topk_logprobs", "token_logprob", "token_rank")
    if missing := [name for name in wanted if name not in record.signals]:
        raise _lacks(f"signal {missing[0]}", "jsonl")
    tokens = record.example.token_ids
    entries: list[dict | None] = [None] * len(tokens)
    signals = [record.signals[name] for name in wanted]
    for row, (ids, logprobs, own, rank) in enumerate(zip(*signals)):
        at = record.first_row + row + 1
        ranked = {
            str(word): {"logprob": float(value), "rank": place + 1}
            for place, (word, value) in enumerate(zip(ids, logprobs))
            if word >= 0
        }
        # Lists may be rounded where the token's own is not: it stays below what ranks before it.
        least = min((told["logprob"] for told in ranked.values()), default=0.0)
        token = {"logprob": min(float(own), least), "rank": int(rank)}
        entries[at] = {**ranked, **({} if str(tokens[at]) in ranked else {str(tokens[at]): token})}
    return {
        "example_id": record.example.example_id,
        "prompt_token_ids": tokens.tolist(),
        "loss_mask": record.example.loss_mask.tolist(),
        "first_row": record.first_row,
        "prompt_logprobs": entries,
    }


def _to_distillkit(cache: Any, records: Iterator[TeacherRecord], target: Path) -> None:
    """Its Parquet and the YAML beside it, nothing lost; a row for every prediction of a text."""
    facts = cache.plan.facts
    k, vocab_size = facts["capture"].get("k", 0), facts["teacher"].get("vocab_size", 0)
    if not k or not vocab_size:
        raise _lacks("exact ids", "distillkit")
    settings = write_settings(target, vocab_size, k)

    def row(record: TeacherRecord) -> dict[str, Any]:
        ids, logprobs = record.signals.get("topk_ids"), record.signals.get("topk_logprobs")
        if ids is None or logprobs is None:
            raise _lacks("exact ids", "distillkit")
        if record.first_row or (ids < 0).any():
            if record.first_row:
                raise _lacks("rows from the first token on", "distillkit", FROM_THE_START)
            raise _lacks(f"{k} ids in every row", "distillkit")
        values = logprobs.astype("<f4").view(np.uint8).reshape(len(ids), -1)
        return {
            "input_ids": record.example.token_ids.astype(np.uint64),
            "compressed_logprobs": values,
            "bytepacked_indices": pack(ids, settings.index_bits),
        }

    _write_parquet(map(row, records), target)


def _to_speculators(cache: Any, records: Iterator[TeacherRecord], target: Path) -> None:
    """What `ArrowDataset` of speculators 0.9 reads: a data set on disk of `input_ids`, `loss_mask`
    and `seq_len`, and `hidden_states/hs_{i}.safetensors` with `token_ids` [n] and `hidden_states`
    [n, layers, D], bf16, layers in order and the final state last.

    A cache has no state of a text's last token, which predicts nothing: n is one less than L.
    """
    import torch
    from safetensors.torch import save_file

    names, keep = _layers(cache), _data_set()
    (target / "hidden_states").mkdir()
    tokens = []
    for number, record in enumerate(records):
        kept = record.example.token_ids[:-1].astype(np.int64)
        if not np.array_equal(record.hidden_positions, np.arange(len(kept))):
            every = f'[capture] hidden_rows = "all" and hidden_stride = 1. {FROM_THE_START}'
            raise _lacks("hidden states from the first token on", "speculators", every)
        states = np.stack([record.signals[name] for name in names], axis=1)  # [L, layers, D]
        save_file(
            {
                "token_ids": torch.from_numpy(kept),
                "hidden_states": torch.from_numpy(states).to(torch.bfloat16),
            },
            target / "hidden_states" / f"hs_{number}.safetensors",
        )
        mask = record.example.loss_mask[:-1].astype(np.int64)
        tokens.append({"input_ids": kept, "loss_mask": mask, "seq_len": len(kept)})
    keep(tokens, target)
    told = {"layers": names, "cache": cache.plan.digest}
    (target / "layers.json").write_text(json.dumps(told) + "\n")


def _data_set() -> Callable[[list[dict[str, Any]], Path], None]:
    """Writes rows as a data set on disk whose items are tensors."""
    datasets = extra_package("datasets", "hf", "--to speculators")

    def keep(rows: list[dict[str, Any]], target: Path) -> None:
        shown = not datasets.utils.are_progress_bars_disabled()
        datasets.utils.disable_progress_bars()
        datasets.Dataset.from_list(rows).with_format("torch").save_to_disk(target)
        if shown:
            datasets.utils.enable_progress_bars()

    return keep


def _layers(cache: Any) -> list[str]:
    names = [name for name in cache.signals if is_hidden(name)]
    if not names:
        raise _lacks("hidden states", "speculators")
    number = {name: name.partition(".")[2] for name in names}
    return sorted(names, key=lambda n: int(number[n]) if number[n].isdigit() else 1 << 30)


def _to_safetensors(_cache: Any, records: Iterator[TeacherRecord], target: Path) -> None:
    """`{number}.safetensors`: tokens, mask, every signal by its name, and where the rows begin."""
    from safetensors.numpy import save_file

    for number, record in enumerate(records):
        arrays = {
            "input_ids": record.example.token_ids,
            "loss_mask": record.example.loss_mask,
            "first_row": np.array([record.first_row], dtype=np.int32),
            "hidden_positions": record.hidden_positions,
            **record.signals,
        }
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {"example_id": record.example.example_id, "source": record.example.source}
        save_file(held, target / f"{number}.safetensors", metadata)


FROM_THE_START = (
    "No setting keeps the rows before a chat's first answer, or of what a window repeats: prepare "
    "the chats as text (written as their template writes them, in a [[prepare.source]] "
    "text_column, overlap = 0 and a window that holds the longest) and capture that"
)


def _lacks(what: str, form: str, remedy: str = "Capture it") -> CacheError:
    return CacheError(
        f"the cache lacks {what}",
        where=f"--to {form}",
        remedy=f"{remedy}; or export to parquet, which takes what is there.",
    )


FORMS: dict[str, Callable[[Any, Iterator[TeacherRecord], Path], None]] = {
    "parquet": _to_parquet,
    "jsonl": _to_jsonl,
    "distillkit": _to_distillkit,
    "speculators": _to_speculators,
    "safetensors": _to_safetensors,
}
