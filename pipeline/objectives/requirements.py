"""What lines of the `[[objective]]` table ask, held against who is to answer.

One idea: a key that nothing reads and a student that cannot serve are refused when the lines are
put together, before a step. What a cache must hold is `registry.Needs`' own check.
"""

from collections.abc import Sequence
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, StudentError
from stillroom.pipeline.config.training import Objective
from stillroom.pipeline.objectives.registry import UNREAD, Spec
from stillroom.pipeline.objectives.weighting import Term
from stillroom.pipeline.student.states import blocks_of, tells_its_routing
from stillroom.pipeline.teacher.reference.head import Head, head_of


def check_read(table: Objective, spec: Spec, where: str) -> None:
    """Refuse keys of a line that nothing reads, where it is about other things than rows.

    Raises:
        ConfigError: names the key.
    """
    plain = Objective(name=table.name)
    for key in UNREAD[spec.unit]:
        if getattr(table, key) != getattr(plain, key):
            raise ConfigError(
                f"{key} = {getattr(table, key)!r}, which '{table.name}' does not read",
                where=where,
                remedy=f"Leave {key} out.",
            )


def check_student(terms: Sequence[Term], model: Any) -> None:
    """Refuse a student that cannot serve one of the lines.

    Raises:
        StudentError: a block, router logits or a plain head that it has not.
    """
    _check_blocks(terms, model)
    _check_routers(terms, model)
    if _scored(terms):
        check_scores(terms, head_of(model))


def check_scores(terms: Sequence[Term], head: Head) -> None:
    """Refuse z-scores of logits that are more than a state's products with one matrix.

    Raises:
        StudentError: the head has a bias or a soft cap.
    """
    if _scored(terms) and (head.bias is not None or head.softcap is not None):
        raise StudentError(
            f"the student's head has a {'bias' if head.softcap is None else 'soft cap'}",
            expected="a head that is one matrix, for normalise_logits",
            where=f"[[objective]] {_scored(terms)[0].label} options",
            remedy="Leave normalise_logits out.",
        )


def _scored(terms: Sequence[Term]) -> list[Term]:
    return [term for term in terms if getattr(term.options, "normalise_logits", False)]


def _check_routers(terms: Sequence[Term], model: Any) -> None:
    asking = [term.label for term in terms if term.needs.routers]
    if asking and not tells_its_routing(model):
        raise StudentError(
            f"objective {asking[0]} needs a student with experts that hands out router logits",
            where=type(model).__name__,
            remedy="Leave this [[objective]] out.",
        )


def _check_blocks(terms: Sequence[Term], model: Any) -> None:
    depth = len(blocks_of(model)) if any(term.needs.blocks for term in terms) else 0
    for term in terms:
        for number in term.needs.blocks:
            if not 1 <= number <= depth:
                raise StudentError(
                    f"the student has no block {number}",
                    expected=f"1 to {depth}",
                    where=f"[[objective]] {term.label} options",
                )
