"""Objectives on logits: divergences from the cached top-k, and cross-entropies.

One idea: every one of them is the same fused sweep (`kernels.topk_divergence`) over final hidden
states and LM head, given other ids and log-probabilities; hard labels are a teacher with one id of
probability 1. So no [rows, vocabulary] array exists, whatever the loss.

With several `forward_kl` objectives on caches of several teachers the gradient is that of forward
KL to their weighted arithmetic mixture (it is linear in the teacher's p).
"""

from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from pydantic import Field, model_validator

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.kernels.divergences import DivergenceName
from stillroom.pipeline.kernels.topk_divergence import topk_divergence
from stillroom.pipeline.objectives.padding import push_off, pushes_by_itself
from stillroom.pipeline.objectives.parts import keep_parts, labelled, parts
from stillroom.pipeline.objectives.registry import CacheFacts, Context, Needs, Spec, register
from stillroom.pipeline.objectives.teacher_rows import (
    MAX_SPREAD,
    logit_spread,
    sampled_tail,
    self_information,
    teacher_logprobs,
    together_certain,
    zscore_logprobs,
)

DIVERGENCES = get_args(DivergenceName)


class DivergenceOptions(Table):
    """Options of the divergences on cached top-k logits."""

    temperature: float = Field(default=1.0, gt=0)
    """Must be one that the cache holds; the loss carries its square (Hinton et al. 2015)."""
    tail: Literal["auto", "bucket", "sampled", "truncate", "renormalise"] = "auto"
    """What stands for the words outside the list S, whose teacher mass is M; q is the student's
    softmax over all words. `bucket`: one outcome of p = 1 - M, held against 1 - sum_S q.
    `truncate`: none, sum_S p log(p / q). `renormalise`: only the teacher is scaled to one,
    sum_S (p / M) log((p / M) / q), so what the student gives to other words counts against it.
    `sampled`: draws from the tail, sum_S p log(p / q) + sum_draws w log(w / q), with w the draw's
    share of the row's draws times the tail's mass. `auto`: `sampled` where the cache holds draws
    and the rest of the line can use them, else `bucket`."""
    k: int = Field(default=0, ge=0)
    """Use only the first k cached ids; 0 uses all."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """`jsd`: weight of the teacher in the mixture."""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """Skew of the skewed divergences (DistiLLM)."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Adds ce_weight * cross-entropy on the text's own tokens, in the same sweep."""
    normalise_logits: bool = False
    """Compare z-scored logits of teacher and student (LLaVADI's `norm_logits`), at temperature 1,
    without `ce_weight`, for heads without a bias or a soft cap."""
    baseline: Literal["auto", "entropy", "none"] = "auto"
    """`tail = "sampled"`: what the value is measured from. `entropy`: the teacher's, which the
    cache holds, so that the value is KL(teacher || student) in expectation. `none`: cross-entropy
    with the teacher, larger by the teacher's entropy. `auto`: `entropy` where it is cached. The
    gradient is the same."""
    legacy_unshifted: bool = False
    """`mask = "answer"` as LLaVADI's code has it: rows whose own token is an answer, so that the
    prediction of the first answer token is left out. The row after the last token, which that
    code adds, is in no cache."""

    @model_validator(mode="after")
    def _scores_are_logits_alone(self) -> "DivergenceOptions":
        if self.normalise_logits and self.temperature != 1.0:
            raise ValueError("normalise_logits is at temperature 1: z-scores have a scale already")
        if self.normalise_logits and self.ce_weight:
            raise ValueError(
                "normalise_logits takes no ce_weight, which would be of z-scored logits: write a "
                "line of its own with name = 'cross_entropy'"
            )
        return self

    @model_validator(mode="after")
    def _draws_can_serve(self) -> "DivergenceOptions":
        if self.tail == "sampled" and (reason := self.why_no_draws()):
            raise ValueError(reason)
        return self

    def why_no_draws(self) -> str:
        """What of these options draws cannot serve; empty where they can."""
        if self.temperature != 1.0 or self.normalise_logits:
            return "draws are of p at temperature 1: tail = 'sampled' takes no other, nor z-scores"
        if self.k:
            return "draws are from beyond all cached ids: tail = 'sampled' takes no k"
        return ""


class LabelOptions(Table):
    """Options of the cross-entropies."""


def _divergence(context: Context, divergence: str) -> torch.Tensor:
    options: DivergenceOptions = context.options
    ids, logprobs = _of_student(context, context.teacher["topk_ids"]), _logprobs(context)
    tail_ids, tail_weights = (None, None)
    if options.tail == "sampled":
        tail_ids, tail_weights = sampled_tail(context.teacher)
        logprobs, tail_weights = together_certain(logprobs, tail_weights)
        tail_ids = _of_student(context, tail_ids)
        tail_weights = tail_weights.where(tail_ids >= 0, 0)
    if not ids.shape[1]:
        ids, logprobs = _no_exact_ids(context)
    k = options.k or ids.shape[1]
    hidden = context.states.at(context.batch.rows.flat)
    if options.normalise_logits:
        head = context.states.head.weight[: context.cache.vocab_size]
        # A state divided divides its logits; the mean of a z-score cancels in the softmax.
        hidden = hidden / (MAX_SPREAD + logit_spread(hidden, head))[:, None].to(hidden.dtype)
    given = labelled(context, options.ce_weight)
    value = sweep(
        context,
        hidden,
        ids[:, :k],
        logprobs[:, :k],
        divergence=divergence,
        beta=options.beta,
        alpha=options.alpha,
        tail=options.tail,
        tail_ids=tail_ids,
        tail_weights=tail_weights,
        temperature=options.temperature,
        **given,
    )
    if tail_weights is not None:
        value = value - context.weights.to(value) * _own_terms(context, ids, logprobs, tail_weights)
    return keep_parts(context, value, given)


def _of_student(context: Context, ids: torch.Tensor) -> torch.Tensor:
    """Ids with -1 for words that the student has no row for: it may have fewer rows of padding than
    the teacher. What it lacks joins the tail, or is no draw."""
    return torch.where(ids < context.cache.vocab_size, ids, -1)


def _own_terms(context: Context, ids, logprobs, tail_weights) -> torch.Tensor:
    """What a row of a drawn teacher is larger by than what it estimates, float32 [N].

    The sweep's value has sum p log p of the exact ids and of the draws in it. The draws' part is
    far from the tail's, so the teacher's own entropy takes the place of both: what is left is
    KL(teacher || student) in expectation over the draws, whatever was drawn.
    """
    own = self_information(logprobs, ids >= 0) + self_information(tail_weights.log())
    if context.options.baseline != "entropy":
        return own
    # The entropy is of all words; those of the list that the student lacks are in no sweep.
    lacking = context.teacher["topk_ids"] >= context.cache.vocab_size  # [N, k]
    if lacking.shape[1]:
        own = own + self_information(logprobs, lacking)
    return own + context.teacher["entropy"]


def _no_exact_ids(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """One column of padding: all mass is in the draws (random sampling KD, arXiv 2503.16870)."""
    mass = context.teacher["tail_logprob"][:, None]  # [N, 1]; only its shape and device count
    return torch.full_like(mass, -1, dtype=torch.int64), torch.zeros_like(mass)


def _logprobs(context: Context) -> torch.Tensor:
    held = context.cache.temperatures
    if context.options.normalise_logits:
        return zscore_logprobs(context.teacher, held)
    return teacher_logprobs(context.teacher, held, context.options.temperature)


def sweep(context: Context, hidden, ids, logprobs, **options) -> torch.Tensor:
    """The door of the kernels, with what every caller of this package gives it.

    Returns:
        float32 [N], each row's loss times its weight.
    """
    head = context.states.head
    alone = pushes_by_itself(options["divergence"], options["tail"])
    values = topk_divergence(
        hidden,
        head.weight,
        ids,
        logprobs,
        weights=context.weights,
        bias=head.bias,
        softcap=head.softcap,
        valid_vocab=head.weight.shape[0] if alone else context.cache.vocab_size,
        impl=context.kernel,
        **options,
    )
    if alone:
        return values
    told = options.get("ce_weight", 0.0), options.get("cross_entropy")
    return push_off(context, values, *told)


def hard_label(context: Context, labels: torch.Tensor, weights=None) -> torch.Tensor:
    """-log q(label) per row: forward KL to a teacher that is certain.

    Args:
        labels: int [N].
        weights: in place of the context's.
    """
    if weights is not None:
        context = replace(context, weights=weights)
    ids = labels[:, None]  # [N, 1]
    certain = torch.zeros_like(ids, dtype=torch.float32)  # log 1
    hidden = context.states.at(context.batch.rows.flat)
    return sweep(context, hidden, ids, certain, divergence="forward_kl", tail="truncate")


def _cross_entropy(context: Context) -> torch.Tensor:
    return hard_label(context, context.batch.labels)


def _teacher_argmax(context: Context) -> torch.Tensor:
    """The first of the list that the student has a row for; a row without one counts nothing."""
    ids = _of_student(context, context.teacher["topk_ids"])
    first = (ids >= 0).int().argmax(dim=1, keepdim=True)  # the first of the largest
    labels = ids.gather(1, first)[:, 0]
    weights = context.weights * (labels >= 0).to(context.weights)
    return hard_label(context, labels.clamp_min(0), weights=weights)


def _settled(divergence: str, options: DivergenceOptions, cache: CacheFacts) -> DivergenceOptions:
    """Options with every "auto" decided for a cache."""
    decided = {}
    if options.tail == "auto":
        drawn = divergence == "forward_kl" and "draw_ids" in cache.signals
        usable = drawn and not options.why_no_draws()
        decided["tail"] = "sampled" if usable else "bucket"
    if options.baseline == "auto":
        held = "entropy" in cache.signals and decided.get("tail", options.tail) == "sampled"
        decided["baseline"] = "entropy" if held else "none"
    return options.model_copy(update=decided)


def _suffix(options: DivergenceOptions) -> str:
    """A drawn teacher's value without its entropy taken off is named for what it is."""
    shifted = options.tail == "sampled" and options.baseline == "none"
    return "+entropy" if shifted else ""


def _divergence_needs(divergence: str, options: DivergenceOptions) -> Needs:
    if options.tail == "sampled" and divergence != "forward_kl":
        raise ConfigError(
            f"'{divergence}' with tail = 'sampled'",
            expected="'forward_kl', the one divergence that is linear in the teacher's p",
            where="[[objective]] options",
        )
    signals = ["topk_ids", "topk_logprobs"]
    if options.tail == "sampled":
        signals += ["draw_ids", "draw_counts", "tail_logprob"]
        signals += ["entropy"] if options.baseline == "entropy" else []
    if options.normalise_logits:
        signals += ["lse", "logit_mean", "logit_std", "zscore_lse"]
    if options.temperature != 1.0:
        signals.append("lse")
    exact = 0 if options.tail == "sampled" else max(1, options.k)
    return Needs(tuple(signals), (options.temperature,), exact_ids=exact)


def _argmax_needs(_options: LabelOptions) -> Needs:
    return Needs(("topk_ids",), exact_ids=1)


def _register_divergence(name: str) -> None:
    compute, needs = partial(_divergence, divergence=name), partial(_divergence_needs, name)
    settle = partial(_settled, name)
    register(
        Spec(
            name,
            "row",
            DivergenceOptions,
            compute,
            needs,
            report=parts,
            settle=settle,
            suffix=_suffix,
        )
    )


for _name in DIVERGENCES:
    _register_divergence(_name)
register(Spec("cross_entropy", "row", LabelOptions, _cross_entropy, lambda _: Needs()))
register(Spec("teacher_argmax", "row", LabelOptions, _teacher_argmax, _argmax_needs))
