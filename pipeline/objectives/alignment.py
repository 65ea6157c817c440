"""Objectives on hidden states: token alignment with projectors, and affinity (relation) alignment.

One idea: the student's state, through a projector that is trained with it and dropped at export,
should be the teacher's cached one; or, with no projector, the cosines between the student's own
states should be those between the teacher's. Sources: LLaVADI (arXiv 2407.19409) section 3 and its
code, whose last-layer state is the one after the final norm.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from stillroom.cache_schemas.errors import StudentError
from stillroom.cache_schemas.signals import hidden_name
from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.data.batch import DistillBatch, Teacher, Units
from stillroom.pipeline.kernels.precision import in_full, widened
from stillroom.pipeline.objectives.registry import CacheFacts, Context, Needs, Spec, register

Layer = int | Literal["final"]
Where = Literal["image", "answer", "text", "all"]


class HiddenOptions(Table):
    """Options of `hidden`."""

    pairs: tuple[tuple[Layer, Layer], ...] = (("final", "final"),)
    """(teacher layer, student layer): block numbers (1-based), or "final" for the state after the
    final norm. The value is the mean over pairs."""
    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    """Of two states: means over channels, or 1 - cosine."""
    projector: Literal["none", "linear", "mlp"] = "mlp"
    """On the student's side; `mlp` is Linear(d_s, d_t)-GELU-Linear(d_t, d_t) as in LLaVADI."""


class AffinityOptions(Table):
    """Options of `affinity`."""

    teacher_layer: Layer = "final"
    """Block (1-based) of the cached state, or "final"."""
    student_layer: Layer = "final"
    """Block of the student's."""
    rows: Where = "image"
    """Positions that span the rows of the block of cosines that is compared; LLaVADI compares image
    rows with answer columns."""
    columns: Where = "answer"
    """Positions that span its columns."""


def distance(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-position distance of two states.

    Args:
        student: [P, D].
        teacher: [P, D].
        kind: `mse` and `smooth_l1` are means over the D channels; `cosine` is 1 - cos.

    Returns:
        float32 [P], or float64 as the student's states are.
    """
    student = widened(student)
    teacher = teacher.to(student.dtype)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=-1)
    return (student - teacher).square().mean(dim=-1)


def affinity(states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Cosines between chosen positions: norm(H)[rows] norm(H)[columns]'.

    Args:
        states: [P, D].
        rows, columns: bool [P].

    Returns:
        float32 [rows, columns], or float64 as the states are.
    """
    unit = F.normalize(widened(states), dim=-1)
    with in_full(states):
        return unit[rows] @ unit[columns].T


class Projectors(nn.Module):
    """One projector per pair of layers."""

    def __init__(self, kind: str, count: int, student_width: int, teacher_width: int):
        super().__init__()
        made = [_projector(kind, student_width, teacher_width) for _ in range(count)]
        self.pairs = nn.ModuleList(made)


def _projector(kind: str, student_width: int, teacher_width: int) -> nn.Module:
    first = nn.Linear(student_width, teacher_width)
    if kind == "linear":
        return first
    return nn.Sequential(first, nn.GELU(), nn.Linear(teacher_width, teacher_width))


def _make_projectors(options: HiddenOptions, config, facts: CacheFacts) -> nn.Module | None:
    width = facts.widths[hidden_name(options.pairs[0][0])]
    if options.projector != "none":
        return Projectors(options.projector, len(options.pairs), config.hidden_size, width)
    if config.hidden_size != width:
        raise StudentError(
            f"hidden states of {config.hidden_size} (student) and {width} (teacher) channels",
            expected="equal widths, or a projector",
            where="[[objective]] 'hidden'",
            remedy="Set options.projector to 'linear' or 'mlp'.",
        )
    return None


def _hidden(context: Context) -> torch.Tensor:
    options: HiddenOptions = context.options
    total = torch.zeros_like(context.weights)
    for number, (theirs, ours) in enumerate(options.pairs):
        student = student_states(context, ours)[context.positions.flat]  # [P, D_s]
        if context.projector is not None:
            student = context.projector.pairs[number](student)  # [P, D_t]
        found = distance(student, context.teacher[hidden_name(theirs)], options.distance)
        total = total + found
    return context.weights * total / len(options.pairs)


def student_states(context: Context, layer: Layer) -> torch.Tensor:
    """The student's states [B * S, D] at a layer."""
    return context.states.final if layer == "final" else context.states.blocks[layer]


def chosen(positions: Units, where: Where) -> torch.Tensor:
    """bool [P]: positions of one kind."""
    if where == "answer":
        return positions.answer
    if where == "image":
        return positions.image
    return ~positions.image if where == "text" else torch.ones_like(positions.image)


def _affinity(context: Context) -> torch.Tensor:
    options: AffinityOptions = context.options
    teacher = context.teacher[hidden_name(options.teacher_layer)]  # [P, D_t]
    student = student_states(context, options.student_layer)[context.positions.flat]
    rows, columns = (chosen(context.positions, w) for w in (options.rows, options.columns))
    values = []
    for number, weight in enumerate(context.weights):
        here = context.positions.example == number  # [P]
        if weight == 0 or not (here & rows).any() or not (here & columns).any():
            # A zero with a graph: `backward` works where no example of the batch counts.
            values.append(context.states.final.sum() * 0)
            continue
        ours = affinity(student, here & rows, here & columns)  # [rows, columns]
        values.append((ours - affinity(teacher, here & rows, here & columns)).square().mean())
    return context.weights * torch.stack(values)


def _affinity_applies(options: AffinityOptions, batch: DistillBatch, teacher: Teacher):
    """bool [E]: examples that have both rows and columns."""
    found, positions = [], teacher.positions
    for where in (options.rows, options.columns):
        here = chosen(positions, where).float()
        # bool [E]
        found.append(torch.zeros(len(batch.sources)).index_add_(0, positions.example, here) > 0)
    return found[0] & found[1]


def _hidden_needs(options: HiddenOptions) -> Needs:
    signals = tuple(dict.fromkeys(hidden_name(theirs) for theirs, _ in options.pairs))
    return Needs(signals, blocks=tuple(ours for _, ours in options.pairs if ours != "final"))


def _affinity_needs(options: AffinityOptions) -> Needs:
    ours = options.student_layer
    blocks = () if ours == "final" else (ours,)
    return Needs((hidden_name(options.teacher_layer),), blocks=blocks)


register(Spec("hidden", "position", HiddenOptions, _hidden, _hidden_needs, _make_projectors))
register(
    Spec(
        "affinity",
        "example",
        AffinityOptions,
        _affinity,
        _affinity_needs,
        applies=_affinity_applies,
    )
)
