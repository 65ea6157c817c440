"""The `vllm.general_plugins` entry point: runs in every vLLM process before it imports a model.

One idea: make vLLM start on a CPU, and nothing else. Importing `pipeline` repairs this process
(see `pipeline.cpu_wheels`); vLLM's model-inspection subprocess imports torchvision before any
plugin can run, so where the wheels do not match, models are inspected here instead. Scoring hooks
are not installed here, so another program's vLLM is left alone: they enter only with our
engine's own `worker_extension_cls`.
"""

from pipeline import cpu_wheels


def register() -> None:
    """Called by vLLM; may be called more than once."""
    cpu_wheels.install()
    let_llvmlite_be_scanned()
    if cpu_wheels.mismatched("torchvision"):
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = _run_here


def let_llvmlite_be_scanned() -> None:
    """vLLM on a CPU asks every object of every module for its `__dict__`.

    numba's door to LLVM answers with a C function of that name, and vLLM fails to start beside any
    program that has compiled something.
    """
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    table = getattr(ffi.lib, "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


def _run_here(function):
    return function()
