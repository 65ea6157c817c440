"""Every objective by name: its options, what it needs of a cache, and how it is computed.

One idea: an objective is a line of the `[[objective]]` table and a pure function that gives one
value per unit (row, hidden position or example). Masks, weights and the division by the global
count are in `combine`, once for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.strict import Table, nearest, validate
from stillroom.pipeline.data.batch import DistillBatch, Units
from stillroom.pipeline.student.states import StudentStates

Unit = Literal["row", "position", "example", "image", "history"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective asks of the cache and of the student.

    Attributes:
        signals: names of signals that must be in the cache.
        temperatures: temperatures whose log-sum-exp must be in the cache.
        blocks: student blocks (1-based) whose outputs must be kept.
        teacher_head: the teacher's LM head must be kept beside the student.
        exact_ids: exact ids per row that the cache must hold at least.
        routers: the student must have experts and hand out its routers' logits.
    """

    signals: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = ()
    blocks: tuple[int, ...] = ()
    teacher_head: bool = False
    exact_ids: int = 0
    routers: bool = False

    def check(self, facts: "CacheFacts", where: str) -> None:
        """Refuse a cache that does not hold this.

        Raises:
            StudentError: naming the signal, length of list or temperature, and what is held.
        """
        self._check_signals(facts, where)
        self._check_ids(facts, where)
        self._check_temperatures(facts, where)

    def _check_signals(self, facts: "CacheFacts", where: str) -> None:
        missing = [name for name in self.signals if name not in facts.signals]
        if missing:
            raise StudentError(
                f"needs signal '{missing[0]}', which the cache does not hold",
                expected=f"one of {', '.join(facts.signals)}",
                where=where,
                remedy="Capture it, or choose another objective.",
            )

    def _check_ids(self, facts: "CacheFacts", where: str) -> None:
        if self.exact_ids and facts.k == 0:
            raise StudentError(
                "the cache holds draws alone (k = 0), and this needs exact ids",
                expected="forward_kl with options = { tail = 'sampled' }",
                where=where,
                remedy="Train with that, or capture with k >= 1.",
            )
        if facts.k < self.exact_ids:
            wanted = self.exact_ids
            raise StudentError(
                f"options.k = {wanted} of a cache that holds {facts.k} ids per row",
                expected=f"at most {facts.k}, or 0 for all of them",
                where=where,
                remedy=f"Set k = {facts.k}, or capture with [capture] k = {wanted} or more.",
            )

    def _check_temperatures(self, facts: "CacheFacts", where: str) -> None:
        absent = [t for t in self.temperatures if t != 1.0 and t not in facts.temperatures]
        if absent:
            held = ", ".join(f"{t:g}" for t in facts.temperatures)
            raise StudentError(
                f"temperature {absent[0]:g} is not in the cache",
                expected=f"one of {held}",
                where=where,
                remedy="It cannot be derived from top-k probabilities: add it to [capture].",
            )


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What objectives must know of a cache before the first step.

    Attributes:
        signals: names of the signals it holds.
        temperatures: those of its log-sum-exps.
        vocab_size: columns of the teacher's softmax; rows of the student's head beyond it are
            padding and get no probability.
        widths: signal -> width of a dense signal.
        positions: image signal -> positions of a target.
        k: exact ids per row; 0 where there are none.
        nucleus: mass at which a row's list ends early; 0 where none does.
        words: ids of the tokenizer, which every student's head has rows for; 0 without text.
    """

    signals: tuple[str, ...]
    temperatures: tuple[float, ...]
    vocab_size: int
    widths: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    k: int = 0
    nucleus: float = 0.0
    words: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """All that one objective sees of one microbatch.

    Attributes:
        states: the student's.
        batch: the microbatch.
        teacher: signals of this objective's cache.
        positions: where the hidden states of this objective's cache are.
        weights: float32 [units] (rows: on the CPU, else on the device); already divided by the
            global count, so that the sum of weighted values over all microbatches and ranks is the
            step's value. Zero drops a unit.
        options: this objective's options.
        cache: facts of its cache.
        projector: trained with the student and dropped at export; None where there is none.
        kernel: implementation of the divergences.
        teacher_head: the teacher's LM head, where an objective needs it.
        sums: numbers that an objective leaves to be added up over microbatches and ranks.
        cache_name: of this objective's cache; key of `ImageBatch.targets` for image targets.
        task_tokens: columns of this objective's own task tokens behind every image.
        alone: the other ranks compute nothing now, so nothing can be gathered from them.
    """

    states: StudentStates
    batch: DistillBatch
    teacher: dict[str, torch.Tensor]
    positions: Units
    weights: torch.Tensor
    options: Any
    cache: CacheFacts
    projector: Any
    kernel: Any
    teacher_head: Any = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    cache_name: str = ""
    task_tokens: range = range(0)
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """An objective that can be asked for.

    Attributes:
        name: key in the TOML.
        unit: what `compute` returns one value for.
        options: its option table.
        compute: Context -> float32 [units], each value times its weight; for the unit `history`
            see `objectives.recommending`.
        needs: options -> Needs.
        projector: (options, student config, CacheFacts) -> module or None.
        applies: (options, batch, Teacher) -> bool [units]: which ones have what it takes.
        report: `Context.sums`, added up -> numbers to log.
        warn: those numbers -> a warning, or nothing.
        settle: (options, CacheFacts) -> options, with what depends on the cache decided.
        suffix: options -> what the label says beside the name, where the value is another.
    """

    name: str
    unit: Unit
    options: type[Table]
    compute: Callable[[Any], torch.Tensor]
    needs: Callable[[Any], Needs]
    projector: Callable[[Any, Any, CacheFacts], nn.Module | None] = lambda *_: None
    applies: Callable[[Any, Any, Any], torch.Tensor] | None = None
    report: Callable[[dict[str, float]], dict[str, float]] | None = None
    warn: Callable[[dict[str, float]], str] | None = None
    settle: Callable[[Any, CacheFacts], Any] = lambda options, _: options
    suffix: Callable[[Any], str] = lambda _: ""


OBJECTIVES: dict[str, Spec] = {}
UNREAD: dict[Unit, tuple[str, ...]] = {
    "row": (),
    "position": ("curriculum",),
    "example": ("mask", "reduction", "curriculum"),
    "image": ("mask", "reduction", "curriculum"),
    "history": ("mask", "reduction", "curriculum", "source_weights"),
}
"""Keys of a line of the `[[objective]]` table that say nothing of a unit."""

HISTORY: Unit = "history"
"""Unit of the objectives of recommenders."""


def register(spec: Spec) -> Spec:
    """Add an objective to the registry."""
    OBJECTIVES[spec.name] = spec
    return spec


def find(name: str, options: dict[str, Any], where: str) -> tuple[Spec, Table]:
    """An objective and its checked options.

    Raises:
        ConfigError: no such objective, or an option it does not have; the nearest is named.
    """
    if name not in OBJECTIVES:
        raise ConfigError(
            f"unknown objective '{name}'",
            expected=f"one of {', '.join(sorted(OBJECTIVES))}",
            where=where,
            remedy=nearest(name, OBJECTIVES),
        )
    spec = OBJECTIVES[name]
    return spec, validate(spec.options, options, f"{where} '{name}' options")


def check_recommends(spec: Spec, where: str) -> None:
    """Refuse an objective of language models where a recommender is trained.

    Raises:
        ConfigError: saying which there are for recommenders.
    """
    if spec.unit != HISTORY:
        ours = [name for name, known in sorted(OBJECTIVES.items()) if known.unit == HISTORY]
        raise ConfigError(
            f"'{spec.name}' is an objective of language models",
            expected=f"one of {', '.join(ours)}",
            where=where,
        )
