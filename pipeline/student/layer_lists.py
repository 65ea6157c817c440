"""Where a config says what each block is, rewritten for the blocks that stay.

One idea: a config speaks of its blocks in five ways (one value per block, numbers of blocks, how
many there are at the start, a period, a pattern that repeats), and each is put into words of the
kept blocks. It does not judge whether the result says the same: `sameness` does, on the model.
"""

from collections.abc import Sequence
from typing import Any

AT_THE_START = (
    "first_k_dense_replace",
    "num_dense_layers",
    "num_hash_layers",
    "max_window_layers",
)
"""Keys that count blocks from the first on."""
PERIODS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
"""Keys of a period and of where it starts."""


def keep_layers(config: Any, keep: Sequence[int]) -> None:
    """Rewrite a text config, in place, for the blocks `keep` (0-based) in that order."""
    depth = config.num_hidden_layers
    _sparse_step(config)
    _expert_range(config, keep)
    for period, offset in PERIODS:
        _period(config, period, offset, keep)
    for key, value in list(vars(config).items()):
        changed = _changed(key, value, depth, keep)
        if changed is not None:
            setattr(config, key, changed)
    config.num_hidden_layers = len(keep)


def _changed(key: str, value: Any, depth: int, keep: Sequence[int]) -> Any:
    """The value of one key for the kept blocks; None where it does not speak of blocks."""
    if key in AT_THE_START and isinstance(value, int):
        return sum(number < value for number in keep)
    if not isinstance(value, list | tuple) or not value or key.endswith(("token_id", "token_ids")):
        return None
    if key == "attention_types":
        return [[[_spread(value)[number] for number in keep], 1]]
    if _numbers_blocks(key, value, depth):
        return [new for new, old in enumerate(keep) if old in value]
    if key == "block_types":
        return [value[number % len(value)] for number in keep]
    return [value[number] for number in keep] if len(value) == depth else None


def _spread(pairs: Sequence) -> list[str]:
    """GPT-Neo's `[[["global", "local"], 6]]`, one value per block."""
    return [kind for kinds, times in pairs for _ in range(times) for kind in kinds]


def _numbers_blocks(key: str, value: Sequence, depth: int) -> bool:
    """Distinct numbers of blocks in rising order, under a key that speaks of layers."""
    if not any(word in key for word in ("layer", "idx", "ind")):
        return False
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < depth for n in value)
    return numbers and list(value) == sorted(set(value))


def _sparse_step(config: Any) -> None:
    """Qwen-MoE: experts in every n-th block that `mlp_only_layers` does not name."""
    step = getattr(config, "decoder_sparse_step", None)
    if not step or not hasattr(config, "mlp_only_layers"):
        return
    dense = {n for n in range(config.num_hidden_layers) if (n + 1) % step}
    config.mlp_only_layers = sorted(dense | set(config.mlp_only_layers or ()))
    config.decoder_sparse_step = 1


def _expert_range(config: Any, keep: Sequence[int]) -> None:
    """Ernie: experts in every n-th block between two of them."""
    keys = [f"moe_layer_{name}" for name in ("start_index", "end_index", "interval")]
    if not all(isinstance(getattr(config, key, None), int) for key in keys):
        return
    start, end, interval = (getattr(config, key) for key in keys)
    end = config.num_hidden_layers - 1 if end == -1 else end
    expert = [n for n, old in enumerate(keep) if start <= old <= end and not (old + 1) % interval]
    first, last = (expert[0], expert[-1]) if expert else (len(keep), len(keep))
    for key, value in zip(keys, (first, last, 1)):
        setattr(config, key, value)


def _period(config: Any, period: str, offset: str, keep: Sequence[int]) -> None:
    """Jamba: every p-th block from one on is of a kind; the same of the kept ones, if any p is."""
    if not all(isinstance(getattr(config, key, None), int) for key in (period, offset)):
        return
    kind = [n % getattr(config, period) == getattr(config, offset) for n in keep]
    fits = [
        (p, o)
        for p in range(1, len(keep) + 2)
        for o in range(p)
        if [n % p == o for n in range(len(keep))] == kind
    ]
    if fits:
        setattr(config, period, fits[0][0])
        setattr(config, offset, fits[0][1])
