"""Checks of a divergence's values, when asked: a device has to be waited for.

One idea: every message names the argument, the first row that is wrong and the value there. Shapes
and dtypes are in `argument_checks`.
"""

import numpy as np
import torch
from torch import Tensor

MASS_TOLERANCE = 1e-3


def check_row_values(labels: Tensor | None, weights: Tensor | None, words: int) -> None:
    """Ranges of labels and weights; makes a device wait.

    Raises:
        ValueError: names the argument, the row and the value.
    """
    if labels is not None:
        _all(labels < words, "labels", labels, f"expected less than {words} words")
    if weights is not None:
        _all(weights.isfinite(), "weights", weights, "expected a finite number")


def check_lists(
    ids: Tensor,
    logprobs: Tensor,
    tail_ids: Tensor | None,
    tail_weights: Tensor | None,
    words: int,
) -> None:
    """Ranges and values of the teacher's lists; makes a device wait.

    Raises:
        ValueError: names the argument, the row and the value.
    """
    real = ids >= 0
    _all(ids < words, "ids", ids, f"expected less than {words} words")
    _all(ids >= -1, "ids", ids, "expected word ids, or -1 for padding")
    _all(~real | ~logprobs.isnan(), "logprobs", logprobs, "expected a number")
    _all(~real | (logprobs <= 0), "logprobs", logprobs, "expected at most 0")
    mass = (logprobs.double().exp() * real).nan_to_num().sum(1)  # [N]
    if tail_ids is not None and tail_weights is not None:
        drawn = tail_ids >= 0
        _all(
            (tail_ids < words) & (tail_ids >= -1),
            "tail_ids",
            tail_ids,
            f"expected -1 to {words - 1}",
        )
        _all(~drawn | (tail_weights > 0), "tail_weights", tail_weights, "expected more than 0")
        ids = torch.cat([ids.long(), tail_ids.long()], 1)
        mass = mass + (tail_weights.double() * drawn).sum(1)
    _all(mass <= 1 + MASS_TOLERANCE, "logprobs", mass, "expected a total mass of at most 1.001")
    _no_duplicates(ids)


def _no_duplicates(ids: Tensor) -> None:
    # NumPy's sort takes a seventh of torch's time.
    on_cpu = ids.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(ids.numpy(), 1)) if on_cpu else ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _all(~twice, "ids", ordered[:, 1:], "named twice; expected distinct ids in a row")


def _all(good: Tensor, name: str, values: Tensor, expected: str) -> None:
    if bool(good.all()):  # waits for the device
        return
    place = (~good).nonzero()[0].tolist()  # the first that is not
    value = values[tuple(place)].item()
    raise ValueError(f"{name}: row {place[0]} holds {value}; {expected}")
