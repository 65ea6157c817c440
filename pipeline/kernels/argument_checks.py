"""Checks of a divergence's arguments in every call: shapes, dtypes, devices, plain numbers.

One idea: what can be known without asking a device is always checked; what needs the tensors'
values is in `value_checks`, because it makes a device wait. Every message names the argument.
"""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from stillroom.pipeline.kernels import autocasting
from stillroom.pipeline.kernels.divergences import DivergenceName, Objective, TailName
from stillroom.pipeline.kernels.packed_topk import PackedTopk
from stillroom.pipeline.kernels.vocabulary_shards import Shard

IMPLEMENTATIONS = ("eager", "chunked", "triton")


def check_objective(objective: Objective, tail_ids: Tensor | None, tail_weights: Tensor | None):
    """Plain numbers and names.

    Raises:
        ValueError: a name that is not known, a number out of range, or options that do not go
            together.
    """
    _one_of("divergence", objective.divergence, get_args(DivergenceName))
    _one_of("tail", objective.tail, get_args(TailName))
    _require(0 < objective.beta < 1, lambda: f"beta: found {objective.beta}; expected 0 < beta < 1")
    _require(
        0 < objective.alpha < 1, lambda: f"alpha: found {objective.alpha}; expected 0 < alpha < 1"
    )
    t, cap, hard = objective.temperature, objective.softcap, objective.ce_weight
    _require(0 < t < math.inf, lambda: f"temperature: found {t}; expected a positive number")
    _cap("softcap", cap)
    _require(0 <= hard < math.inf, lambda: f"ce_weight: found {hard}; expected at least 0")
    if objective.tail == "sampled":
        name = objective.divergence
        _require(
            name == "forward_kl", lambda: f"tail: 'sampled' is for forward_kl only; found {name!r}"
        )
        drawn = tail_ids is not None and tail_weights is not None
        _require(drawn, "tail: 'sampled' needs tail_ids and tail_weights")
    else:
        given = tail_ids is not None or tail_weights is not None
        _require(
            not given, lambda: f"tail_ids: only for tail='sampled'; found tail={objective.tail!r}"
        )


def check_student(hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of what is differentiated.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    for name, tensor in (("hidden", hidden), ("unembedding", unembedding), ("bias", bias)):
        _not_sharded(name, tensor)
    _require(
        hidden.dim() == 2, lambda: f"hidden: found shape {tuple(hidden.shape)}; expected [N, D]"
    )
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: found {hidden.dtype}; expected a floating dtype")
    width, found = hidden.shape[1], tuple(unembedding.shape)
    fits = unembedding.dim() == 2 and found[1] == width
    _require(fits, lambda: f"unembedding: found shape {found}; expected [V, {width}]")
    _shape("bias", bias, (found[0],))
    for name, tensor in (("unembedding", unembedding), ("bias", bias)):
        _same_device(name, tensor, hidden)
        _same_dtype(name, tensor, hidden)


def check_words(
    unembedding: Tensor, valid_vocab: int | None, shard: Shard | None, impl: str
) -> Shard:
    """The real words of the head, as a shard (of one, unless one is given).

    Raises:
        ValueError: `valid_vocab` or `shard` does not fit the head or the implementation.
    """
    rows = unembedding.shape[0]
    if shard is None:
        words = rows if valid_vocab is None else valid_vocab
        _require(0 < words <= rows, lambda: f"valid_vocab: found {words}; expected 1 to {rows}")
        return Shard.whole(words)
    _require(valid_vocab is None, "valid_vocab: is shard.total where a shard is given")
    _require(impl != "eager", "shard: 'eager' needs the whole head; expected 'chunked' or 'triton'")
    _require(
        0 <= shard.width <= rows, lambda: f"shard: holds {shard.width} words; the head, {rows}"
    )
    return shard


def check_how(impl: str, budget: int | None) -> None:
    """The implementation's name and its memory budget.

    Raises:
        ValueError: either cannot be.
    """
    _one_of("impl", impl, IMPLEMENTATIONS)
    _require(budget is None or budget > 0, lambda: f"memory_budget: found {budget}; expected bytes")


def check_rows(
    hidden: Tensor,
    *,
    labels: Tensor | None,
    weights: Tensor | None,
    told: Tensor | None,
    ce_weight: float,
) -> None:
    """Shapes, dtypes and devices of labels, weights and what cross-entropies are told in.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.
    """
    missing = ce_weight > 0 and labels is None
    _require(
        not missing, lambda: f"ce_weight: found {ce_weight} without labels; expected labels [N]"
    )
    _shape("labels", labels, (hidden.shape[0],))
    _shape("weights", weights, (hidden.shape[0],))
    _same_device("labels", labels, hidden)
    if weights is not None and weights.device.type != "cpu":
        _same_device("weights", weights, hidden)
    _integers("labels", labels)
    if weights is not None and not weights.is_floating_point():
        raise TypeError(f"weights: found {weights.dtype}; expected a floating dtype")
    followed = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    _require(
        not followed,
        "weights: require a gradient, which they get none of; detach them, or multiply the losses",
    )
    _check_told(hidden, told, ce_weight)


def _check_told(hidden: Tensor, told: Tensor | None, ce_weight: float) -> None:
    if told is None:
        return
    _require(ce_weight > 0, "cross_entropy: is told where ce_weight is above 0; found 0")
    _shape("cross_entropy", told, (hidden.shape[0],))
    _same_device("cross_entropy", told, hidden)
    if told.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cross_entropy: found {told.dtype}; expected float32")
    # A kernel writes one number after another.
    _require(told.is_contiguous(), "cross_entropy: is a part of every so many; expected contiguous")


def check_sparse(
    hidden: Tensor, ids_name: str, ids: Tensor, values_name: str, values: Tensor
) -> None:
    """Shapes, dtypes and devices of a sparse distribution.

    Raises:
        ValueError: a shape or device that does not fit, or no columns.
        TypeError: a dtype that does not fit.
    """
    rows, found = hidden.shape[0], tuple(ids.shape)
    fits = ids.dim() == 2 and found[0] == rows and found[1] > 0
    _require(fits, lambda: f"{ids_name}: found shape {found}; expected [{rows}, k] with k >= 1")
    _shape(values_name, values, found)
    _integers(ids_name, ids)
    _same_device(ids_name, ids, hidden)
    _same_device(values_name, values, hidden)
    if not values.is_floating_point():
        raise TypeError(f"{values_name}: found {values.dtype}; expected a floating dtype")


def check_packed(hidden: Tensor, lists: PackedTopk, logprobs: Tensor | None) -> None:
    """Shapes and device of packed lists; what is in them was checked when they were read.

    Raises:
        ValueError: rows or device that do not fit, or log-probabilities beside them.
    """
    _require(logprobs is None, "logprobs: are in the packed lists already; expected none")
    found, rows = tuple(lists.shape), hidden.shape[0]
    fits = found[0] == rows and found[1] > 0
    _require(fits, lambda: f"ids: found packed lists {found}; expected [{rows}, k] with k >= 1")
    _same_device("ids", lists.gaps, hidden)


def check_teacher(
    hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_unembedding: Tensor,
    teacher_bias: Tensor | None,
    softcap: float | None,
    words: int,
) -> None:
    """Shapes and devices of a teacher given by its hidden states, and its soft cap.

    Raises:
        ValueError: a shape or device that does not fit, or fewer words than the student has.
    """
    found, rows = tuple(teacher_hidden.shape), hidden.shape[0]
    fits = len(found) == 2 and found[0] == rows
    _require(fits, lambda: f"teacher_hidden: found shape {found}; expected [{rows}, D']")
    head = tuple(teacher_unembedding.shape)
    fits = len(head) == 2 and head[0] >= words and head[1] == found[1]
    expected = f"[V', {found[1]}] with V' >= {words}"
    _require(fits, lambda: f"teacher_unembedding: found shape {head}; expected {expected}")
    _shape("teacher_bias", teacher_bias, head[:1])
    _cap("teacher_softcap", softcap)
    for name, tensor in (
        ("teacher_hidden", teacher_hidden),
        ("teacher_unembedding", teacher_unembedding),
        ("teacher_bias", teacher_bias),
    ):
        _same_device(name, tensor, hidden)


def _require(good: bool, message: str | Callable[[], str]) -> None:
    """Messages with numbers are made when they are wanted: a tracer cannot write its symbols."""
    if not good:
        raise ValueError(message if isinstance(message, str) else message())


def _not_sharded(name: str, tensor: Tensor | None) -> None:
    _require(
        not hasattr(tensor, "placements"),
        lambda: f"{name}: is a DTensor; see stillroom.pipeline.kernels.distributed_head",
    )


def _one_of(name: str, found: str, known: tuple[str, ...]) -> None:
    _require(found in known, lambda: f"{name}: {found!r} is unknown; expected one of {known}")


def _shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}; expected {expected}")


def _same_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    if tensor is not None and tensor.device != hidden.device:
        raise ValueError(f"{name}: is on {tensor.device}; expected {hidden.device}, as hidden is")


def _same_dtype(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    if tensor is None or tensor.dtype == hidden.dtype:
        return
    if not autocasting.is_on(hidden.device):
        raise TypeError(f"{name}: found {tensor.dtype}; expected {hidden.dtype}, as hidden is")


def _cap(name: str, cap: float | None) -> None:
    fits = cap is None or 0 < cap < math.inf
    _require(fits, lambda: f"{name}: found {cap}; expected a positive number, or None for no cap")


def _integers(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: found {tensor.dtype}; expected int32 or int64")
