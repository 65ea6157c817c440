"""Fuzz one decoder with atheris, coverage-guided, for a bounded time.

    python -m tests.fuzz.run message --seconds 60

Inputs that reach new code are kept in `tests/fuzz/corpus/TARGET`; the sound ones come from
`python -m tests.fuzz.run --seeds`. Ends with exit code 0 if there was no finding.
"""

import argparse
import importlib
import pkgutil
import resource
import sys
import tempfile
from pathlib import Path

from stillroom.cache_schemas import kernels

CORPUS = Path(__file__).parent / "corpus"


def write_seeds() -> None:
    """Put a sound input of every target into the corpus."""
    from tests.fuzz.targets import seeds

    for name, inputs in seeds().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(data)


def peak_megabytes() -> int:
    """Peak resident size so far; Linux counts a large parent's into it, across fork and exec."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Parse arguments and hand over to atheris, which ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default="")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="keep new inputs in the corpus")
    parser.add_argument("--seeds", action="store_true", help="write the sound inputs and end")
    options = parser.parse_args()
    if options.seeds:
        write_seeds()
        return
    import atheris

    for module in pkgutil.iter_modules(kernels.__path__, "stillroom.cache_schemas.kernels."):
        importlib.import_module(module.name)  # numba cannot compile what is instrumented
    with atheris.instrument_imports(include=["stillroom"]):
        from tests.fuzz.targets import survives
    folder = CORPUS / options.target
    work = folder if options.keep else Path(tempfile.mkdtemp())
    arguments = [f"-max_total_time={options.seconds}", "-timeout=20", "-malloc_limit_mb=2048"]
    arguments.append(f"-rss_limit_mb={peak_megabytes() + 2048}")
    arguments.append(f"-artifact_prefix={tempfile.mkdtemp()}/")
    atheris.Setup(
        [sys.argv[0], *arguments, str(work), str(folder)],
        lambda data: survives(options.target, data) and None,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
