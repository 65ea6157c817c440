"""How much of an encoder's view is in a student's layers: OLA-VLM's probes.

One idea: the student is frozen, a fresh one-layer resampler per layer learns to predict the target
from that layer's states, and what counts is the cosine between prediction and target on pictures
that neither has seen. Source: OLA-VLM (arXiv 2412.09585) section 3.1: smooth-L1 only, no task
tokens, one learned query per target position. Unlike there, the mean target of the training
pictures is taken off first: encoders say nearly the same of all pictures, and a probe that has
learnt nothing would score 0.9.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from stillroom.pipeline.objectives.embedding_predictor import TaskPredictor

PROBE_WIDTH = 64
"""Inside a probe, at most."""


@dataclass(frozen=True, slots=True)
class ProbeData:
    """States and targets of some pictures.

    Attributes:
        states: layer -> [I, K, D], a frozen student's states of one prompt for each picture.
        targets: [I, positions, width].
    """

    states: dict[int, torch.Tensor]
    targets: torch.Tensor


def probe(
    train: ProbeData, test: ProbeData, steps: int = 200, batch: int = 32, seed: int = 0
) -> dict[int, float]:
    """Mean cosine on `test` of probes trained on `train`, by layer; 0 is what needs no student.

    Args:
        train, test: of different pictures.
        steps, batch: of each probe's training.
        seed: of the probes' weights and of the order.
    """
    return {layer: _probe_layer(layer, train, test, steps, batch, seed) for layer in train.states}


def _probe_layer(
    layer: int, train: ProbeData, test: ProbeData, steps: int, batch: int, seed: int
) -> float:
    mean = train.targets.mean(dim=0)  # [positions, width]
    wanted = train.targets - mean
    wanted = wanted / wanted.std().clamp_min(1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        positions, width = train.targets.shape[1:]
        student_width = train.states[layer].shape[-1]
        inside = min(width, PROBE_WIDTH)
        model = TaskPredictor(student_width, (positions, width), (layer,), seek=0, width=inside)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(steps):
            chosen = torch.randint(len(train.targets), (batch,))
            predicted = _predict(model, layer, train.states[layer][chosen])
            loss = F.smooth_l1_loss(predicted, wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = _predict(model, layer, test.states[layer])
        found = F.cosine_similarity(predicted.flatten(1), (test.targets - mean).flatten(1), dim=1)
    return float(found.mean())


def _predict(model: Any, layer: int, states: torch.Tensor) -> torch.Tensor:
    present = torch.ones(states.shape[:2], dtype=torch.bool)
    return model.predict(layer, states, present, states[:, :0])  # no task tokens
