"""The plan: every fact that changes what a cache means, and the digest that names it.

One idea: facts are plain JSON, so that two plans can be compared key by key and a stranger's plan
can be checked before anything is computed from it. It reads and writes no file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from stillroom.cache_schemas import canonical
from stillroom.cache_schemas.differing import differences
from stillroom.cache_schemas.errors import CacheError, FormatTooNew, ShardCorrupt
from stillroom.cache_schemas.room import MAX_PER_SHARD, MAX_SHARDS, check_room
from stillroom.cache_schemas.signals import EXAMPLE_SIGNALS, ROW_SIGNALS, hidden_name

FORMAT_VERSION = 1


def check_version(found: Any, where: str) -> None:
    """Refuse a document of a later format.

    Raises:
        FormatTooNew: the version is above this release's.
        ShardCorrupt: the version is not a positive integer.
    """
    if type(found) is not int or found < 1:
        raise ShardCorrupt(f"format version {found!r} is not a version", where=where)
    if found > FORMAT_VERSION:
        raise FormatTooNew(
            f"format version {found}",
            expected=f"at most {FORMAT_VERSION}",
            where=where,
            remedy="Update stillroom to read it.",
        )


@dataclass(frozen=True)
class Plan:
    """Every fact that changes what a cache means.

    Attributes:
        facts: nested JSON with the keys of `make`, and `format_version`.
    """

    facts: dict[str, Any]

    @classmethod
    def make(
        cls,
        *,
        teacher: Mapping[str, Any],
        engine: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        corpus: Mapping[str, Any],
        capture: Mapping[str, Any],
        num_examples: int,
        max_tokens: int,
        images: bool = False,
        signals: Mapping[str, Any] | None = None,
    ) -> "Plan":
        """A plan of one capture.

        Args:
            teacher: needs `vocab_size`, and `hidden_size` when hidden states are kept.
            engine: name and versions.
            tokenizer: its hashes.
            corpus: needs `digest`; everything else is for the reader's information.
            capture: a dumped [capture] table; `temperatures` sorted and with 1.0.
            num_examples: examples of the captured split, in the corpus's order.
            max_tokens: tokens of the longest example; bounds the dense arrays.
            images: True when examples may have image spans.
            signals: overrides what `capture` implies (see `signals_of`).

        Raises:
            CacheError: there is no example.
        """
        if num_examples < 1:
            remedy = "Prepare more text, or choose another split."
            raise CacheError("there is no example to keep", where="plan", remedy=remedy)
        per_shard = int(capture["examples_per_shard"])
        check_room(num_examples, per_shard)
        facts = {
            "format_version": FORMAT_VERSION,
            "teacher": dict(teacher),
            "engine": dict(engine),
            "tokenizer": dict(tokenizer),
            "corpus": dict(corpus),
            "capture": dict(capture),
            "signals": dict(signals or signals_of(capture, teacher, max_tokens)),
            "images": images,
            "shards": {
                "count": -(-num_examples // per_shard),
                "examples_per_shard": per_shard,
                "num_examples": num_examples,
            },
        }
        return cls(json.loads(json.dumps(facts)))

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over the canonical JSON of the facts; names the cache."""
        return canonical.digest({"facts": self.facts})

    @property
    def num_examples(self) -> int:
        """Examples of the whole cache."""
        return self.facts["shards"]["num_examples"]

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return self.facts["shards"]["count"]

    @property
    def examples_per_shard(self) -> int:
        """Examples of every shard but the last."""
        return self.facts["shards"]["examples_per_shard"]

    @property
    def row_signals(self) -> tuple[str, ...]:
        """Names of the signals with axis `row`, sorted."""
        return tuple(self.facts["signals"]["rows"])

    @property
    def dense_signals(self) -> dict[str, dict[str, Any]]:
        """Dense signal -> {positions (at most), width, codec}."""
        return self.facts["signals"]["dense"]

    @property
    def example_signals(self) -> tuple[str, ...]:
        """Names of the signals with axis `example`, sorted; most plans have none."""
        return tuple(self.facts["signals"].get("examples", ()))

    def shard_range(self, shard: int) -> range:
        """Example numbers of one shard."""
        start = shard * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.num_examples))

    def differences(self, other: "Plan") -> list[str]:
        """One sentence per fact that differs: `key: found other's, expected this one's`. What only
        one of the two records at all, such as a table that is newer than the other, is one fact."""
        return differences(self.facts, other.facts)

    def to_bytes(self) -> bytes:
        """The content of plan.json."""
        return canonical.sign({"facts": self.facts}, indent=1)

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "plan.json") -> "Plan":
        """Read plan.json.

        Raises:
            ShardCorrupt: it is not a plan.
            FormatTooNew: a later release wrote it.
        """
        return cls.from_facts(canonical.check(data, where).get("facts"), where)

    @classmethod
    def from_facts(cls, facts: Any, where: str) -> "Plan":
        """A plan of untrusted facts: versions, sizes and signal names are checked."""
        check_version(facts.get("format_version") if isinstance(facts, dict) else None, where)
        try:
            _PlanShape.model_validate(facts)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ShardCorrupt(f"plan key '{key}': {first['msg']}", where=where) from None
        shards = facts["shards"]
        if -(-shards["num_examples"] // shards["examples_per_shard"]) != shards["count"]:
            raise ShardCorrupt("the plan's shard count does not fit its examples", where=where)
        return cls(facts)


def signals_of(
    capture: Mapping[str, Any], teacher: Mapping[str, Any], max_tokens: int
) -> dict[str, Any]:
    """The signals that a [capture] table asks for: `{"rows": [...], "dense": {...}}`."""
    rows = ["topk_ids", "topk_logprobs", "tail_logprob", "token_logprob", "token_rank", "lse"]
    rows += ["entropy"] * bool(capture.get("entropy"))
    rows += ["logit_mean", "logit_std", "zscore_lse"] * bool(capture.get("moments"))
    rows += ["draw_ids", "draw_counts"] * bool(capture.get("tail_draws"))
    shape = {
        "positions": max_tokens,
        "width": teacher.get("hidden_size"),
        "codec": {"name": capture.get("hidden_codec"), "step": capture.get("hidden_step")},
    }
    layers = capture.get("hidden_layers") or ()
    return {"rows": sorted(rows), "dense": {hidden_name(layer): shape for layer in layers}}


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,40}(\.[A-Za-z0-9_-]{1,64})?$")]


MAX_CHUNK_ELEMENTS = 1 << 27
"""Elements of one example's chunk of a dense signal, at most: 256 MB of 16 bits, unpacked whole
though the example may use little of it."""


class _DenseCodec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Literal["bf16", "fp16", "int8", "fp8", "step"]
    step: Annotated[float, Field(gt=0, le=16)] | None


class _DenseShape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    positions: Annotated[int, Field(ge=1, le=1 << 24)]
    width: Annotated[int, Field(ge=1, le=1 << 20)]
    codec: _DenseCodec

    @model_validator(mode="after")
    def _fits_memory(self) -> "_DenseShape":
        if self.positions * self.width > MAX_CHUNK_ELEMENTS:
            raise ValueError(f"chunks of more than {MAX_CHUNK_ELEMENTS} elements")
        return self


class _Signals(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rows: list[Name]

    dense: dict[Name, _DenseShape]

    examples: list[Name] = []

    @field_validator("rows")
    @classmethod
    def _known(cls, rows: list[str]) -> list[str]:
        if rows != sorted(set(rows) & ROW_SIGNALS.keys()):
            raise ValueError("row signals that are unknown, repeated or not in order")
        return rows

    @field_validator("dense")
    @classmethod
    def _has_no_files_name(cls, dense: dict[str, _DenseShape]) -> dict[str, _DenseShape]:
        if "zarr.json" in dense:
            raise ValueError("a dense signal with the name of the group's own file")
        return dense

    @field_validator("examples")
    @classmethod
    def _known_of_examples(cls, examples: list[str]) -> list[str]:
        if not examples or examples != sorted(set(examples) & EXAMPLE_SIGNALS.keys()):
            raise ValueError("example signals that are unknown, repeated or not in order")
        return examples


class _Shards(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    count: Annotated[int, Field(ge=1, le=MAX_SHARDS)]
    examples_per_shard: Annotated[int, Field(ge=1, le=MAX_PER_SHARD)]
    num_examples: Annotated[int, Field(ge=1, le=MAX_SHARDS * MAX_PER_SHARD)]


class _Teacher(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    vocab_size: Annotated[int, Field(ge=1, le=1 << 22)] = 1


class _Catalogue(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    digest: str
    items: Annotated[int, Field(ge=1, lt=1 << 31)]


class _Capture(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    profile: Literal["small", "strict", "exact", "portable"]
    k: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    tail_draws: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    temperatures: Annotated[list[float], Field(min_length=1, max_length=256)] = [1.0]
    candidates: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    catalogue: _Catalogue | None = None


class _PlanShape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    teacher: _Teacher
    capture: _Capture
    corpus: dict[str, Any]
    tokenizer: dict[str, Any]
    images: bool
    signals: _Signals
    shards: _Shards

    @model_validator(mode="after")
    def _something_is_kept(self) -> "_PlanShape":
        rows, capture = self.signals.rows, self.capture
        if ("draw_ids" in rows) > (capture.tail_draws > 0):
            raise ValueError("draws without a number of draws (capture.tail_draws)")
        if "topk_ids" in rows and not capture.k and "draw_ids" not in rows:
            raise ValueError("k = 0 keeps no exact ids, so draws are needed")
        lists = {"candidate_ids", "candidate_distances"} & set(self.signals.examples)
        if lists and (len(lists) < 2 or not capture.candidates or capture.catalogue is None):
            raise ValueError("candidates need ids, distances, capture.candidates and .catalogue")
        return self
