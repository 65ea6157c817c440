"""Held-out figures in the hub's words, for a student's model card.

One idea: each is an `EvalResult`, so that the hub's own library says whether it would be taken.
"""

from collections.abc import Mapping

from huggingface_hub import EvalResult

from stillroom.pipeline.evaluation.held_out import Scores


def card_results(found: Mapping[str, Scores]) -> list[EvalResult]:
    """The trained student's figures in the hub's words, for its card."""
    own = found.get("after")
    if own is None:  # a run that trains none
        return []
    kl = f"KL(teacher || student), nats per token, ± {own.kl_standard_error:.4f}"
    figures = [
        ("kl_divergence", kl, own.kl),
        ("accuracy", "same most probable token as the teacher", own.top1),
        ("perplexity", "perplexity", own.perplexity),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-text",
            dataset_name="held-out text",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, name, value in figures
    ]
