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
from stillroom.pipeline.objectives.registry import CacheFacts, Context, Needs, Spec, register

DIVERGENCES = get_args(DivergenceName)
MAX_SPREAD = 1e-7
"""LLaVADI's guard of the z-score: (z - mean) / (MAX_SPREAD + std)."""


class DivergenceOptions(Table):
    """Options of the divergences on cached top-k logits."""

    temperature: float = Field(default=1.0, gt=0)
    """Must be one that the cache holds; the loss carries its square (Hinton et al. 2015)."""
    tail: Literal["auto", "bucket", "sampled", "truncate", "renormalise"] = "auto"
    """`auto`: `sampled` where the cache holds draws and the rest of the line can use them, else
    `bucket`."""
    k: int = Field(default=0, ge=0)
    """Use only the first k cached ids; 0 uses all."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """`jsd`: weight of the teacher in the mixture."""
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Skew of the skewed divergences (DistiLLM)."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Adds ce_weight * cross-entropy on the text's own tokens, in the same sweep."""
    normalise_logits: bool = False
    """Compare z-scored logits of teacher and student (LLaVADI's `norm_logits`)."""
    legacy_unshifted: bool = False
    """`mask = "answer"` as LLaVADI's code has it: rows whose own token is an answer, so that the
    prediction of the first answer token is left out. The row after the last token, which that
    code adds, is in no cache."""

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


def teacher_logprobs(
    signals: dict[str, torch.Tensor], temperatures: tuple[float, ...], temperature: float
) -> torch.Tensor:
    """log p of the cached ids at a temperature: z / T - lse_T with z = log p_1 + lse_1.

    Args:
        signals: `topk_logprobs` [N, k] and `lse` [N, temperatures].
        temperatures: those of `lse`.
        temperature: T.

    Returns:
        float32 [N, k], of the full softmax at T.
    """
    logprobs = signals["topk_logprobs"]
    if temperature == 1.0:
        return logprobs
    lse = signals["lse"]
    at_one, at_t = (
        lse[:, temperatures.index(1.0), None],
        lse[:, temperatures.index(temperature), None],
    )
    return at_most_certain((logprobs + at_one) / temperature - at_t)


def at_most_certain(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, k] of rows whose mass is more than 1, scaled to 1.

    What a cache stores is rounded, and a low temperature multiplies the rounding: at 0.25 a row may
    come to 1.05 where nothing lies outside its list.
    """
    return logprobs - logprobs.logsumexp(dim=1, keepdim=True).clamp_min(0.0)


def zscore_logprobs(
    signals: dict[str, torch.Tensor], temperatures: tuple[float, ...]
) -> torch.Tensor:
    """log softmax of z-scored teacher logits at the cached ids, float32 [N, k]."""
    raw = signals["topk_logprobs"] + signals["lse"][:, temperatures.index(1.0), None]  # logits
    spread = MAX_SPREAD + signals["logit_std"][:, None]
    scored = (raw - signals["logit_mean"][:, None]) / spread
    return at_most_certain(scored - signals["zscore_lse"][:, None])


def logit_spread(hidden: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the vocabulary of each row's logits, without making them.

    With C the covariance [D, D] of the head's rows, var_v(h . w_v) = h' C h. Population variance,
    differentiable in both arguments.

    Args:
        hidden: [N, D].
        unembedding: [V, D], real columns only.

    Returns:
        float32 [N].
    """
    head = unembedding.float()
    centred = head - head.mean(dim=0)  # [V, D]
    covariance = centred.T @ centred / len(head)  # [D, D]
    states = hidden.float()
    return ((states @ covariance) * states).sum(dim=-1).clamp_min(0.0).sqrt()


def sampled_tail(signals: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tail ids and their weights: each draw carries tail mass / draws, so that they sum to it.

    Returns:
        ids int [N, draws], -1 pads; weights float32 [N, draws].
    """
    counts = signals["draw_counts"].float()  # [N, draws]
    total = counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return signals["draw_ids"], counts / total * signals["tail_logprob"].exp()[:, None]


def _divergence(context: Context, divergence: str) -> torch.Tensor:
    options: DivergenceOptions = context.options
    ids, logprobs = context.teacher["topk_ids"], _logprobs(context)
    # The student may have fewer padding rows than the teacher; what it lacks joins the tail.
    ids = torch.where(ids < context.cache.vocab_size, ids, -1)
    tail_ids, tail_weights = (None, None)
    if options.tail == "sampled":
        tail_ids, tail_weights = sampled_tail(context.teacher)
    if not ids.shape[1]:
        ids, logprobs = _no_exact_ids(context)
    k = options.k or ids.shape[1]
    hidden = context.states.at(context.batch.rows.flat)
    if options.normalise_logits:
        head = context.states.head.weight[: context.cache.vocab_size]
        # A state divided divides its logits; the mean of a z-score cancels in the softmax.
        hidden = hidden / (MAX_SPREAD + logit_spread(hidden, head))[:, None].to(hidden.dtype)
    return sweep(
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
        labels=context.batch.labels if options.ce_weight else None,
        ce_weight=options.ce_weight,
    )


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
    return topk_divergence(
        hidden,
        head.weight,
        ids,
        logprobs,
        weights=context.weights,
        bias=head.bias,
        softcap=head.softcap,
        valid_vocab=context.cache.vocab_size,
        impl=context.kernel,
        **options,
    )


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
    return hard_label(context, context.teacher["topk_ids"][:, 0])


def _settled(divergence: str, options: DivergenceOptions, cache: CacheFacts) -> DivergenceOptions:
    """Options with `tail = "auto"` decided for a cache."""
    if options.tail != "auto":
        return options
    drawn = divergence == "forward_kl" and "draw_ids" in cache.signals
    usable = drawn and not options.why_no_draws()
    return options.model_copy(update={"tail": "sampled" if usable else "bucket"})


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
    if options.normalise_logits:
        signals += ["lse", "logit_mean", "logit_std", "zscore_lse"]
    if options.temperature != 1.0:
        signals.append("lse")
    exact = options.tail != "sampled"
    return Needs(tuple(signals), (options.temperature,), exact_ids=exact)


def _argmax_needs(_options: LabelOptions) -> Needs:
    return Needs(("topk_ids",), exact_ids=True)


def _register_divergence(name: str) -> None:
    compute, needs = partial(_divergence, divergence=name), partial(_divergence_needs, name)
    settle = partial(_settled, name)
    register(Spec(name, "row", DivergenceOptions, compute, needs, settle=settle))


for _name in DIVERGENCES:
    _register_divergence(_name)
register(Spec("cross_entropy", "row", LabelOptions, _cross_entropy, lambda _: Needs()))
register(Spec("teacher_argmax", "row", LabelOptions, _teacher_argmax, _argmax_needs))
