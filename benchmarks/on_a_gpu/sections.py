"""The sections by name, in the order in which they are run.

One idea: a section is a function from a scale to figures; `wrong` among them lists what is not as
it must be, `skipped` says why there are none, `unfinished` why not all. What a section imports is
imported when it is run, so that one broken module breaks one section.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.on_a_gpu.scale import Scale
from stillroom.cache_schemas.errors import ConfigError

SKIPPED, UNFINISHED = "skipped", "unfinished"
Run = Callable[[Scale], dict[str, Any]]


def _of(module: str, function: str, *arguments: Any) -> Run:
    def run(scale: Scale) -> dict[str, Any]:
        found = import_module(f"benchmarks.on_a_gpu.{module}")
        return getattr(found, function)(scale, *arguments)

    return run


def _named(module: str, functions: str) -> Iterator[tuple[str, Run]]:
    for function in functions.split():
        yield function, _of(module, function)


def _each(prefix: str, module: str, function: str, values: str) -> Iterator[tuple[str, Run]]:
    for value in values.split():
        yield f"{prefix}_{value}", _of(module, function, value)


CONTRACTS = "values options packed dense hard sweeps step gpu"
SECTIONS: dict[str, Run] = dict(
    [
        *_each("contract", "contracts", "contract", CONTRACTS),
        *_named("correctness", "bits odd_widths beyond_int32 autocast_head cuda_graph"),
        *_named("correctness", "compiled_door two_devices"),
        *_named("capture", "one_step"),
        *_each("teacher_bits", "capture", "teacher_bits", "even odd"),
        *_named("speed", "ceilings divergence_sweep dense_sweep"),
        *_each("whole_step", "speed", "whole_step", "D4096 D2048 D1024 D576 D2304"),
        *_named("capture", "teacher_sweep step_speed"),
        *_each("peers", "speed", "peers", "stillroom naive liger cce compile"),
        *_each("training", "training", "training", "plain ddp fsdp"),
    ]
)


def chosen(only: str) -> list[str]:
    """Names of the sections to run.

    Raises:
        ConfigError: one that is named is not there.
    """
    names = [name for name in only.split(",") if name] or list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(
                f"no section '{name}'", expected=f"some of {', '.join(SECTIONS)}", where="--only"
            )
    return names
