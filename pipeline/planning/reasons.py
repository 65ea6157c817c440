"""Why a setting was chosen, in one sentence, with the figures that decided it.

One idea: the sentence names the limit and, where a cheaper setting would have had less error, that
setting and why it was passed over: what a table of numbers cannot say. It decides nothing; the rule
is `frontier.choose`.
"""

from collections.abc import Sequence

from stillroom.pipeline.planning.frontier import NEAR, Point

LISTLESS = "draws alone serve one divergence at one temperature and name no first choice"


def why(
    points: Sequence[Point], chosen: Point, budget: float | None = None, max_kl: float | None = None
) -> str:
    """The reason for a choice that `choose` made with the same arguments."""
    limits = [] if budget is None else [f"{budget:g} bytes a token"]
    limits += [] if max_kl is None else [f"{max_kl:g} nats of KL"]
    within = " within " + " and ".join(limits) if limits else ""
    if budget is not None:
        rule = f"the least error{within}"
    else:
        rule = f"the cheapest{within} whose error is at most {NEAR - 1:.0%} above the least"
    said = f"{_named(chosen)}: {rule}, of what keeps a list ({_figures(chosen)})"
    better = [
        p
        for p in points
        if p.gradient_error <= chosen.gradient_error and p.bytes_per_token < chosen.bytes_per_token
    ]
    return said + (f"; {_passed_over(better, max_kl)}" if better else "")


def _passed_over(better: Sequence[Point], max_kl: float | None) -> str:
    best = min(better, key=lambda point: point.gradient_error)
    reason = f"it adds more than {max_kl} nats of KL" if best.setting.k else LISTLESS
    return f"{_named(best)} has less error for fewer bytes ({_figures(best)}), but {reason}"


def _named(point: Point) -> str:
    return f"{point.setting.k} ids and {point.setting.tail}"


def _figures(point: Point) -> str:
    return f"error {point.gradient_error:.1e}, {point.bytes_per_token:.1f} bytes"
