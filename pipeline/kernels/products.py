"""The matrix products of the fused form: logits out of states, and a gradient's sum over chunks.

One idea: every product is written into memory that is there already, in the pieces that suit the
device; what the numbers mean is somebody else's business.
"""

import torch
from torch import Tensor

CPU_BLOCK = 1024
"""Words of a block of logits on a CPU: with their rows of the head, in a second-level cache."""


def logits(hidden: Tensor, head: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """hidden [C, D] times head [V, D] transposed, plus bias [V], into out [C, V].

    In blocks of words on a CPU, which saves 5% of the whole at 512 x 256 x 32,000.
    """
    words = len(head)
    size = max(words, 1) if hidden.is_cuda else CPU_BLOCK
    for part in (slice(start, start + size) for start in range(0, words, size)):
        if bias is None:
            torch.mm(hidden, head[part].T, out=out[:, part])
        else:
            torch.addmm(bias[part], hidden, head[part].T, out=out[:, part])
    return out


def add_(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """total = left @ right, or total += left @ right; total may be wider than the factors."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if fresh else total.addmm_(left, right)
    elif widens(total.device):
        _add_widened_(total, left, right, fresh)
    else:
        _add_in_blocks_(total, left, right, fresh)


def widens(device: torch.device) -> bool:
    """Whether a device's products write fp32 from half-precision factors; no CPU's do."""
    return device.type != "cpu"


def _add_widened_(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    # The trainer's path on a GPU: bf16 factors, and the gradient of an fp32 head under autocast.
    try:
        torch.addmm(total, left, right, beta=1 - fresh, out_dtype=total.dtype, out=total)
    except (NotImplementedError, TypeError) as error:
        raise RuntimeError(
            f"torch {torch.__version__} has no product of {left.dtype} factors in {total.dtype}"
            f" on {total.device}, which d_unembedding needs: use torch 2.9 or later, or give a head"
            f" in {left.dtype} with accumulate_fp32=False"
        ) from error


def _add_in_blocks_(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    # Blocks keep the narrow copy small.
    for part, rows in zip(total.split(4096), left.split(4096)):
        product = rows @ right
        part.copy_(product) if fresh else part.add_(product)
