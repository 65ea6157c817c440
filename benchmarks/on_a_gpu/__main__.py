"""Everything that only a GPU can show: correctness first, then speed, then training.

    python -m benchmarks.on_a_gpu --json

One idea: a section is a process of its own with a limit of its own, since a CUDA error spoils the
process it happens in, and a kernel that hangs never comes back; whatever becomes of one, the rest
are run, and the result is written after each. It needs a checkout, torch with CUDA, Triton, numpy
and pydantic (pillow for training); pytest and hypothesis for the contracts, pytest-xdist to have
them in time. No vLLM, no zarr, no transformers, no network. `--tiny` runs every section in
miniature on a CPU, kernels under Triton's interpreter: it shows that the sections run, and nothing
about a GPU.

Exit codes: 0 all sections passed or had a reason to be skipped; 2 they cannot run here; 3 some did
not pass.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import needs
from benchmarks.cache_trial import asking
from benchmarks.on_a_gpu import machine
from benchmarks.on_a_gpu.processes import outcome_of
from benchmarks.on_a_gpu.scale import Scale
from benchmarks.on_a_gpu.sections import SECTIONS, SKIPPED, chosen
from stillroom.cache_schemas.errors import EXIT_INCOMPLETE

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run the sections, write the result after each, print it."""
    parser = asking(__doc__)
    parser.add_argument("--tiny", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--only", default="", help="sections, with commas: " + ", ".join(SECTIONS))
    parser.add_argument("--limit", type=float, default=60, help="seconds of a section")
    parser.add_argument("--out", type=Path, help="file of the result (default benchmarks/results/)")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = Scale(arguments.tiny, arguments.limit)
    if arguments.section:
        told = SECTIONS[arguments.section](scale)
        arguments.out.write_text(json.dumps(told))
        return
    names = chosen(arguments.only)
    if not arguments.tiny:
        machine.check()
    now = datetime.now(UTC)
    out = arguments.out or RESULTS / f"on_a_gpu-{now:%Y%m%dT%H%M%S}.json"
    result = {"date": now.isoformat(timespec="seconds"), "tiny": arguments.tiny}
    result |= machine.described()
    passed = run(names, scale, result, out)
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=1))
    sys.exit(0 if passed else EXIT_INCOMPLETE)


def run(names: list[str], scale: Scale, result: dict[str, Any], out: Path) -> bool:
    """Run sections one by one into `result`; whether none failed."""
    sections = result["sections"] = {}
    for name in names:
        sections[name] = told = outcome_of(name, scale)
        line = f"{name}: {told['outcome']} in {told['seconds']} s"
        print(f"{line} {told.get('why', '')}".rstrip(), file=sys.stderr, flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return all(told["outcome"] in ("passed", SKIPPED) for told in sections.values())


if __name__ == "__main__":
    needs.run(main)
