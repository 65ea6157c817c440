"""What objectives tell beside their values: numbers to log, and warnings.

One idea: an objective leaves sums in the distiller; they are added up over all ranks before
anything is divided. It computes no loss.
"""

from collections.abc import Callable
from typing import Any

import torch


def reports_of(
    distiller: Any, add_up: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Numbers by `label/name` and warnings of the objectives that left sums; the sums are taken.

    Args:
        distiller: with `terms` and `sums`.
        add_up: the sum of a CPU tensor over all ranks.
    """
    reports: dict[str, float] = {}
    warnings: list[str] = []
    for term in distiller.terms:
        own = distiller.sums.pop(term.label, None)
        if own is None or term.spec.report is None:
            continue
        shared = add_up(torch.stack(list(own.values())).cpu()).tolist()
        found = term.spec.report(dict(zip(own, shared)))
        reports |= {f"{term.label}/{name}": value for name, value in found.items()}
        warning = term.spec.warn(found) if term.spec.warn else ""
        warnings += [f"{term.label}: {warning}"] if warning else []
    return reports, tuple(warnings)
