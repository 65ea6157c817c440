"""How caches look: tables of facts, and tokens with the teacher's guesses; or the facts as JSON.

One idea: text from a cache is a stranger's, and is printed by `console`, which makes it safe; here
it is only kept short.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache_schemas.manifest import DefinitionCheck, Plan
from stillroom.cache_schemas.signals import ITEM_PREFIX
from stillroom.pipeline.cache.care.overview import Overview
from stillroom.pipeline.cache.storage.protocol import Storage
from stillroom.pipeline.plain_text import plain
from stillroom.stages.console import say, table

LS_COLUMNS = ["cache", "state", "shards", "holds", "bytes each", "GB", "plan"]


def ls_row(seen: Overview, directory: Path) -> list[str]:
    """One line of `ls`, its path relative to where it looked."""
    state = "sealed" if seen.sealed else "unfinished"
    unit = unit_of(seen.plan)
    count = seen.num_examples if unit else seen.num_tokens
    return [
        os.path.relpath(seen.location, directory),
        state,
        f"{seen.shards_done:,}/{seen.plan.num_shards:,}",
        f"{count:,} {_plural(unit or 'token')}{_emptiness(seen)}",
        f"{seen.num_bytes / max(count, 1):,.1f}",
        f"{seen.num_bytes / 1e9:.3f}",
        seen.plan.digest[:8],
    ]


def ls_json(found: list) -> list[dict[str, Any]]:
    """The same for a program; what cannot be read says why."""
    return [
        facts_json(seen) if isinstance(seen, Overview) else {"location": seen[0], "error": seen[1]}
        for seen in found
    ]


def facts_table(seen: Overview) -> None:
    """Identity and sizes of one cache."""
    facts, capture = seen.plan.facts, seen.plan.facts["capture"]
    rows = [
        ("plan", seen.plan.digest[:16]),
        ("teacher", seen.teacher),
        ("engine", _engine(facts.get("engine"))),
        ("against definition", _definition(seen.definition)),
        ("tokenizer", str(facts["tokenizer"].get("sha256", ""))[:16]),
        ("corpus", str(facts["corpus"].get("digest", ""))[:16]),
        *[("split", str(split)[:16]) for split in [facts["corpus"].get("split")] if split],
        *_asked(capture, unit_of(seen.plan)),
        *[("row signals", ", ".join(seen.plan.row_signals))] * bool(seen.plan.row_signals),
        *[("dense signals", _dense(seen))] * bool(seen.plan.dense_signals or seen.plan.row_signals),
        *[("example signals", ", ".join(seen.plan.example_signals))]
        * bool(seen.plan.example_signals),
        ("shards", f"{seen.shards_done:,} of {seen.plan.num_shards:,}"),
        *_sizes(seen),
    ]
    table(seen.location, ["", "value"], [list(row) for row in rows])


def facts_json(seen: Overview) -> dict[str, Any]:
    """The same for a program; sizes are of what is there."""
    return {
        "location": seen.location,
        "plan": seen.plan.digest,
        "sealed": seen.sealed,
        "shards": {"done": seen.shards_done, "count": seen.plan.num_shards},
        "examples": seen.plan.num_examples,
        "tokens": seen.num_tokens,
        "bytes": seen.num_bytes,
        "bytes_per_token": seen.bytes_per_token,
        "bytes_per_example": seen.bytes_per_example,
        "signals": {
            "rows": list(seen.plan.row_signals),
            "dense": list(seen.dense),
            "dense_of_the_whole": list(seen.plan.dense_signals),
            "examples": list(seen.plan.example_signals),
        },
        "empty_lists": {"empty": seen.empty.empty, "of": seen.empty.lists} if seen.empty else None,
        "definition": seen.definition.model_dump(mode="json") if seen.definition else None,
        "facts": seen.plan.facts,
    }


def unit_of(plan: Plan) -> str:
    """What one example of a cache without tokens is; empty for answers to texts."""
    if any(name.startswith(ITEM_PREFIX) for name in plan.dense_signals):
        return "item"
    if "candidate_ids" in plan.example_signals:
        return "history"
    return "image" if "encoders" in plan.facts["teacher"] else ""


def _emptiness(seen: Overview) -> str:
    """Behind the number of lists, where some say nothing."""
    if seen.empty is None or not seen.empty.empty:
        return ""
    return f", {seen.empty.empty:,} of {seen.empty.lists:,} lists empty"


def _plural(unit: str) -> str:
    return {"history": "histories"}.get(unit, f"{unit}s")


def _asked(capture: dict[str, Any], unit: str) -> list[tuple[str, str]]:
    """What was wanted of the teacher, in the words of its table."""
    if unit == "history":
        kept = "left out" if capture.get("seen") == "drop" else "kept"
        said = f"{capture.get('method')}, k = {capture.get('candidates')}, items seen {kept}"
        return [("lists", said)]
    if unit == "item":
        return [("pooling", str(capture.get("pooling")))]
    if unit:
        return [("profile", str(capture.get("profile")))]
    return [
        ("profile", f"{capture.get('profile')}, k = {capture.get('k')}"),
        ("temperatures", ", ".join(f"{t:g}" for t in capture.get("temperatures", ()))),
    ]


def _sizes(seen: Overview) -> list[tuple[str, str]]:
    unit = unit_of(seen.plan)
    sizes = seen.bytes_per_example if unit else seen.bytes_per_token
    each = ", ".join(f"{kind} {size:,.1f}" for kind, size in sizes.items())
    tokens = [] if unit else [("tokens", f"{seen.num_tokens:,}")]
    counts = [(_plural(unit or "example"), f"{seen.plan.num_examples:,}"), *tokens]
    counts += [("empty lists", seen.empty.words or "none")] if seen.empty else []
    return [*counts, ("bytes", f"{seen.num_bytes:,}"), (f"bytes/{unit or 'token'}", each)]


def _engine(facts: Any) -> str:
    values = facts.values() if isinstance(facts, dict) else [facts]
    return " ".join(str(value) for value in values)


def _dense(seen: Overview) -> str:
    held, every = ", ".join(seen.dense) or "none", seen.plan.dense_signals
    return held if len(seen.dense) == len(every) else f"{held} (a part of {', '.join(every)})"


def _definition(found: DefinitionCheck | None) -> str:
    if found is None:
        return "not noted"
    if not found.done:
        return f"not compared: {found.reason}"
    hidden = "".join(f", {name} {value:.2g}" for name, value in found.hidden.items())
    noise = f" (its own precision: {found.noise:.2g})" if found.noise else ""
    more = f"; {found.reason}" if found.reason else ""
    how = f"{found.tokens} tokens, {found.seconds:.0f} s"
    return f"log p within {found.logprob:.2g} nats{noise}{hidden} ({how}){more}"


def guesses_table(storage: Storage, number: int, rows: int, guesses: int, tokenizer: str) -> None:
    """Tokens of one example: what came before, what came, and what the teacher expected."""
    from stillroom.pipeline.cache.reader import TeacherCache

    cache = TeacherCache.open(storage)
    if not 0 <= number < len(cache):
        from stillroom.cache_schemas.errors import CacheError

        raise CacheError(f"no example {number}", expected=f"0 to {len(cache) - 1}")
    record = cache.read(number, [name for name in WANTED if name in cache.signals])
    drawn = not cache.plan.facts["capture"].get("k") and "draw_ids" in cache.signals
    words = words_of(cache.plan.facts["tokenizer"].get("sha256", ""), tokenizer)
    lines = []
    for row in range(min(rows, record.num_rows)):
        token = record.first_row + row
        following = words(int(record.example.token_ids[token + 1]))
        line = [words(int(record.example.token_ids[token])), following]
        lines.append(
            [*line, *_row(record.signals, row), _guesses(record.signals, row, guesses, words)]
        )
    title = f"example {number} of {len(cache):,} ({plain(record.example.source, 40)})"
    heard = "the teacher's draws" if drawn else "the teacher's top guesses"
    table(title, ["after", "came", "log p", "rank", "tail", heard], lines)
    if not tokenizer:
        sha256 = str(cache.plan.facts["tokenizer"].get("sha256", ""))[:12]
        say(f"token ids are shown: pass --tokenizer DIR, the teacher's (its tokenizer is {sha256})")


WANTED = (
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "token_logprob",
    "token_rank",
    "draw_ids",
    "draw_counts",
)


def _row(signals: dict[str, np.ndarray], row: int) -> list[str]:
    tail = math.exp(float(signals["tail_logprob"][row])) if "tail_logprob" in signals else math.nan
    logprob = float(signals["token_logprob"][row]) if "token_logprob" in signals else math.nan
    rank = str(int(signals["token_rank"][row])) if "token_rank" in signals else ""
    return [f"{logprob:.3f}", rank, f"{tail:.3f}"]


def _guesses(
    signals: dict[str, np.ndarray], row: int, guesses: int, words: Callable[[int], str]
) -> str:
    if "topk_ids" in signals and signals["topk_ids"].shape[1]:
        pairs = zip(signals["topk_ids"][row][:guesses], signals["topk_logprobs"][row][:guesses])
        return "  ".join(f"{words(int(i))} {math.exp(float(p)):.2f}" for i, p in pairs if i >= 0)
    if "draw_ids" not in signals:
        return ""
    often = np.argsort(-signals["draw_counts"][row], kind="stable")[:guesses]
    pairs = zip(signals["draw_ids"][row][often], signals["draw_counts"][row][often])
    return "  ".join(f"{words(int(i))} x{times}" for i, times in pairs if i >= 0)


def words_of(expected: str, tokenizer: str, most: int = 24) -> Callable[[Any], str]:
    """Token id, or several -> quoted text of `most` characters; the id itself without a
    tokenizer."""
    if not tokenizer:
        return str
    from transformers import AutoTokenizer

    from stillroom.stages.cache.arguments import check_tokenizer

    check_tokenizer(tokenizer, expected)
    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    return lambda tokens: f"'{plain(loaded.decode(np.atleast_1d(tokens)), most)}'"
