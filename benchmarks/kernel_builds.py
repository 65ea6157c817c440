"""Registers, spills and instructions of the Triton kernels, for GPUs that need not be there.

One idea: what a compiler says of a kernel is the same on any machine, so a table of it can be made
(and compared before and after a change) where nothing could be timed. It times nothing.

    python -m benchmarks.kernel_builds [--architectures 80 90] [--json]
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import triton

from benchmarks import needs
from tests.ahead_of_time import ARCHITECTURES, Build, read
from tests.kernel_builds import CASES

RESULTS = Path(__file__).parent / "results"


def figures(build: Build) -> dict[str, Any]:
    """What is worth comparing of a compiled kernel."""
    loops = [loop for loop in build.loops if loop.words >= 8]
    return {
        "registers": build.registers,
        "spilled_instructions": build.spills,
        "shared_bytes": build.shared,
        "loops": [
            {
                "words": loop.words,
                "instructions_per_word": round(loop.per_word, 2),
                "wide_loads": loop.wide_loads,
                "narrow_loads": loop.narrow_loads,
                "barriers": loop.count("BAR"),
                "exponentials": loop.count("MUFU.EX2"),
            }
            for loop in loops
        ],
    }


def said(name: str, architecture: int, found: dict[str, Any]) -> str:
    """One line of the table."""
    loops = [
        f"{loop['instructions_per_word']:.1f}{' narrow' if loop['narrow_loads'] else ''}"
        for loop in found["loops"]
    ]
    spills = f", {found['spilled_instructions']} spills" if found["spilled_instructions"] else ""
    return f"sm_{architecture} {name}: {found['registers']} registers{spills}; {', '.join(loops)}"


def main() -> None:
    """Compile every case for every architecture asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--json", action="store_true", help="keep a dated result")
    asked = parser.parse_args()
    table: dict[str, dict[str, Any]] = {}
    for architecture in asked.architectures:
        for name, compiled in CASES.items():
            found = figures(read(compiled(architecture=architecture)))
            table.setdefault(f"sm_{architecture}", {})[name] = found
            print(said(name, architecture, found), flush=True)
    if asked.json:
        _keep(table)


def _keep(table: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    versions = {"triton": triton.__version__, "python": platform.python_version()}
    result = {"date": now.isoformat(), "ran_on": "no GPU: compiled only", "versions": versions}
    path = RESULTS / f"kernel_builds-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(result | {"builds": table}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    needs.run(main)
