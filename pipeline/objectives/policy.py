"""MiniLLM's long-horizon policy gradient, from cached roll-outs (arXiv 2306.08543).

One idea: a roll-out whose token log-probabilities under the teacher (p) and under whatever wrote it
(b) are cached needs no live teacher: with the student's own log q the reward, the return and the
importance weight of every token follow.

MiniLLM minimises KL(q || p) over sequences. Its gradient splits into a single-step part, which is
the objective `reverse_kl` on the cached top-k and tail, and the long-horizon part here:

    r_t  = clip(log p(y_t) - log q(y_t), +-reward_clip) / reward_scale
    R_t  = sum_{t' >= t+1} discount^(t'-t-1) r_t'          (the paper's R_{t+1}; eq. 5)
    A_t  = R_t / remaining length                          (section 2.2, length normalisation)
    w_t  = q(y_t) / b(y_t)                                 (teacher-mixed sampling, per step)
    loss = -min(w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t)  (PPO)

b is the teacher itself for teacher-written text (their alpha = 1; `token_logprob`), or the cached
`behaviour_logprob` of roll-outs written in rounds by a mixture with an earlier student.

What needs a live teacher and is not here: rewards of roll-outs that the current student writes. In
rounds, capture new roll-outs with the current student and go on from its weights.
Rewards use the current student (no copy from roll-out time exists), so w_t is the only correction.
"""

from typing import Literal

import torch
from pydantic import Field

from stillroom.pipeline.config.strict import Table
from stillroom.pipeline.objectives.divergence import hard_label
from stillroom.pipeline.objectives.registry import Context, Needs, Spec, register

SMALL_SHARE = 0.1
"""Effective sample size, as a share of the tokens, below which the weights have collapsed."""


class PolicyOptions(Table):
    """Options of `policy_gradient`; defaults are those of MiniLLM's code."""

    behaviour: Literal["teacher", "cached"] = "teacher"
    """Who wrote the text: the teacher, or a mixture whose `behaviour_logprob` is cached."""
    discount: float = Field(default=0.95, gt=0, le=1)
    """What a reward one token later counts for (gamma)."""
    reward_scale: float = Field(default=0.5, gt=0)
    """Rewards, log-probabilities in nats, are divided by it."""
    reward_clip: float = Field(default=100.0, gt=0)
    """Largest size of a reward."""
    clip: float = Field(default=0.2, gt=0)
    """The importance ratio counts within 1 - clip and 1 + clip, as in PPO."""
    length_normalise: bool = True
    """Divide a return by the number of rewards in it."""
    whiten: bool = True
    """Returns of a microbatch to mean 0 and standard deviation 1 (their code; not in the paper)."""
    include_own_reward: bool = False
    """Count r_t in R_t, as their code does; the paper leaves it to the single-step part."""


def returns(
    rewards: torch.Tensor,
    example: torch.Tensor,
    discount: float,
    include_own: bool = False,
    length_normalise: bool = True,
) -> torch.Tensor:
    """Discounted sums of later rewards, per row, within each example.

    Args:
        rewards: [N], rows of an example in order and side by side.
        example: int64 [N].
        discount: gamma.
        include_own: the sum starts at the row's own reward.
        length_normalise: divide by the number of rewards summed.

    Returns:
        [N], in the dtype of the rewards.
    """
    found = torch.zeros_like(rewards)
    for length, start in zip(*_runs(example)):
        # Turned round, so that what comes later stands before.
        part = rewards[start : start + length].double().flip(0)
        powers = discount ** torch.arange(length, dtype=torch.float64, device=rewards.device)
        # sum_{j<=i} part_j discount^(i-j), by a matrix of powers: exact, and rows are few.
        place = torch.arange(length, device=rewards.device)
        gap = place[:, None] - place[None]  # [length, length]
        sums = torch.where(gap >= 0, powers[gap.clamp_min(0)], 0.0) @ part
        counts = place.double() + 1
        if not include_own:
            sums = torch.cat([sums.new_zeros(1), sums[:-1]])  # the sum of the row that follows
            counts = (counts - 1).clamp_min(1)
        if length_normalise:
            sums = sums / counts
        found[start : start + length] = sums.flip(0)
    return found


def _runs(example: torch.Tensor) -> tuple[list[int], list[int]]:
    _, lengths = torch.unique_consecutive(example, return_counts=True)
    starts = torch.cumsum(lengths, 0) - lengths
    return lengths.tolist(), starts.tolist()


def surrogate(
    logratio: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate and its derivative.

    Args:
        logratio: [N], log q - log b.
        advantage: [N].
        clip: eps.

    Returns:
        Per row, -min(w A, clip(w) A), and its derivative with respect to log q.
    """
    ratio = logratio.exp()
    plain = ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    # d(w A) / d log q is w A again; where the clipped branch is the smaller it is constant.
    return -torch.minimum(plain, clipped), torch.where(plain <= clipped, -plain, 0.0)


def _policy_gradient(context: Context) -> torch.Tensor:
    options: PolicyOptions = context.options
    labels, example = context.batch.labels, context.batch.rows.example
    weights = context.weights.to(labels.device)
    inside = weights != 0
    with torch.no_grad():
        log_q = -hard_label(context, labels, weights=inside.float().cpu())  # [N], nats
    log_p = context.teacher["token_logprob"]  # [N], nats
    log_b = log_p if options.behaviour == "teacher" else context.teacher["behaviour_logprob"]
    gap = (log_p - log_q).clamp(-options.reward_clip, options.reward_clip)
    reward = torch.where(inside, gap / options.reward_scale, 0.0)
    advantage = returns(
        reward, example, options.discount, options.include_own_reward, options.length_normalise
    )
    if options.whiten and inside.sum() > 1:
        kept = advantage[inside]
        advantage = (advantage - kept.mean()) / (kept.std() + 1e-8)
    # Rows that count nothing have no log q, and what their ratio would be may overflow.
    logratio = torch.where(inside, log_q - log_b, 0.0)
    value, slope = surrogate(logratio, advantage, options.clip)
    ratio = torch.where(inside, logratio.exp(), 0.0).double()
    context.sums.update(
        weight=ratio.sum(), weight_squared=ratio.square().sum(), tokens=inside.double().sum()
    )
    # The sweep gives slope * log q, whose gradient is the surrogate's; its value is put in place.
    carrier = hard_label(context, labels, weights=(-slope * weights).cpu())
    return (value * weights).detach() + carrier - carrier.detach()


def effective_sample_share(sums: dict[str, float]) -> dict[str, float]:
    """(sum w)^2 / (n sum w^2): 1 when all tokens count alike, 1/n when one has all the weight."""
    below = sums["tokens"] * sums["weight_squared"]
    return {"effective_sample_share": sums["weight"] ** 2 / below if below else 1.0}


def _warn(report: dict[str, float]) -> str:
    share = report["effective_sample_share"]
    if share >= SMALL_SHARE:
        return ""
    return (
        f"importance weights have collapsed: {share:.1%} of the tokens carry them. "
        "Capture new roll-outs with the current student."
    )


def _needs(options: PolicyOptions) -> Needs:
    more = ("behaviour_logprob",) if options.behaviour == "cached" else ()
    return Needs(("token_logprob", *more))


register(
    Spec(
        "policy_gradient",
        "row",
        PolicyOptions,
        _policy_gradient,
        _needs,
        report=effective_sample_share,
        warn=_warn,
    )
)
