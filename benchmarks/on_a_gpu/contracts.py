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
from benchmarks.on_a_gpu.sections import SKIPPED, UNFINISHED

VALUES = "value_and_gradient or every_option or temperature_cap"
TOPK = "contract/test_topk_divergence.py"
SUITES = {
    "values": (TOPK, VALUES, "every_option and truncate"),
    "options": (TOPK, f"not ({VALUES})", "without_words_counts"),
    "packed": ("contract/test_packed_topk.py", "", "chunk"),
    "dense": ("contract/test_linear_divergence.py", "", "chunk"),
    "hard": ("contract/test_cross_entropy_beside.py", "", ""),
    "sweeps": ("contract/test_sweeps.py", "", "ties_are_broken"),
    "step": ("contract/test_step.py", "", "full_blocks"),
    # The contracts in there are the other suites here.
    "gpu": ("gpu", "not contract_holds", ""),
}
"""Name -> file or folder of tests; which of them; which are run in miniature."""
WANTED = ("pytest", "hypothesis")


def contract(scale: Scale, name: str) -> dict[str, Any]:
    """One suite: tests passed and failed, the failed by name."""
    missing = [package for package in WANTED if importlib.util.find_spec(package) is None]
    if missing:
        return {SKIPPED: f"{missing[0]} is not installed; pip install {' '.join(WANTED)}"}
    path, *which = SUITES[name]
    if scale.tiny and name == "gpu":
        return {SKIPPED: "its tests need a GPU"}
    tests = Path(__file__).parents[2] / "tests" / path
    command = [sys.executable, "-m", "pytest", "-v", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", str(tests), *_chosen(which[scale.tiny], scale)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        why = run_within(command, scale.limit - 10, log, _variables(scale))
        return told(log.read_text(errors="replace"), why)


def _chosen(which: str, scale: Scale) -> list[str]:
    """Which tests, and in how many processes: most of the time goes into compiling."""
    parallel = importlib.util.find_spec("xdist") is not None and not scale.tiny
    return [*(["-k", which] if which else []), *(["-n", "auto"] if parallel else [])]


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
    figures: dict[str, Any] = {"tests_passed": passed, "tests_failed": failed[:20]}
    if failed or not (passed or why):
        return figures | {"wrong": [f"{len(failed)} tests failed" if failed else "no test passed"]}
    return figures | ({UNFINISHED: why} if why else {})
