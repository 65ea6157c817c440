"""What a cache says of each row, as the divergences want it.

One idea: log-probabilities of the full softmax at any cached temperature, z-scored or not, and the
draws from the tail with their weights, follow from the cached signals by arithmetic on [N, k].
"""

import torch

from stillroom.pipeline.kernels.precision import in_full, widened

MAX_SPREAD = 1e-7
"""LLaVADI's guard of the z-score: (z - mean) / (MAX_SPREAD + std)."""


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
        return at_most_certain(logprobs) if logprobs.shape[1] else logprobs
    lse = signals["lse"]
    at_one, at_t = (
        lse[:, temperatures.index(1.0), None],
        lse[:, temperatures.index(temperature), None],
    )
    return at_most_certain((logprobs + at_one) / temperature - at_t)


def at_most_certain(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, k] of rows whose mass is more than 1, scaled to 1.

    What a cache stores is rounded: under profile `strict` a row may come to 1.02 where nothing lies
    outside its list, and a low temperature multiplies that: at 0.25 to 1.05.
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
    head = widened(unembedding)
    centred = head - head.mean(dim=0)
    states = widened(hidden)
    with in_full(hidden):
        covariance = centred.T @ centred / len(head)
        return ((states @ covariance) * states).sum(dim=-1).clamp_min(0.0).sqrt()


def sampled_tail(signals: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tail ids and their weights: each draw carries tail mass / draws, so that they sum to it.

    Returns:
        ids int [N, draws], -1 pads; weights [N, draws] in the tail's dtype.
    """
    counts = signals["draw_counts"].to(signals["tail_logprob"].dtype)
    total = counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return signals["draw_ids"], counts / total * signals["tail_logprob"].exp()[:, None]


def together_certain(
    logprobs: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists [N, k] and weights of draws [N, n] of rows whose mass is more than 1, scaled to 1."""
    mass = logprobs.exp().sum(dim=1, keepdim=True) + weights.sum(dim=1, keepdim=True)
    over = mass.clamp_min(1.0)
    return logprobs - over.log().to(logprobs.dtype), weights / over


def self_information(logprobs: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    """sum p log p of each row, float32 [N]; what is not there, and p = 0, count nothing."""
    terms = logprobs.exp() * logprobs.clamp_min(-1e4)
    return (terms if there is None else terms.where(there, 0)).sum(dim=1)
