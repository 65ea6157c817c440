"""How large a section's problem is and where it lies: whole on a GPU, or in miniature on a CPU.

One idea: a section is written once, and asks this for its sizes, its device and its clock, so that
a CPU runs the same lines. It knows no section.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Size = TypeVar("Size")


@dataclass(frozen=True, slots=True)
class Scale:
    """Where and how large.

    Attributes:
        tiny: in miniature, on a CPU.
        limit: seconds that a section may take.
    """

    tiny: bool
    limit: float = 60

    @property
    def device(self) -> str:
        """Name of the device."""
        return "cpu" if self.tiny else "cuda"

    def pick(self, whole: Size, tiny: Size) -> Size:
        """The size for here."""
        return tiny if self.tiny else whole

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if not self.tiny:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """Median of repeated calls, after two that warm up; of one in miniature.

        Nothing flushes the cache: what is measured is larger than it.
        """
        if self.tiny:
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        for _ in range(2):
            call()
        return statistics.median(_by_events(call) for _ in range(repeats))

    @contextmanager
    def no_waits(self):
        """Within it an operation that waits for the device is an error."""
        if self.tiny:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _by_events(call: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def difference(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|."""
    exact = truth.double()
    return float((found.double() - exact).norm() / exact.norm())
