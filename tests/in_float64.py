"""Training in float64, where two ways to the same weights differ by 1e-12 or one of them is wrong.

One idea: Adam divides a gradient by its own size, so a weight whose gradient is mere rounding
may move a whole learning rate either way, and no bound on two float32 trainings follows from their
arithmetic. In float64 that rounding is far below Adam's epsilon. The student, its norms and its
projectors are float64; what a cache holds stays the float32 it is, the same on both sides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)
from stillroom.pipeline.objectives.combine import Distiller
from stillroom.pipeline.student.model import load
from stillroom.pipeline.training import exporting, setup

ROUNDING = 1e-12
"""Sums of some thousand float64 terms of order one, over a few steps: 1e-13; wrong ones are off by
a share of a learning rate."""


@contextmanager
def in_float64() -> Iterator[None]:
    """What is trained inside, in this process, is trained in float64; Llama's and Qwen's shapes."""
    with pytest.MonkeyPatch.context() as patch, norms_in_float64():
        for file in (setup, exporting):
            patch.setattr(file, "load", partial(load, dtype=torch.float64))
        patch.setattr(setup, "Distiller", lambda *parts: Distiller(*parts).double())
        # An export has at most float32: here it keeps what it is given.
        for narrows in ("_round", "_narrow"):
            patch.setattr(exporting, narrows, lambda _leaving, _dtype: None)
        yield


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """transformers' own RMS norms go through float32, whatever the model's dtype is."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        for kind in (LlamaRMSNorm, Qwen3RMSNorm):
            patch.setattr(kind, "forward", _rms_norm)
        yield


def _rms_norm(norm, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(
        states, states.shape[-1:], norm.weight, norm.variance_epsilon
    )


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    """Losses of two float64 trainings, step by step."""
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def assert_same_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Weights of two float64 trainings, of order one."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float64, name
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=ROUNDING, err_msg=name)
