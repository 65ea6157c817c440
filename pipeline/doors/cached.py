"""A cache as a map-style data set of PyTorch, and batches that know what is to be learned.

One idea: the objectives are named once, where the cache is opened: they say which signals are read,
and every batch carries them, so that the loss needs nothing else. Records, packing and collation
are those of training; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.strict import validate
from stillroom.pipeline.config.training import Objective, Train
from stillroom.pipeline.data.batch import DistillBatch
from stillroom.pipeline.data.images import Pictures, processor_of
from stillroom.pipeline.data.joined import Joined
from stillroom.pipeline.data.packing import pack
from stillroom.pipeline.data.records import Answers, Records, lengths_of
from stillroom.pipeline.objectives.combine import signals_needed, terms_of
from stillroom.pipeline.objectives.registry import CacheFacts
from stillroom.pipeline.objectives.weighting import Term, UnitWeights
from stillroom.pipeline.training.coverage import check_every_objective_has_rows, check_sources
from stillroom.pipeline.training.run import facts_of, opened

Objectives = Sequence[str | Mapping[str, Any] | Objective]
"""Lines of the `[[objective]]` table: names, tables as in the TOML, or `Objective`s."""


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """One microbatch and what is to be learned from it.

    Attributes:
        batch: tokens and the teachers' answers, wherever `to` has put them.
        host: the same on the CPU, from which weights are computed.
        objectives: lines of the `[[objective]]` table.
        facts: cache name -> what objectives must know of it.
        weights: of the objectives' units, once a trainer has agreed on their totals.
    """

    batch: DistillBatch
    host: DistillBatch
    objectives: tuple[Objective, ...]
    facts: Mapping[str, CacheFacts]
    weights: UnitWeights | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the decoder is called with: `input_ids` and `position_ids`, int64 [B, S], and
        `use_cache`.

        There is no attention mask: padding stands behind, and positions restart at every document.
        With a cache of keys, transformers would let packed documents see each other.

        Raises:
            StudentError: the batch is about images, which are not among these.
        """
        if self.batch.images is not None:
            raise StudentError(
                "the batch is about images, which its tokens alone do not show",
                where="CachedBatch.inputs",
                remedy="Use the trainers of stillroom.hf, or `stillroom train`.",
            )
        tokens = {"input_ids": self.batch.input_ids, "position_ids": self.batch.position_ids}
        return {**tokens, "use_cache": False}

    @property
    def terms(self) -> list[Term]:
        """The objectives, checked against the caches."""
        return terms_of(self.objectives, self.facts)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "CachedBatch":
        """The same with tokens and answers on another device; copies never block."""
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> "CachedBatch":
        """The same in page-locked memory (called by DataLoader)."""
        pinned = self.batch.pin_memory()
        return replace(self, batch=pinned, host=pinned)


@dataclass
class CachedDataset(Dataset):
    """Examples of sealed caches, by number; made for `torch.utils.data.DataLoader`.

    It may be pickled and read by workers that were spawned: they open nothing anew but files.

    Args:
        cache: directory or URL of the main cache, or an opened one; its examples are counted. A
            list of several, of different texts, is read as one: each text keeps its own teacher.
        objectives: what is to be learned; decides which signals are read.
        caches: further caches of the same examples, by the names that objectives use.
        local_copy: directory that keeps what was read of caches behind a URL.
        local_copy_gigabytes: what that may hold.
        packed: a row of a batch may hold several examples. Only for a student that keeps them
            apart by their positions (`stillroom.keeps_documents_apart`).
        padding_free: lay all examples of a batch end to end in one row, for attention by lengths.
        corpus: directory of the prepared corpus, where the pictures of image-text caches are.
        student: directory of the student whose image processor prepares them; empty where it sees
            none.

    Raises:
        CacheError: there is no sealed cache.
        ConfigError: an unknown objective, option or cache.
        StudentError: an objective needs what the cache does not hold; what it holds is listed. Or
            it gets no row of any example, and its loss would be 0 for ever.
    """

    cache: Any
    objectives: Objectives = ("forward_kl",)
    caches: Mapping[str, Any] = field(default_factory=dict)
    local_copy: str = ""
    local_copy_gigabytes: float = 16
    packed: bool = False
    padding_free: bool = False
    corpus: str = ""
    student: str = ""

    def __post_init__(self):
        self.lines = objective_lines(self.objectives)
        self.sources = {name: self._open(one) for name, one in self._places().items()}
        self.facts = {name: facts_of(cache) for name, cache in self.sources.items()}
        check_sources(self.terms, self.sources)
        place = f" {self.cache}" if isinstance(self.cache, str | Path) else ""
        check_every_objective_has_rows(self.terms, self.sources, {}, f"the whole cache{place}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in MADE_ANEW}

    @cached_property
    def terms(self) -> list[Term]:
        """The objectives, checked against the caches."""
        return terms_of(self.lines, self.facts)

    @cached_property
    def records(self) -> Records:
        """What is read of the caches."""
        signals = signals_needed(self.terms, self.sources)
        return Records(self.sources, signals, self.pictures)

    @cached_property
    def pictures(self) -> Pictures | None:
        """What looks up pixels; None for a student that sees none."""
        if not self.student:
            return None
        from stillroom.pipeline.corpus.files import Corpus

        images = Corpus.open(self.corpus).image_bytes
        return Pictures(images, processor_of(self.student))

    @property
    def has_images(self) -> bool:
        """Whether texts of the cache may be about images."""
        return bool(self.sources[""].plan.facts.get("images"))

    def see(self, student: str) -> None:
        """From here on, batches hold pixels as a student's image processor prepares them.

        Args:
            student: its directory.

        Raises:
            CorpusError: there is no corpus.
            StudentError: the student has no image processor.
        """
        self.student = student
        for name in ("records", "pictures"):
            vars(self).pop(name, None)
        self.records  # noqa: B018  (what is missing is refused here)

    @property
    def digest(self) -> str:
        """Of the main cache's plan: whose numbers count."""
        return self.sources[""].plan.digest

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens of each."""
        return lengths_of(self.sources[""])

    def __len__(self) -> int:
        return len(self.sources[""])

    @overload
    def __getitem__(self, number: int) -> Answers: ...
    @overload
    def __getitem__(self, number: slice) -> list[Answers]: ...
    def __getitem__(self, number: int | slice) -> Answers | list[Answers]:
        if isinstance(number, slice):
            return self.__getitems__(list(range(len(self))[number]))
        return self.records.read(range(len(self))[number])

    def __getitems__(self, numbers: list[int]) -> list[Answers]:
        """Several at once (asked for by DataLoader)."""
        return [self[number] for number in numbers]

    def collate(self, examples: Sequence[Answers]) -> CachedBatch:
        """Examples as one microbatch; DataLoader's `collate_fn`.

        Rows are as long as the longest example. With `packed`, short ones share a row.
        """
        lengths = [len(one[""].example.token_ids) for one in examples]
        together = self.packed or self.padding_free
        numbers = list(range(len(examples)))
        rows = pack(numbers, lengths, max(lengths)) if together else [(one,) for one in numbers]
        return self.batch([[examples[one] for one in row] for row in rows], max(lengths))

    def batch(self, rows: Sequence[Sequence[Answers]], capacity: int) -> CachedBatch:
        """Packed rows as one microbatch.

        Args:
            rows: examples of each row.
            capacity: tokens of a row.
        """
        made = self.records.batch(rows, capacity, self.padding_free)
        return CachedBatch(made, made, self.lines, self.facts)

    def _places(self) -> dict[str, Any]:
        if not isinstance(self.caches, Mapping) or "" in self.caches:
            raise ConfigError(
                "a further cache without a name",
                expected='a name for each, as in {"big": "..."}',
                where="caches",
            )
        return {"": self.cache, **self.caches}

    def _open(self, place: Any) -> Any:
        if isinstance(place, list | tuple) and place:
            return Joined([self._open(one) for one in place])
        if hasattr(place, "plan"):
            return place
        if not isinstance(place, str | Path):
            raise ConfigError(
                f"a cache is given as {place!r}",
                expected="a directory or URL, an opened cache, or a list of several",
                where="cache",
            )
        kept = {"local_copy": self.local_copy, "local_copy_gigabytes": self.local_copy_gigabytes}
        settings = validate(Train, {"cache": str(place), **kept}, "cache")
        return opened(settings.cache, settings)


MADE_ANEW = ("terms", "records", "pictures")
"""Held by a data set and not sent to another process."""


def objective_lines(objectives: Objectives | str | Mapping[str, Any]) -> tuple[Objective, ...]:
    """Lines of the `[[objective]]` table from what a program writes.

    Raises:
        ConfigError: a key is unknown or a value is not allowed.
    """
    given: Any = [objectives] if isinstance(objectives, str | Mapping) else objectives
    if not isinstance(given, Sequence):
        given = [given]
    return tuple(_line(number, line) for number, line in enumerate(given, 1))


def _line(number: int, line: str | Mapping[str, Any] | Objective) -> Objective:
    if isinstance(line, Objective):
        return line
    if not isinstance(line, str | Mapping):
        raise ConfigError(
            f"a line is {line!r}",
            expected='a name, or a table such as {"name": "forward_kl"}',
            where=f"objectives, line {number}",
        )
    table = {"name": line} if isinstance(line, str) else dict(line)
    return validate(Objective, table, f"objectives, line {number}")
