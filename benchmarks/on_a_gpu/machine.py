"""The machine that a result is about, and whether the sections can run on it at all.

One idea: what is missing is one message that says what was found and what works without it.
"""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.cache_trial import machine as processor
from stillroom.cache_schemas.errors import ConfigError

PACKAGES = (
    *("torch", "triton", "numpy", "pydantic", "pytest", "hypothesis", "pytest-xdist"),
    *("liger-kernel", "cut-cross-entropy"),
)
OLDEST = (8, 0)
"""Compute capability that Triton compiles for, and the first with bfloat16 products."""
LEAST_BYTES = 16 << 30
"""What the largest problem of a section takes, about."""
INSTEAD = (
    "`[train] kernel = 'chunked'` trains without Triton and STILLROOM_SWEEP=torch captures "
    "without it, both slower; `--tiny` runs the sections in miniature on a CPU."
)


def check() -> None:
    """Refuse a machine on which the sections cannot run.

    Raises:
        ConfigError: no GPU, one that is too old or has no memory free, or no Triton.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = "torch finds no GPU" if built else f"torch {torch.__version__} is a CPU build"
        raise ConfigError(
            found,
            expected="an NVIDIA GPU, its driver, and a torch built for CUDA",
            remedy="On this machine `--tiny` runs the sections in miniature.",
        )
    check_triton()
    name = torch.cuda.get_device_name()
    check_card(name, torch.cuda.get_device_capability(), torch.cuda.mem_get_info())


def check_triton() -> None:
    """Refuse a Python without Triton."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ConfigError(f"Triton does not import ({error})", remedy=INSTEAD) from None


def check_card(name: str, capability: tuple[int, int], memory: tuple[int, int]) -> None:
    """Refuse a GPU that is too old, or whose memory others have.

    Args:
        memory: (free, all) bytes.
    """
    if capability < OLDEST:
        raise ConfigError(
            f"compute capability {capability[0]}.{capability[1]}",
            expected=f"{OLDEST[0]}.{OLDEST[1]} or later, which Triton compiles for",
            where=name,
            remedy=INSTEAD,
        )
    free, whole = (size / 2**30 for size in memory)
    if memory[0] < LEAST_BYTES:
        raise ConfigError(
            f"{free:.1f} of {whole:.1f} GiB are free",
            expected=f"{LEAST_BYTES >> 30} GiB",
            where=name,
            remedy="End what else runs on it (nvidia-smi lists that), or take a larger GPU.",
        )


def described() -> dict[str, Any]:
    """Hardware and versions."""
    found = {"machine": processor(), "versions": dict(_versions()), "gpus": []}
    if torch.cuda.is_available():
        found["gpus"] = [_card(number) for number in range(torch.cuda.device_count())]
    return found


def _card(number: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(number)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "bytes": facts.total_memory,
        "processors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
    }


def _versions():
    yield "python", platform.python_version()
    yield "cuda", torch.version.cuda or ""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "cpus", str(len(os.sched_getaffinity(0)))
