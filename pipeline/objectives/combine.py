"""Many objectives as one loss: the only place that masks, weights and divides.

One idea: a unit's weight is known before the forward pass. `weigh` gives each objective's weights
and their total for one microbatch; totals are summed over microbatches and ranks; the forward
pass then returns contributions that add up, over microbatches and ranks, to the step's means.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.data.batch import NO_TEACHER, DistillBatch
from stillroom.pipeline.kernels.precision import widened
from stillroom.pipeline.objectives import balancing, registry
from stillroom.pipeline.objectives.embedding_predictor import TaskTokens
from stillroom.pipeline.objectives.presets import expand
from stillroom.pipeline.objectives.registry import CacheFacts, Context
from stillroom.pipeline.objectives.requirements import check_read, check_student
from stillroom.pipeline.objectives.weighting import (
    CURRICULUM_SIGNALS,
    Term,
    admit_by_gap,
    unit_weights,
)
from stillroom.pipeline.student.states import (
    check_head_rows,
    forward_states,
)
from stillroom.pipeline.teacher.reference.head import Head


def terms_of(
    objectives: Sequence[Objective], caches: Mapping[str, CacheFacts], on: str = ""
) -> list[Term]:
    """Check every objective against the caches before anything is trained.

    Args:
        objectives: the `[[objective]]` tables.
        caches: name -> facts; "" is the main one.
        on: what the caches are, for messages; empty for those that are trained on.

    Raises:
        ConfigError: no objective; an unknown name, option or cache.
        StudentError: a signal, temperature or head that the cache does not hold; what it holds is
            listed.
    """
    if not objectives:
        raise ConfigError("no [[objective]]", remedy="Add one, for example name = 'forward_kl'.")
    lines = [line for table in objectives for line in expand(table)]
    return [_term(number, table, caches, on) for number, table in enumerate(lines)]


def _term(number: int, table: Objective, caches: Mapping[str, CacheFacts], on: str) -> Term:
    where = f"{on} [[objective]] {number + 1}".lstrip()
    spec, options = registry.find(table.name, table.options, where)
    check_read(table, spec, where)
    if table.cache not in caches:
        raise ConfigError(
            f"no cache '{table.cache}'",
            expected=f"one of {sorted(name for name in caches if name)}",
            where=where,
            remedy="Name it under [train.caches]; in Python, in caches = {...}.",
        )
    facts = caches[table.cache]
    options = spec.settle(options, facts)
    needs = spec.needs(options)
    ranked = CURRICULUM_SIGNALS[table.curriculum]
    needs = replace(needs, signals=(*needs.signals, *ranked))
    needs.check(facts, f"{where} '{table.name}'")
    label = f"{number + 1}.{table.name}{spec.suffix(options)}"
    label += f"@{table.cache}" if table.cache else ""
    return Term(label, table, spec, options, needs, facts)


def balancing_term(terms: Sequence[Term], weight: float, caches: Mapping[str, CacheFacts]) -> Term:
    """The load-balancing loss as one more line behind the others."""
    # The model's own coefficient, not one of a run file: bounds of [[objective]] are not for it.
    line = Objective(name=balancing.NAME).model_copy(update={"weight": weight})
    return _term(len(terms), line, caches, "")


def signals_needed(terms: Sequence[Term], caches: Iterable[str]) -> dict[str, set[str]]:
    """Cache name -> signals to read for training; every cache is read, if only for its rows."""
    needed: dict[str, set[str]] = {name: set() for name in caches}
    for term in terms:
        needed[term.table.cache] |= set(term.needs.signals)
    return needed


class Distiller(nn.Module):
    """Student, projectors and objectives in one module, so that DDP and FSDP wrap them all.

    Attributes:
        model: the student.
        projectors: those of the objectives, by number.
        terms: the checked objectives.
        packed: rows of a batch hold several documents.
        sums: what the objectives left in the last forward passes, to be added up and reported.
        alone: the other ranks do not run it now.
        reaches_all: a microbatch without an image gives what sees a gradient of zeros, for which
            other ranks wait (see `Parallel.awaits_what_sees`).
    """

    def __init__(
        self,
        model: Any,
        terms: Sequence[Term],
        kernel: str = "chunked",
        teacher_head: Head | None = None,
        task_tokens: torch.Tensor | None = None,
        packed: bool = True,
    ):
        super().__init__()
        self.model, self.kernel, self.packed = model, kernel, packed
        self._head_rows = model.get_output_embeddings().weight.shape[0]
        self.terms = [within(term, self._head_rows) for term in terms]
        # Not a buffer: it is never trained, sharded or moved with the student.
        self.teacher_head = teacher_head
        self.projectors = nn.ModuleDict()
        for number, term in enumerate(self.terms):
            made = term.spec.projector(term.options, model.config.get_text_config(), term.facts)
            if made is not None:
                self.projectors[str(number)] = made
        self.task_tokens = TaskTokens(self.projectors, task_tokens)
        self.blocks = sorted({block for term in self.terms for block in term.needs.blocks})
        check_student(self.terms, model)
        self.sums: dict[str, dict[str, torch.Tensor]] = {}
        self.alone = self.reaches_all = False

    @contextmanager
    def judged_by(self, terms: Sequence[Term], alone: bool = False) -> Iterator[None]:
        """Within it the objectives are computed with the facts of other caches, and what they leave
        in `sums` is apart from what training has left there.

        Args:
            terms: the same lines of the `[[objective]]` table.
            alone: this process measures while the other ranks wait.
        """
        before = self.terms, self.sums, self.alone
        self.terms = [within(term, self._head_rows) for term in terms]
        self.sums, self.alone = {}, alone
        try:
            yield
        finally:
            self.terms, self.sums, self.alone = before

    def weigh(
        self, batch: DistillBatch, progress: float
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Unnormalised weights of every objective's units, and their totals.

        Args:
            batch: on the CPU.
            progress: share of the run that is done.

        Returns:
            One float32 [units] per objective, and float64 [objectives] totals to be summed over
            microbatches and ranks. With `reduction = "sample"` a total counts examples.
        """
        weights = [unit_weights(term, batch, progress) for term in self.terms]
        return weights, torch.stack([w.double().sum() for w in weights])

    def forward(
        self, batch: DistillBatch, weights: Iterable[torch.Tensor], progress: float = 1.0
    ) -> torch.Tensor:
        """Each objective's contribution to the step's loss.

        Args:
            batch: on the student's device.
            weights: per objective float32 [units] on the CPU (see `UnitWeights`), divided by the
                global totals and multiplied by the objective's weight; by 1 where that is 0.
            progress: share of the run that is done.

        Returns:
            float32 [objectives], or float64 where the student is. One of weight 0 has its value
            and no gradient.
        """
        states = forward_states(
            self.model,
            batch.input_ids,
            batch.position_ids,
            self.blocks,
            batch.images,
            self.task_tokens.embeddings(),
            self.packed,
            routed=any(term.needs.routers for term in self.terms),
            reaching=self.reaches_all and torch.is_grad_enabled(),
        )
        values = []
        for number, (term, weight) in enumerate(zip(self.terms, weights, strict=True)):
            context = self._context(number, term, states, batch, weight)
            if term.weight(progress):
                values.append(self._value(term, context, progress))
                continue
            # Every weight of the student takes part in every step, as DDP wants it: with zeros.
            untaught = replace(context, weights=context.weights * 0.0, sums={})
            value = widened(term.spec.compute(untaught)).sum()
            with torch.no_grad():
                shown = self._value(term, context, progress)
            values.append(value + shown)
        return torch.stack(values)  # [objectives]

    def _value(self, term: Term, context: Context, progress: float) -> torch.Tensor:
        value, context = value_of(term, context, progress)
        self._keep_sums(term.label, context.sums)
        return value

    def _context(self, number: int, term: Term, states, batch: DistillBatch, weight) -> Context:
        teacher, key = batch.teachers.get(term.table.cache, NO_TEACHER), str(number)
        return Context(
            states,
            batch,
            teacher.signals,
            teacher.positions,
            weight if term.spec.unit == "row" else weight.to(states.final.device),
            term.options,
            term.facts,
            self.projectors[key] if key in self.projectors else None,  # noqa: SIM401
            self.kernel,
            self.teacher_head,
            cache_name=term.table.cache,
            task_tokens=self.task_tokens.columns.get(key, range(0)),
            alone=self.alone,
        )

    def _keep_sums(self, label: str, sums: dict[str, torch.Tensor]) -> None:
        mine = self.sums.setdefault(label, {}) if sums else {}
        for name, value in sums.items():
            mine[name] = mine.get(name, 0) + value.detach().double()


def value_of(term: Term, context: Context, progress: float) -> tuple[torch.Tensor, Context]:
    """An objective's contribution, and the context with which it was computed."""
    if term.table.curriculum.endswith("gap_first"):
        context = admit_by_gap(context, term.table.curriculum, progress)
    return widened(term.spec.compute(context)).sum(), context


def within(term: Term, head_rows: int) -> Term:
    """A student may have fewer padding rows than the teacher; the teacher's further ids go.

    Raises:
        StudentError: the head lacks words that texts are written with.
    """
    check_head_rows(head_rows, term.facts.words, "the student's head")
    if term.facts.vocab_size <= head_rows:
        return term
    return replace(term, facts=replace(term.facts, vocab_size=head_rows))
