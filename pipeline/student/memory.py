"""Whether a model fits, reckoned from its files before any of it is loaded.

One idea: what is reckoned is what cannot be less (weights, gradients, moments, one state per block
and token), so a refusal is never a guess; that it fits is no promise. It frees and moves nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from stillroom.cache_schemas.errors import StudentError

GIB = 2**30
FP32 = 4
CGROUP = Path("/sys/fs/cgroup")


def numbers_in(directory: Path) -> dict[str, int]:
    """Weight -> how many numbers it has, of the safetensors files of a directory; empty where it
    has none."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = torch.Size(file.get_slice(name).get_shape()).numel()
    return found


def room_on(device: torch.device) -> int:
    """Bytes that are free for this process where a model would go; for processes of one machine
    that share its memory, an even share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_of_the_machine(), _of_the_group()) // sharing


def check_room(parts: Mapping[str, int], device: torch.device, where: str, remedy: str) -> None:
    """Refuse what cannot fit.

    Args:
        parts: what is needed -> bytes.
        device: where.
        where: what the message is about.
        remedy: what would need less.

    Raises:
        StudentError: with every part and what is free.
    """
    needed, room = sum(parts.values()), room_on(device)
    if needed <= room:
        return
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    raise StudentError(
        f"needs at least {needed / GIB:.2f} GiB ({shown})",
        expected=f"what is free on {device}, {room / GIB:.2f} GiB",
        where=where,
        remedy=remedy,
    )


def _of_the_machine() -> int:
    """Linux's estimate of what can be had without swapping, and the swap; else no bound."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    facts = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(facts[key].split()[0]) for key in ("MemAvailable", "SwapFree"))


def _of_the_group() -> int:
    """What the control group leaves (version 2), as containers and batch systems set it."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(int(limit) - used, 0)
