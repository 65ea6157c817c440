"""What training needs of memory, per process, before the student is loaded.

One idea: every part is a formula of the student's weights and of the `[train]` table. See
`stillroom.pipeline.student.memory` for what a refusal means.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from stillroom.pipeline.config.training import Train
from stillroom.pipeline.student.memory import FP32, check_room, numbers_in
from stillroom.pipeline.training.parallel import Parallel

REMEDY = (
    "Train adapters ([train.lora]), freeze weights, share them (parallel = 'fsdp' on more ranks), "
    "or take a smaller student or batch_tokens."
)


def check_memory(initial: Path, settings: Train, parallel: Parallel, longest: int = 0) -> None:
    """Refuse a run that cannot fit.

    Args:
        initial: directory of the untrained student.
        settings: the [train] table.
        parallel: the ranks.
        longest: tokens of the longest example. A row holds one at least, so where rows are single
            examples, a microbatch may be larger than `batch_tokens`.

    Raises:
        StudentError: with the parts and what is free.
    """
    numbers = numbers_in(initial)
    parts = parts_of(
        numbers,
        _states(initial, max(settings.batch_tokens, longest)),
        settings,
        parallel.world_size,
    )
    check_room(parts, parallel.device, "[train]", REMEDY)


def parts_of(numbers: dict[str, int], states: int, settings: Train, ranks: int) -> dict[str, int]:
    """Bytes of each part on one rank.

    Args:
        numbers: weight -> how many numbers it has.
        states: numbers in one state per block and token of a microbatch.
        settings: the [train] table.
        ranks: processes; they share all but the states with `parallel = "fsdp"`.

    Returns:
        Weights in fp32, and for those that are trained a gradient, Adam's two moments and an
        average. Adapters are left out, they are small.
    """
    every = sum(numbers.values())
    frozen = [n for n in numbers if any(fnmatchcase(n, pattern) for pattern in settings.freeze)]
    trained = 0 if settings.lora else every - sum(numbers[name] for name in frozen)
    share = ranks if settings.parallel == "fsdp" else 1
    width = FP32 if settings.precision == "float32" else FP32 // 2
    return {
        "weights": FP32 * every // share,
        "gradients": FP32 * trained // share,
        "moments": 2 * FP32 * trained // share,
        "averages": FP32 * trained // share if settings.ema else 0,
        "states": width * states,
    }


def _states(initial: Path, tokens: int) -> int:
    config = json.loads((initial / "config.json").read_text())
    text = config.get("text_config", config)
    depth, width = text.get("num_hidden_layers"), text.get("hidden_size")
    return tokens * depth * width if depth and width else 0
