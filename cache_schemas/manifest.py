"""Receipt and manifest: what one shard holds, and what all shards hold.

One idea: a receipt binds the bytes of one shard to a plan and is its commit; the manifest binds all
receipts. Both are documents of `canonical.py`. This module reads and writes no file; the plan is
`plan.py`, whose names can also be had from here.
"""

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from stillroom.cache_schemas import canonical
from stillroom.cache_schemas.errors import ShardCorrupt
from stillroom.cache_schemas.plan import FORMAT_VERSION, Plan, check_version, signals_of

__all__ = [
    "FORMAT_VERSION",
    "DefinitionCheck",
    "FileEntry",
    "Manifest",
    "Plan",
    "Records",
    "ShardReceipt",
    "ShardTable",
    "check_version",
    "read",
    "signals_of",
]

Count = Annotated[int, Field(ge=0, le=1 << 53)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=1 << 12)]
Xxh3 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Document(BaseModel):
    """A strict, immutable value with a JSON form that carries its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return canonical.sign(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical form."""
        return canonical.digest(self.model_dump(mode="json"))


AnyDocument = TypeVar("AnyDocument", bound=Document)


def read(kind: type[AnyDocument], data: bytes, where: str) -> AnyDocument:
    """Parse and check a document.

    Raises:
        ShardCorrupt: the bytes are not a document of this kind, or were changed.
        FormatTooNew: a later release wrote it.
    """
    body = canonical.check(data, where)
    check_version(body.get("format_version", FORMAT_VERSION), where)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ShardCorrupt(f"'{key}': {first['msg']}", where=where) from None


class FileEntry(Document):
    """Size and hash of one file."""

    bytes: Count
    sha256: Sha256


class Records(Document):
    """One entry per example of a shard, in order.

    Attributes:
        offset, bytes, xxh3: where the example's Arrow message lies in the shard's rows file, its
            length, and the xxh3-64 (hex) of exactly these bytes.
        entropy, tail: mean over rows of the entropy (nats) and of the tail's mass; null if not
            kept.
        preview: the beginning of its text, for people.
        chunks: dense signal -> xxh3-64 (hex) of every example's chunk; receipts of the first caches
            have none.
    """

    offset: list[Count]
    bytes: list[Count]
    xxh3: list[Xxh3]
    example_id: list[Text]
    source: list[Text]
    num_tokens: list[Count]
    num_rows: list[Count]
    entropy: list[float | None]
    tail: list[float | None]
    preview: list[Text]
    chunks: dict[str, list[Xxh3]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: Any) -> dict[str, Any]:
        made = serialise(self)
        if not made["chunks"]:
            del made["chunks"]
        return made

    def __len__(self) -> int:
        return len(self.offset)


class ShardReceipt(Document):
    """The commit of one shard: which bytes it is made of, and of which plan and codec."""

    format_version: int = FORMAT_VERSION
    plan: Sha256
    codec: Sha256
    shard: Count
    files: dict[str, FileEntry]
    records: Records

    @property
    def num_examples(self) -> int:
        """Examples of the shard."""
        return len(self.records)

    @property
    def num_tokens(self) -> int:
        """Tokens of its examples."""
        return sum(self.records.num_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of its files, the receipt not counted."""
        return sum(entry.bytes for entry in self.files.values())


class ShardTable(Document):
    """One entry per shard; `receipt` is the sha256 of the receipt file."""

    num_tokens: list[Count]
    num_rows: list[Count]
    bytes: list[Count]
    receipt: list[Sha256]

    def __len__(self) -> int:
        return len(self.receipt)


class StoredError(Document):
    """What a dense signal lost by being stored: squared error over squared norm, per example.

    Attributes:
        mean, largest: over the examples that have the signal.
    """

    mean: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    largest: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DefinitionCheck(Document):
    """How far the engine was from the model's definition when the capture began.

    Attributes:
        done: False where they were not compared.
        reason: why not, or what was left out.
        tokens: of the texts compared.
        logprob: largest difference of a log-probability, nats.
        hidden: dense signal -> largest difference over the largest value.
        noise: what the definition itself differs by in the engine's precision, nats.
        seconds: that it took.
    """

    done: bool
    reason: str = ""
    tokens: Count = 0
    logprob: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    hidden: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Manifest(Document):
    """A sealed cache: everything a reader needs before it opens its first shard."""

    format_version: int = FORMAT_VERSION
    plan: dict[str, Any]
    codec: dict[str, Any]
    files: dict[str, FileEntry]
    """Tables, array metadata and index: everything but shards, receipts and this file."""
    shards: ShardTable
    stored_error: dict[str, StoredError] = Field(default_factory=dict)
    """Dense signal -> what it lost; only in caches that measured it (signal `image_error`)."""

    definition: DefinitionCheck | None = None
    """How far vLLM was from the model's definition; None where nothing was noted."""

    @model_serializer(mode="wrap")
    def _without_empty(self, serialise: Any) -> dict[str, Any]:
        """Caches that measured nothing have no such key, as in the first caches of version 1."""
        made = serialise(self)
        for name in ("stored_error", "definition"):
            if not made[name]:
                del made[name]
        return made

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.shards.num_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards' files."""
        return sum(self.shards.bytes)
