"""The optimiser and its learning rate.

One idea: the rate is a pure function of the step, so a resume needs nothing but the step number.
"""

import math

import torch
from torch import nn

from stillroom.pipeline.config.training import Train


def optimizer_of(parameters: list[nn.Parameter], settings: Train) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    return torch.optim.AdamW(kept, lr=settings.learning_rate, betas=settings.betas, fused=True)


def rate(train: Train, step: int) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then the schedule.

    `cosine` falls from the peak to `final_rate` of it; `wsd` (warmup-stable-decay, Hu et al. 2024,
    arXiv 2404.06395) stays at the peak and falls linearly in the last `decay` of the steps.
    """
    warmup = round(train.warmup * train.steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(train.steps - warmup, 1)
    return train.learning_rate * _shape(train, done)


def _shape(train: Train, done: float) -> float:
    low = train.final_rate
    if train.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if train.schedule == "wsd" and done > 1 - train.decay:
        return low + (1 - low) * (1 - done) / train.decay
    return 1.0
