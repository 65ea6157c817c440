"""Many objectives as one loss: the only place that masks, weights and divides.

One idea: a unit's weight is known before the forward pass. `weigh` gives each objective's weights
and their total for one microbatch; totals are summed over microbatches and ranks; the forward
pass then returns contributions that add up, over microbatches and ranks, to the step's means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache_schemas.errors import ConfigError, StudentError
from cache_schemas.signals import is_hidden
from pipeline.data.batch import DistillBatch, Units
from pipeline.objectives import registry
from pipeline.objectives.registry import CacheFacts, Context, Needs, Spec
from pipeline.student import blocks_of, forward_states
from pipeline.training_tables import Objective


@dataclass(frozen=True, slots=True)
class Term:
    """One line of the `[[objective]]` table, checked."""

    label: str
    table: Objective
    spec: Spec
    options: Any
    needs: Needs
    facts: CacheFacts

    def weight(self, progress: float) -> float:
        """The objective's weight at a share of the run, 0 to 1."""
        last = self.table.final_weight
        return (
            self.table.weight
            if last is None
            else self.table.weight + progress * (last - self.table.weight)
        )


def terms_of(objectives: Sequence[Objective], caches: Mapping[str, CacheFacts]) -> list[Term]:
    """Check every objective against the caches before anything is trained.

    Raises:
        ConfigError: no objective; an unknown name, option or cache.
        StudentError: a signal, temperature or head that the cache does not hold; what it holds is
            listed.
    """
    if not objectives:
        raise ConfigError("no [[objective]]", remedy="Add one, for example name = 'forward_kl'.")
    terms = [_term(number, table, caches) for number, table in enumerate(objectives)]
    return terms


def _term(number: int, table: Objective, caches: Mapping[str, CacheFacts]) -> Term:
    where = f"[[objective]] {number + 1}"
    spec, options = registry.find(table.name, table.options, where)
    if table.cache not in caches:
        raise ConfigError(
            f"no cache '{table.cache}'",
            expected=f"one of {sorted(name for name in caches if name)}",
            where=where,
            remedy="Name it under [train.caches].",
        )
    needs, facts = spec.needs(options), caches[table.cache]
    _check_needs(needs, facts, f"{where} '{table.name}'")
    label = f"{number + 1}.{table.name}" + (f"@{table.cache}" if table.cache else "")
    return Term(label, table, spec, options, needs, facts)


def _check_needs(needs: Needs, facts: CacheFacts, where: str) -> None:
    missing = [name for name in needs.signals if name not in facts.signals]
    if missing:
        raise StudentError(
            f"needs signal '{missing[0]}', which the cache does not hold",
            expected=f"one of {', '.join(facts.signals)}",
            where=where,
            remedy="Capture it, or choose another objective.",
        )
    absent = [t for t in needs.temperatures if t != 1.0 and t not in facts.temperatures]
    if absent:
        held = ", ".join(f"{t:g}" for t in facts.temperatures)
        raise StudentError(
            f"temperature {absent[0]:g} is not in the cache",
            expected=f"one of {held}",
            where=where,
            remedy="It cannot be derived from top-k probabilities: add it to [capture].",
        )
    if needs.teacher_head and facts.head is None:
        raise StudentError("needs the teacher's head, which the cache does not hold", where=where)


def signals_needed(terms: Sequence[Term], caches: Mapping[str, CacheFacts]) -> dict[str, set[str]]:
    """Cache name -> signals to read for training; every cache is read, if only for its rows."""
    needed: dict[str, set[str]] = {name: set() for name in caches}
    for term in terms:
        needed[term.table.cache] |= set(term.needs.signals)
        if term.table.curriculum != "none":
            needed[term.table.cache].add("entropy")
    return needed


class Distiller(nn.Module):
    """Student, projectors and objectives in one module, so that DDP and FSDP wrap them all.

    Attributes:
        model: the student.
        projectors: those of the objectives, by number.
        terms: the checked objectives.
    """

    def __init__(self, model: nn.Module, terms: Sequence[Term], kernel: str = "chunked"):
        super().__init__()
        self.model, self.terms, self.kernel = model, list(terms), kernel
        self.projectors = nn.ModuleDict()
        for number, term in enumerate(self.terms):
            made = term.spec.projector(term.options, _text_config(model), term.facts)
            if made is not None:
                self.projectors[str(number)] = made
        self.blocks = sorted({block for term in self.terms for block in term.needs.blocks})
        _check_blocks(self.blocks, model)

    def weigh(
        self, batch: DistillBatch, progress: float
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Unnormalised weights of every objective's units, and their totals.

        Args:
            batch: on the CPU.
            progress: share of the run that is done.

        Returns:
            One float32 [units] per objective, and float64 [objectives] totals to be summed over
            microbatches and ranks.
        """
        weights = [unit_weights(term, batch, progress) for term in self.terms]
        totals = [_total(term, batch, w) for term, w in zip(self.terms, weights)]
        return weights, torch.tensor(totals, dtype=torch.float64)

    def forward(self, batch: DistillBatch, weights: list[torch.Tensor]) -> torch.Tensor:
        """Each objective's contribution to the step's loss.

        Args:
            batch: on the student's device.
            weights: per objective float32 [units], divided by the global totals and multiplied by
                the objective's weight.

        Returns:
            float32 [objectives].
        """
        states = forward_states(self.model, batch.input_ids, batch.position_ids, self.blocks)
        values = []
        for number, (term, weight) in enumerate(zip(self.terms, weights, strict=True)):
            key = str(number)
            projector = self.projectors[key] if key in self.projectors else None  # noqa: SIM401
            teacher = batch.teachers[term.table.cache]
            context = Context(
                states,
                batch,
                teacher.signals,
                teacher.positions,
                weight,
                term.options,
                term.facts,
                projector,
                self.kernel,
            )
            values.append(term.spec.compute(context).float().sum())
        return torch.stack(values)


def unit_weights(term: Term, batch: DistillBatch, progress: float) -> torch.Tensor:
    """Weights of an objective's units before the division by the global total.

    A unit outside the mask weighs 0, one inside it its example's weight times its source's factor;
    `reduction = "sample"` divides that by the number of the example's units, so that examples and
    not rows are averaged.
    """
    factors = batch.sample_weight * _source_factors(term, batch)
    if term.spec.unit == "example":
        return factors
    units = _units(term, batch)
    inside = _mask(term, batch, units) & _curriculum(term, batch, progress)
    weights = inside * factors[units.example]
    if term.table.reduction == "sample":
        counts = torch.zeros(len(factors)).index_add_(0, units.example, inside.float())
        weights = weights / counts.clamp_min(1.0)[units.example]
    return weights


def _total(term: Term, batch: DistillBatch, weights: torch.Tensor) -> float:
    """What the weights are divided by: with `sample` this counts each example once."""
    return float(weights.double().sum())


def _source_factors(term: Term, batch: DistillBatch) -> torch.Tensor:
    factors = term.table.source_weights
    return torch.tensor([factors.get(source, 1.0) for source in batch.sources])


def _units(term: Term, batch: DistillBatch) -> Units:
    if term.spec.unit == "row":
        return batch.rows
    return batch.teachers[term.table.cache].positions


def _mask(term: Term, batch: DistillBatch, units: Units) -> torch.Tensor:
    if term.table.mask == "answer":
        unshifted = getattr(term.options, "legacy_unshifted", False)
        return batch.own_answer if unshifted else units.answer
    if term.table.mask == "image":
        return units.image
    return ~units.image if term.table.mask == "text" else torch.ones_like(units.image)


def _curriculum(term: Term, batch: DistillBatch, progress: float) -> torch.Tensor:
    """Rows admitted now: a share that grows from a quarter to all, by rank of teacher entropy."""
    if term.table.curriculum == "none" or term.spec.unit != "row":
        return torch.ones(len(_units(term, batch).flat), dtype=torch.bool)
    entropy = batch.teachers[term.table.cache].signals["entropy"]
    ranks = entropy.argsort().argsort().double() / max(len(entropy) - 1, 1)
    share = 0.25 + 0.75 * progress
    return ranks <= share if term.table.curriculum == "easy_first" else ranks >= 1.0 - share


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()


def _check_blocks(blocks: Sequence[int], model: nn.Module) -> None:
    depth = len(blocks_of(model)) if blocks else 0
    bad = [number for number in blocks if not 1 <= number <= depth]
    if bad:
        raise StudentError(
            f"the student has no block {bad[0]}",
            expected=f"1 to {depth}",
            where="[[objective]] options",
        )


def hidden_widths(signals: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Widths of the dense signals of a batch or record."""
    return {name: array.shape[-1] for name, array in signals.items() if is_hidden(name)}
