"""The repository's own contract suites on the device, kernels compiled.

One idea: what the tests demand of every implementation is demanded here of the compiled ones; how
far a suite came is told even where its time ran out. Plugins and fixtures of the rest of the
repository are left out, which would want its dependencies.
"""

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.on_a_gpu.processes import run_within
from benchmarks.on_a_gpu.scale import Scale
from benchmarks.on_a_gpu.sections import SKIPPED

SUITES = {
    "topk": ("contract/test_topk_divergence.py", "without_words_counts"),
    "packed": ("contract/test_packed_topk.py", "chunk"),
    "dense": ("contract/test_linear_divergence.py", "chunk"),
    "hard": ("contract/test_cross_entropy_beside.py", ""),
    "sweeps": ("contract/test_sweeps.py", "ties_are_broken"),
    "step": ("contract/test_step.py", "full_blocks"),
    "gpu": ("gpu", ""),
}
"""Name -> file or folder of tests, and which of them are run in miniature."""
WANTED = ("pytest", "hypothesis")


def contract(scale: Scale, name: str) -> dict[str, Any]:
    """One suite: tests passed and failed, the failed by name."""
    missing = [package for package in WANTED if importlib.util.find_spec(package) is None]
    if missing:
        return {SKIPPED: f"{missing[0]} is not installed; pip install {' '.join(WANTED)}"}
    path, few = SUITES[name]
    if scale.tiny and name == "gpu":
        return {SKIPPED: "its tests need a GPU"}
    tests = Path(__file__).parents[2] / "tests" / path
    command = [sys.executable, "-m", "pytest", "-v", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", str(tests), *_chosen(name, few, scale)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        why = run_within(command, scale.limit - 10, log, _variables(scale))
        return told(log.read_text(errors="replace"), why)


def _chosen(name: str, few: str, scale: Scale) -> list[str]:
    """Which tests, and in how many processes: most of the time goes into compiling."""
    if scale.tiny:
        return ["-k", few] if few else []
    parallel = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    # The contracts in tests/gpu are the other suites here.
    return [*parallel, *(["-k", "not contract_holds"] if name == "gpu" else [])]


def _variables(scale: Scale) -> dict[str, str]:
    kernels, sweeps = "eager chunked triton", "sweep sweep_triton"
    return {
        "STILLROOM_TEST_DEVICE": scale.device,
        "STILLROOM_TEST_KERNELS": kernels,
        "STILLROOM_TEST_SWEEPS": sweeps,
    }


def told(log: str, why: str) -> dict[str, Any]:
    """What pytest's lines say; xdist puts the outcome before the test, pytest behind.

    Args:
        log: what `pytest -v` printed.
        why: it did not end well, or nothing.
    """
    lines = [line for line in log.splitlines() if re.search(r"\[ *\d+%\]", line)]  # of tests
    passed = sum("PASSED" in line for line in lines)
    failed = [m[1] for line in log.splitlines() if (m := re.match(r"FAILED (\S+)", line))]
    wrong = [f"{len(failed)} tests failed"] if failed else []
    if not failed and (why or not passed):
        wrong = [why or "no test passed"]
    return {"tests_passed": passed, "tests_failed": failed[:20], "wrong": wrong}
